"""Folder layout of a data set: which folders are named after classes, and which after splits."""

import collections
import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping

from convoy.core.text import truncate_names
from convoy.data.sources.base import SPLIT_NAMES
from convoy.data.sources.file_listing import find_split_name

Names = tuple[str, ...]  # folder names, outermost first


@dataclasses.dataclass(frozen=True)
class ClassRoot:
    """A folder that contains the class folders, or a split folder that has images but no folders."""

    split: str  # split of all images in it; "" for none
    inner_splits: Mapping[str, Mapping[str, str]]  # class -> folder in the class folder -> split it is named after


@dataclasses.dataclass(frozen=True)
class FolderLayout:
    """The positions of classes and splits in the paths of a data set."""

    roots: dict[Names, ClassRoot]
    notes: list[str]  # warnings about ambiguous folders, in sentences

    def find_class_and_split(self, folder: str) -> tuple[str, str]:
        """Return the class and the split of the files in a folder; "" for none."""
        names = tuple(folder.split("/")) if folder else ()
        for depth in self._depths:
            if len(names) >= depth and (root := self.roots.get(names[:depth])):
                label, subfolder = (*names[depth : depth + 2], "", "")[:2]
                return label, root.inner_splits.get(label, {}).get(subfolder, root.split)
        return "", ""

    @functools.cached_property
    def _depths(self) -> list[int]:
        return sorted({len(path) for path in self.roots})


