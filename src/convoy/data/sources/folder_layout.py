"""The layout of a data set: which of its folders are named after classes, and which after splits."""

import collections
import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping

from convoy.data.sources.base import SPLIT_WORDS
from convoy.data.sources.file_listing import split_word
from convoy.text import truncate_names

Names = tuple[str, ...]  # of folders, from the outermost on


@dataclasses.dataclass(frozen=True)
class ClassRoot:
    """A folder in which those named after classes are; or one named after a split, with images and no more folders."""

    split: str  # of all images in it; "" where none is given
    inner: Mapping[str, Mapping[str, str]]  # class -> what splits the folders in its folder are named after


@dataclasses.dataclass(frozen=True)
class FolderLayout:
    """Where the classes and the splits of some files stand in their paths."""

    roots: dict[Names, ClassRoot]
    notes: list[str]  # what may not be meant so, in sentences

    def said(self, folder: str) -> tuple[str, str]:
        """The class and the split of what lies in a folder; "" for none."""
        names = tuple(folder.split("/")) if folder else ()
        for depth in self._depths:
            if len(names) >= depth and (root := self.roots.get(names[:depth])):
                label, below = (*names[depth : depth + 2], "", "")[:2]
                return label, root.inner.get(label, {}).get(below, root.split)
        return "", ""

    @functools.cached_property
    def _depths(self) -> list[int]:
        return sorted({len(path) for path in self.roots})


@dataclasses.dataclass
class _FolderNode:
    """A folder that has images somewhere below it."""

    inside: dict[str, "_FolderNode"] = dataclasses.field(default_factory=dict)
    has_images: bool = False  # itself


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A folder that may be a root."""

    path: Names
    folder: _FolderNode
    split: str
    counts: bool  # what lies beside folders of splits does not, but where it is divided into such itself

    def inner(self, splits: Mapping[str, str], counts: bool) -> "list[_Candidate]":
        """The folders in it."""
        return [
            _Candidate((*self.path, name), inner, splits.get(name, self.split), counts or name in splits)
            for name, inner in self.folder.inside.items()
        ]


def find_layout(folders: Iterable[str]) -> FolderLayout:
    """What the folders that have images of their own tell.

    Those around all others are looked through. Splits may stand around the classes (train/cat), in them (cat/train),
    or around them in parts of the whole (site/train/cat).
    """
    top = _FolderNode()
    for folder in folders:
        here = top
        for name in folder.split("/"):
            here = here.inside.setdefault(name, _FolderNode())
        here.has_images = True
    places = [_Candidate((), top, "", True)]
    while deeper := _deeper(places):  # all of them at a time: the classes are as deep in one as in another
        places = deeper
    places = [place for place in places if place.counts and (place.folder.inside or place.split)]
    roots = {place.path: ClassRoot(place.split, _inner_splits(place.folder)) for place in places}
    notes = dict.fromkeys(note for place in places for note in _doubts(place.folder, roots[place.path]))
    return FolderLayout(roots, list(notes))


def _deeper(places: list[_Candidate]) -> list[_Candidate]:
    """The places one folder further down, where these are not roots yet."""
    splits = [_splits_among(place.folder) for place in places]
    if any(splits):
        pairs = zip(places, splits, strict=True)
        return [inner for place, there in pairs for inner in (place.inner(there, False) if there else [place])]
    counting = [place for place in places if place.counts and place.folder.inside]
    only = [inner for place in counting for inner in place.folder.inside.values() if len(place.folder.inside) == 1]
    around = len(only) == len(counting) and all(inner.inside and not inner.has_images for inner in only)
    if counting and (around or any(_is_in_parts(place.folder) for place in counting)):
        return [inner for place in places for inner in place.inner({}, place.counts) or [place]]
    return []


def _splits_among(folder: _FolderNode) -> dict[str, str]:
    """Which folders in one are named after splits, where the images are divided so; else nothing."""
    exact = {name: SPLIT_WORDS[name.lower()] for name in folder.inside if name.lower() in SPLIT_WORDS}
    if len(exact) == len(folder.inside) or _divide(exact.values()):
        return exact
    named = {name: split for name in folder.inside if (split := split_word(name))}  # train_images
    if not _divide(named.values()):
        return {}
    # a class, too, may have such a word in its name: test tube
    trains = [folder.inside[name] for name, split in named.items() if split == "train"]
    sure = len(named) == len(folder.inside) or all(train.inside and not train.has_images for train in trains)
    return named if sure else {}


def _divide(splits: Collection[str]) -> bool:
    return "train" in splits and len(set(splits)) > 1


def _inner_splits(folder: _FolderNode) -> dict[str, dict[str, str]]:
    """Of each folder in one, those in it that are named after splits, where the images are divided so."""
    splits = {name: there for name, inner in folder.inside.items() if (there := _splits_among(inner))}
    return splits if _divide([split for there in splits.values() for split in there.values()]) else {}


def _is_in_parts(folder: _FolderNode) -> bool:
    """Whether folders of splits stand in each part of the whole, which can be told by classes that several have."""
    splits = _inner_splits(folder)
    kinds = []
    for name, inner in folder.inside.items():
        parts = [inner.inside[part] for part in splits.get(name, [])] or [inner]
        if any(part.has_images for part in parts):
            return False
        kinds.append({kind for part in parts for kind in part.inside})
    return bool(splits) and bool(_shared(kinds))


def _doubts(folder: _FolderNode, root: ClassRoot) -> list[str]:
    """What is said of folders that look as if they were not meant for classes."""
    notes, words = [], {name: split_word(name) for name in folder.inside}
    divided = _divide(words.values())
    splits = [
        name
        for name, word in words.items()
        if name.lower() in SPLIT_WORDS or (word and (divided or word == root.split))
    ]
    if splits:
        notes.append(
            f"{truncate_names(splits)}: taken for {'classes' if len(splits) > 1 else 'a class'}, not for splits, as"
            " what lies beside or in them does not look so: put the same classes into folders train and test"
        )
    for name, inner in folder.inside.items():
        if called := sorted(folder.inside.keys() & inner.inside.keys() - {name}):
            notes.append(
                f"{name} is taken for a class, and has folders that are called as classes are: {truncate_names(called)}"
            )
        elif _holds_splits(inner):
            notes.append(
                f"{name} is taken for a class, and has folders of splits with folders in them: if those are the"
                f" classes, leave nothing beside {name}"
            )
    return notes + _doubts_of_parts(folder, root)


def _holds_splits(folder: _FolderNode) -> bool:
    """Whether the images in it, or in a folder further in, are divided into splits with folders in them."""
    splits = _splits_among(folder)
    if _divide(splits.values()) and any(folder.inside[name].inside for name in splits):
        return True
    return any(map(_holds_splits, folder.inside.values()))


def _doubts_of_parts(folder: _FolderNode, root: ClassRoot) -> list[str]:
    """What is said where the folders in the class folders look as if they were the classes."""
    shared = sorted(_shared([set(inner.inside) for inner in folder.inside.values() if not inner.has_images]))
    if root.inner or len(shared) < 2:
        return []
    return [
        f"{truncate_names(sorted(folder.inside))} are taken for the classes, and several of them have the folders"
        f" {truncate_names(shared)}:"
        " if those are the classes, put them at the top, one folder for each"
    ]


def _shared(kinds: Iterable[Collection[str]]) -> list[str]:
    """What is in more than one."""
    return [name for name, count in collections.Counter(name for kind in kinds for name in kind).items() if count > 1]
