"""The layout of a data set: which of its folders are named after classes, and which after splits."""

import dataclasses
from collections.abc import Collection, Iterable

from convoy.datasets.files import split_word
from convoy.datasets.source import SPLITS

FEW = 3  # names in a sentence


@dataclasses.dataclass(frozen=True)
class Root:
    """A folder whose folders are named after classes."""

    split: str  # of all images in it; "" where none is given
    divided: bool = False  # the folders in each class folder are named after splits: cat/train/1.jpg


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the classes and the splits of some files stand in their paths."""

    roots: dict[tuple[str, ...], Root]  # by their path
    notes: list[str]  # what may not be meant so, in sentences

    def said(self, folder: str) -> tuple[str, str] | None:
        """The class and the split of what lies in a folder; None where no class folder is around it."""
        names = tuple(folder.split("/")) if folder else ()
        for depth in range(len(names)):
            if root := self.roots.get(names[:depth]):
                inner = SPLITS.get(names[depth + 1].lower(), "") if root.divided and len(names) > depth + 1 else ""
                return names[depth], inner or root.split
        return None


@dataclasses.dataclass
class _Folder:
    """A folder that has images somewhere below it."""

    inside: dict[str, "_Folder"] = dataclasses.field(default_factory=dict)
    has_images: bool = False  # itself


def layout_of(folders: Iterable[str]) -> Layout:
    """What the folders that have images of their own tell.

    Those around all others are looked through. Splits may stand around the classes (train/cat), in them (cat/train),
    or around them in each part of the whole (site/train/cat).
    """
    top = _Folder()
    for folder in folders:
        here = top
        for name in folder.split("/"):
            here = here.inside.setdefault(name, _Folder())
        here.has_images = True
    roots: dict[tuple[str, ...], Root] = {}
    notes: dict[str, None] = {}
    waiting: list[tuple[tuple[str, ...], _Folder, str, bool]] = [((), top, "", True)]
    while waiting:
        path, here, split, counts = waiting.pop()  # a folder that does not count may hold some that do
        if splits := _splits_among(here):
            waiting += [
                ((*path, name), inner, splits.get(name, ""), name in splits) for name, inner in here.inside.items()
            ]
            continue
        ways = {name: _splits_among(inner) for name, inner in here.inside.items()}
        only = next(iter(here.inside.values())) if len(here.inside) == 1 else None
        parted = [here.inside[name].inside[part] for name, parts in ways.items() for part in parts]
        divided = len(ways) > 1 and all(ways.values())
        if (only and only.inside and not only.has_images) or (divided and any(part.inside for part in parted)):
            waiting += [((*path, name), inner, split, counts) for name, inner in here.inside.items()]
        elif counts and here.inside:
            roots[path] = Root(split, divided)
            notes |= dict.fromkeys(_doubts(here) if not divided else [])
    return Layout(roots, list(notes))


def _splits_among(folder: _Folder) -> dict[str, str]:
    """Which folders in one are named after splits, where the images are divided so; else nothing."""
    exact = {name: SPLITS[name.lower()] for name in folder.inside if name.lower() in SPLITS}
    if len(exact) == len(folder.inside) or _divide(exact.values()):
        return exact
    named = {name: split for name in folder.inside if (split := split_word(name))}  # train_images
    # classes, too, may have such words in their names: test tube
    inner = [folder.inside[name] for name, split in named.items() if split == "train"]
    sure = len(named) == len(folder.inside) or all(train.inside and not train.has_images for train in inner)
    return named if _divide(named.values()) and sure else {}


def _divide(splits: Collection[str]) -> bool:
    return "train" in splits and len(set(splits)) > 1


def _doubts(folder: _Folder) -> list[str]:
    """What is said where the folders in the class folders look as if they were the classes."""
    kinds = [set() if inner.has_images else set(inner.inside) for inner in folder.inside.values()]
    if len(kinds) < 2 or len(kinds[0]) < 2 or any(kind != kinds[0] for kind in kinds):
        return []
    return [
        f"{_some(folder.inside)} are taken for the classes, and in each of them are the folders {_some(kinds[0])}: if"
        " those are the classes, put them at the top, one folder for each"
    ]


def _some(names: Collection[str]) -> str:
    """The first names in words."""
    first = sorted(names)[:FEW]
    return ", ".join(first) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")
