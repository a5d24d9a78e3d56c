"""Folder layout of a data set: which folders are named after classes, and which after splits."""

import collections
import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping

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

    roots: Mapping[Names, ClassRoot]
    problem: str = ""  # what is in none of the forms of docs/data.md, such as "a/ has ..."; "" if nothing is

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

    def walk(self) -> Iterator["_FolderNode"]:
        """Yield this folder and all below it."""
        stack = [self]
        while stack:
            yield (folder := stack.pop())
            stack += folder.subfolders.values()


def find_layout(folders: Iterable[str]) -> FolderLayout:
    """Find the class folders of a data set, and the split folders around them or in them.

    Outer folders that contain all others are descended into. Folders beside split folders have no classes.

    Args:
        folders: The paths of the folders that have images directly in them.
    """
    top = _FolderNode()
    for joined in folders:
        folder = top
        for name in joined.split("/"):
            folder = folder.subfolders.setdefault(name, _FolderNode())
        folder.has_images = True
    outer: Names = ()
    folder = top
    while not (splits := _find_split_folders(folder)) and _are_outer([folder]):
        ((name, folder),) = folder.subfolders.items()
        outer = (*outer, name)
    found = {(*outer, name): folder.subfolders[name] for name in splits} or {outer: folder}
    # For example seg_train/seg_train/cat.
    while splits and _are_outer(found.values()):
        found = _descend(found)
    roots: dict[Names, ClassRoot] = {}
    problem = ""
    for path, folder in found.items():
        split = splits[path[len(outer)]] if splits else ""
        inner_splits = {name: inner for name, each in folder.subfolders.items() if (inner := _find_split_folders(each))}
        problem = problem or _find_problem(path, folder, inner_splits)
        if folder.subfolders or split:
            roots[path] = ClassRoot(split, inner_splits)
    return FolderLayout(roots, problem)


def _are_outer(folders: Collection[_FolderNode]) -> bool:
    """Check whether each folder with subfolders has only one, which is no class folder because it has only folders."""
    inner = [list(folder.subfolders.values()) for folder in folders if folder.subfolders]
    return bool(inner) and all(len(each) == 1 and each[0].subfolders and not each[0].has_images for each in inner)


def _descend(folders: Mapping[Names, _FolderNode]) -> dict[Names, _FolderNode]:
    """Replace each folder by its only subfolder, if it has one."""
    deeper = {(*path, name): inner for path, folder in folders.items() for name, inner in folder.subfolders.items()}
    return deeper | {path: folder for path, folder in folders.items() if not folder.subfolders}


def _find_split_folders(folder: _FolderNode) -> dict[str, str]:
    """Map the folders in `folder` that are named after splits to these, if they divide the images; else return {}."""
    subfolders = folder.subfolders
    exact = {name: SPLIT_NAMES[name.lower()] for name in subfolders if name.lower() in SPLIT_NAMES}
    if len(exact) == len(subfolders) or _is_division(exact.values()):
        return exact
    # For example train_images. The name of a class may contain the name of a split as well: test tube.
    similar = {name: split for name in subfolders if (split := find_split_name(name))}
    training = [subfolders[name] for name, split in similar.items() if split == "train"]
    contain_classes = all(inner.subfolders and not inner.has_images for inner in training)
    is_clear = contain_classes or len(similar) == len(subfolders)
    return similar if _is_division(similar.values()) and is_clear else {}


def _is_division(splits: Collection[str]) -> bool:
    return "train" in splits and len(set(splits)) > 1


def _find_problem(path: Names, root: _FolderNode, inner_splits: Mapping[str, Mapping[str, str]]) -> str:
    """Return what is in no accepted form in the folder at `path`, whose subfolders should be class folders."""
    classes = root.subfolders
    for name, folder in classes.items():
        at = "/".join((*path, name))
        if name.lower() in SPLIT_NAMES and not folder.has_images:
            return (
                f"{at}/ is named after a split, and {truncate_names(sorted(classes.keys() - {name}))} beside it is not"
            )
        # For example test/test/1.jpg beside train/train/cat/2.jpg.
        if folder.has_images and len(classes) == 1 and path[-1:] == (name,):
            return f"{at}/ has images and no class folders"
        if same := sorted(folder.subfolders.keys() & classes.keys() - {name}):
            return f"{at}/ has folders with the names of those beside it ({truncate_names(same)})"
        splits = inner_splits.get(name, {})
        if any(folder.subfolders[inner].subfolders for inner in splits) or any(
            inner is not folder and _is_division(_find_split_folders(inner).values()) for inner in folder.walk()
        ):
            return f"{at}/ has split folders with folders in them"
    others = [name for name, folder in classes.items() if name not in inner_splits]
    divided = [split for splits in inner_splits.values() for split in splits.values()]
    if inner_splits and others and (not _is_division(divided) or any(classes[name].subfolders for name in others)):
        return (
            f"{truncate_names(sorted(inner_splits))} have split folders, and {truncate_names(sorted(others))} have none"
        )
    inner = [folder for folder in classes.values() if not folder.has_images]
    # For example amazon/images/mug and dslr/images/mug.
    while len({name for folder in inner for name in folder.subfolders}) == 1:
        inner = [each for folder in inner for each in folder.subfolders.values() if not each.has_images]
    counts = collections.Counter(name for folder in inner for name in folder.subfolders)
    shared = sorted(name for name, count in counts.items() if count > 1)
    if len(shared) > 1 and not inner_splits:
        return f"{truncate_names(sorted(classes))} have the same folders in them ({truncate_names(shared)})"
    return ""
