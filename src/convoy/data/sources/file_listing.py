"""Files: those of one folder or one archive, and what the source says of each."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from convoy.data.sources.base import SPLIT_WORDS, FileContent

# the last of them are told by name that they can't be read
IMAGES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp",
          ".avif", ".cr2", ".dcm", ".dng", ".heic", ".heif", ".jp2", ".jxl", ".nef", ".pgm", ".ppm")  # fmt: skip
# what systems leave in folders, in any case; so do names that begin with a dot
JUNK = {"__macosx", "$recycle.bin", "@eadir", "desktop.ini", "ehthumbs.db", "icon\r", "lost+found",
        "system volume information", "thumbs.db"}  # fmt: skip

PIECE = 2**10  # paths in one text


class PackedPaths(Iterable[str]):
    """Very many paths, in long texts: as objects of Python they would take three times the memory.

    No path begins or ends with a slash or has two in a row, so two can stand between them.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        waiting = iter(paths)
        self.texts = ["//".join(some) for some in iter(lambda: list(itertools.islice(waiting, PIECE)), [])]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(text.split("//") for text in self.texts)


@dataclasses.dataclass(frozen=True)
class FileSet:
    """The files of a folder or an archive, but for junk."""

    name: str  # what stands before their paths in messages: data/, data/pets.zip:
    paths: Iterable[str]  # below the folder or in the archive, with slashes; in an order that does not change
    # gives a function that gives the content of the i-th file, which has this path; at little cost if i only grows
    opened: Callable[[], AbstractContextManager[Callable[[int, str], FileContent]]]
    notes: Sequence[str] = ()  # what may not be as it was meant, in sentences


class Annotation(NamedTuple):
    """What the source says of one image."""

    label: str = ""
    split: str = ""
    group: str = ""
    fault: str = ""  # why the image is no use, where what is said of it shows that
    more: tuple[str, ...] = ()  # the other columns of a table


def below(name: str) -> str | None:
    """A path as plain names with slashes between them; None where it is absolute or climbs up."""
    parts = name.split("/")
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", name) or ".." in name.replace("\\", "/").split("/"):
        return None
    return "/".join(part for part in parts if part not in ("", "."))


def is_junk(path: str) -> bool:
    return path.startswith(".") or "/." in path or not JUNK.isdisjoint(path.lower().split("/"))


def is_image(path: str) -> bool:
    return path.lower().endswith(IMAGES)


def split_in(path: str) -> str:
    """The split that a file is named after (train.csv, test-00000-of-00002.parquet), or else its folder, or else ""."""
    *folders, name = path.split("/")
    return split_word(name) or (SPLIT_WORDS.get(folders[-1].lower(), "") if folders else "")


def split_word(name: str) -> str:
    """The split whose name stands in another as a word of its own, the first of several; "" for none."""
    word = _WORDS.search(name.lower())
    return SPLIT_WORDS[word[1]] if word else ""


_WORDS = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLIT_WORDS, reverse=True))})(?:set|data|images)?(?![a-z])")
