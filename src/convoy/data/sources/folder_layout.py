"""Folder layout of a data set: which folders are named after classes, and which after splits."""

import collections
import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping

from convoy.core.text import truncate_names
from convoy.data.sources.base import SPLIT_WORDS
from convoy.data.sources.file_listing import split_word

Names = tuple[str, ...]  # folder names, outermost first


@dataclasses.dataclass(frozen=True)
class ClassRoot:
    """A folder that contains the class folders, or a split folder that has images but no folders."""

    split: str  # split of all images in it; "" for none
    inner: Mapping[str, Mapping[str, str]]  # class -> folder in the class folder -> split it is named after


@dataclasses.dataclass(frozen=True)
class FolderLayout:
    """The positions of classes and splits in the paths of a data set."""

    roots: dict[Names, ClassRoot]
    notes: list[str]  # warnings about ambiguous folders, in sentences

    def said(self, folder: str) -> tuple[str, str]:
        """Return the class and the split of the files in a folder; "" for none."""
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
    """A folder that has images at some level below it."""

    inside: dict[str, "_FolderNode"] = dataclasses.field(default_factory=dict)
    has_images: bool = False  # directly in it


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A folder that may be a class root."""

    path: Names
    folder: _FolderNode
    split: str
    # A folder next to split folders does not count, unless it is divided into split folders itself.
    counts: bool

    def inner(self, splits: Mapping[str, str], counts: bool) -> "list[_Candidate]":
        """Return the folders in this one as candidates."""
        return [
            _Candidate((*self.path, name), inner, splits.get(name, self.split), counts or name in splits)
            for name, inner in self.folder.inside.items()
        ]


def find_layout(folders: Iterable[str]) -> FolderLayout:
    """Infer the layout of a data set from the folders that contain its images.

    Outer folders that contain all others are descended into. Split folders may be around the classes (train/cat),
    inside them (cat/train), or around them in each part of the data set (site/train/cat).

    Args:
        folders: The paths of the folders that have images directly in them.

    Returns:
        The layout, with warnings about ambiguous folders.
    """
    top = _FolderNode()
    for folder in folders:
        here = top
        for name in folder.split("/"):
            here = here.inside.setdefault(name, _FolderNode())
        here.has_images = True
    places = [_Candidate((), top, "", True)]
    # All candidates move one level deeper at a time, because classes are at the same depth in each of them.
    while deeper := _deeper(places):
        places = deeper
    places = [place for place in places if place.counts and (place.folder.inside or place.split)]
    roots = {place.path: ClassRoot(place.split, _inner_splits(place.folder)) for place in places}
    notes = dict.fromkeys(note for place in places for note in _doubts(place.folder, roots[place.path]))
    return FolderLayout(roots, list(notes))


def _deeper(places: list[_Candidate]) -> list[_Candidate]:
    """Return the candidates one level deeper, or an empty list if the current ones are the class roots."""
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
    """Map the folders in `folder` that are named after splits to these, if they divide the images; else return {}."""
    exact = {name: SPLIT_WORDS[name.lower()] for name in folder.inside if name.lower() in SPLIT_WORDS}
    if len(exact) == len(folder.inside) or _divide(exact.values()):
        return exact
    # For example train_images.
    named = {name: split for name in folder.inside if (split := split_word(name))}
    if not _divide(named.values()):
        return {}
    # The name of a class may contain the name of a split as well: test tube.
    trains = [folder.inside[name] for name, split in named.items() if split == "train"]
    sure = len(named) == len(folder.inside) or all(train.inside and not train.has_images for train in trains)
    return named if sure else {}


def _divide(splits: Collection[str]) -> bool:
    return "train" in splits and len(set(splits)) > 1


def _inner_splits(folder: _FolderNode) -> dict[str, dict[str, str]]:
    """Map each folder in `folder` to its split folders, if these divide the images; else return {}."""
    splits = {name: there for name, inner in folder.inside.items() if (there := _splits_among(inner))}
    return splits if _divide([split for there in splits.values() for split in there.values()]) else {}


def _is_in_parts(folder: _FolderNode) -> bool:
    """Return whether parts of the data set have split folders of their own, recognized by classes that they share."""
    splits = _inner_splits(folder)
    kinds = []
    for name, inner in folder.inside.items():
        parts = [inner.inside[part] for part in splits.get(name, [])] or [inner]
        if any(part.has_images for part in parts):
            return False
        kinds.append({kind for part in parts for kind in part.inside})
    return bool(splits) and bool(_shared(kinds))


def _doubts(folder: _FolderNode, root: ClassRoot) -> list[str]:
    """Return warnings about folders that are taken for classes but look like something else."""
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
    """Return whether split folders with folders in them divide the images here or at a deeper level."""
    splits = _splits_among(folder)
    if _divide(splits.values()) and any(folder.inside[name].inside for name in splits):
        return True
    return any(map(_holds_splits, folder.inside.values()))


def _doubts_of_parts(folder: _FolderNode, root: ClassRoot) -> list[str]:
    """Return a warning if the folders in the class folders look like the actual classes."""
    shared = sorted(_shared([set(inner.inside) for inner in folder.inside.values() if not inner.has_images]))
    if root.inner or len(shared) < 2:
        return []
    return [
        f"{truncate_names(sorted(folder.inside))} are taken for the classes, and several of them have the folders"
        f" {truncate_names(shared)}:"
        " if those are the classes, put them at the top, one folder for each"
    ]


def _shared(kinds: Iterable[Collection[str]]) -> list[str]:
    """Return the names that are in more than one collection."""
    return [name for name, count in collections.Counter(name for kind in kinds for name in kind).items() if count > 1]