@dataclasses.dataclass
class _FolderNode:
    """A folder that has images at some level below it."""

    subfolders: dict[str, "_FolderNode"] = dataclasses.field(default_factory=dict)
    has_images: bool = False  # directly in it


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A folder that may be a class root."""

    path: Names
    folder: _FolderNode
    split: str
    # A folder next to split folders does not count, unless it is divided into split folders itself.
    counts: bool

    def descend(self, splits: Mapping[str, str], counts: bool) -> "list[_Candidate]":
        """Return the folders in this one as candidates."""
        return [
            _Candidate((*self.path, name), folder, splits.get(name, self.split), counts or name in splits)
            for name, folder in self.folder.subfolders.items()
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
    for path in folders:
        folder = top
        for name in path.split("/"):
            folder = folder.subfolders.setdefault(name, _FolderNode())
        folder.has_images = True
    candidates = [_Candidate((), top, "", True)]
    # All candidates move one level deeper at a time, because classes are at the same depth in each of them.
    while deeper := _descend(candidates):
        candidates = deeper
    found = [each for each in candidates if each.counts and (each.folder.subfolders or each.split)]
    roots = {each.path: ClassRoot(each.split, _find_inner_splits(each.folder)) for each in found}
    notes = dict.fromkeys(note for each in found for note in _note_ambiguities(each.folder, roots[each.path]))
    return FolderLayout(roots, list(notes))


def _descend(candidates: list[_Candidate]) -> list[_Candidate]:
    """Return the candidates one level deeper, or an empty list if the current ones are the class roots."""
    splits = [_find_split_folders(candidate.folder) for candidate in candidates]
    if any(splits):
        return [
            inner
            for candidate, split_folders in zip(candidates, splits, strict=True)
            for inner in (candidate.descend(split_folders, False) if split_folders else [candidate])
        ]
    counting = [candidate.folder for candidate in candidates if candidate.counts and candidate.folder.subfolders]
    only = [inner for folder in counting for inner in folder.subfolders.values() if len(folder.subfolders) == 1]
    are_outer = len(only) == len(counting) and all(inner.subfolders and not inner.has_images for inner in only)
    if counting and (are_outer or any(map(_is_in_parts, counting))):
        return [inner for candidate in candidates for inner in candidate.descend({}, candidate.counts) or [candidate]]
    return []


def _find_split_folders(folder: _FolderNode) -> dict[str, str]:
    """Map the folders in `folder` that are named after splits to these, if they divide the images; else return {}."""
    subfolders = folder.subfolders
    exact = {name: SPLIT_NAMES[name.lower()] for name in subfolders if name.lower() in SPLIT_NAMES}
    if len(exact) == len(subfolders) or _is_division(exact.values()):
        return exact
    # For example train_images.
    similar = {name: split for name in subfolders if (split := find_split_name(name))}
    if not _is_division(similar.values()):
        return {}
    # The name of a class may contain the name of a split as well: test tube.
    training = [subfolders[name] for name, split in similar.items() if split == "train"]
    contain_classes = all(inner.subfolders and not inner.has_images for inner in training)
    return similar if contain_classes or len(similar) == len(subfolders) else {}


def _is_division(splits: Collection[str]) -> bool:
    return "train" in splits and len(set(splits)) > 1


def _find_inner_splits(folder: _FolderNode) -> dict[str, dict[str, str]]:
    """Map each folder in `folder` to its split folders, if these divide the images; else return {}."""
    splits = {name: found for name, inner in folder.subfolders.items() if (found := _find_split_folders(inner))}
    return splits if _is_division([split for found in splits.values() for split in found.values()]) else {}


def _is_in_parts(folder: _FolderNode) -> bool:
    """Check whether parts of the data set have split folders of their own, recognized by classes that they share."""
    inner_splits = _find_inner_splits(folder)
    classes = []
    for name, inner in folder.subfolders.items():
        parts = [inner.subfolders[split] for split in inner_splits.get(name, [])] or [inner]
        if any(part.has_images for part in parts):
            return False
        classes.append({label for part in parts for label in part.subfolders})
    return bool(inner_splits) and bool(_find_repeated(classes))


def _note_ambiguities(folder: _FolderNode, root: ClassRoot) -> list[str]:
    """Return notes about folders that are taken for classes but look like something else."""
    notes, splits = [], {name: find_split_name(name) for name in folder.subfolders}
    is_division = _is_division(splits.values())
    like_splits = [
        name
        for name, split in splits.items()
        if name.lower() in SPLIT_NAMES or (split and (is_division or split == root.split))
    ]
    if like_splits:
        notes.append(
            f"{truncate_names(like_splits)}: taken for {'classes' if len(like_splits) > 1 else 'a class'}, not for"
            " splits, because of the folders beside or in them: to define splits, put the same classes into folders"
            " train and test"
        )
    for name, inner in folder.subfolders.items():
        if same_names := sorted(folder.subfolders.keys() & inner.subfolders.keys() - {name}):
            notes.append(
                f"{name} is taken for a class, but has folders with the names of classes: {truncate_names(same_names)}"
            )
        elif _contains_splits(inner):
            notes.append(
                f"{name} is taken for a class, but has split folders with folders in them: if those are the classes,"
                f" remove everything beside {name}"
            )
    return notes + _note_shared_subfolders(folder, root)


def _contains_splits(folder: _FolderNode) -> bool:
    """Check whether split folders with folders in them divide the images here or at a deeper level."""
    splits = _find_split_folders(folder)
    if _is_division(splits.values()) and any(folder.subfolders[name].subfolders for name in splits):
        return True
    return any(map(_contains_splits, folder.subfolders.values()))


def _note_shared_subfolders(folder: _FolderNode, root: ClassRoot) -> list[str]:
    """Return a note if the folders in the class folders look like the actual classes."""
    shared = sorted(
        _find_repeated([set(inner.subfolders) for inner in folder.subfolders.values() if not inner.has_images])
    )
    if root.inner_splits or len(shared) < 2:
        return []
    return [
        f"{truncate_names(sorted(folder.subfolders))} are taken for the classes, but several of them have the folders"
        f" {truncate_names(shared)}: if those are the classes, put them at the top, one folder for each"
    ]


def _find_repeated(collections_of_names: Iterable[Collection[str]]) -> list[str]:
    """Return the names that are in more than one collection."""
    counts = collections.Counter(name for names in collections_of_names for name in names)
    return [name for name, count in counts.items() if count > 1]
