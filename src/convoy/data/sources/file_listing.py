"""File listings: the files of one folder or archive, and the annotations of each file."""

import contextlib
import dataclasses
import itertools
import math
import re
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, TypeVar

from convoy.core.errors import ConvoyError
from convoy.data.sources.base import SPLIT_NAMES, FileContent

# The last of these formats can't be decoded; they are listed so that such files are reported by name.
IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm",
    ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
    ".cr2", ".dcm", ".dng", ".exr", ".hdr", ".jxl", ".nef", ".psd", ".svg",
)  # fmt: skip
# Lower-case names of files and folders that operating systems create. Names that begin with a dot are junk as well.
JUNK_NAMES = {
    "__macosx", "$recycle.bin", "@eadir", "desktop.ini", "ehthumbs.db", "icon\r", "lost+found",
    "system volume information", "thumbs.db",
}  # fmt: skip

# Finds a split whose name is a separate word: test_images, but not contest.
SPLIT_NAME_PATTERN = re.compile(
    rf"(?<![a-z])({'|'.join(sorted(SPLIT_NAMES, reverse=True))})(?:set|data|images)?(?![a-z])"
)
# Paths in one string.
PATHS_PER_STRING = 2**10
# Files of a folder that are listed even where a limit on all folders together is reached.
MIN_FILES_PER_FOLDER = 20

Item = TypeVar("Item")


class PackedPaths(Iterable[str]):
    """A compact list of very many paths, stored in long strings.

    As separate Python objects, the paths would take three times the memory. No path begins or ends with a slash or
    has two in a row, so two slashes can separate them.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        remaining = iter(paths)
        self.texts = [
            "//".join(chunk) for chunk in iter(lambda: list(itertools.islice(remaining, PATHS_PER_STRING)), [])
        ]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(text.split("//") for text in self.texts)


@dataclasses.dataclass(frozen=True)
class FileSet:
    """The files of a folder or an archive, without junk."""

    name: str  # prefix of their paths in messages: data/, data/pets.zip:
    paths: Iterable[str]  # relative to the folder or archive, with slashes, in a stable order
    # Opens the files for reading and yields a function from the index and path of a file to its content. Reading is
    # cheap as long as the index only increases.
    open: Callable[[], AbstractContextManager[Callable[[int, str], FileContent]]]
    notes: Sequence[str] = ()  # warnings about what may be unintended, in sentences
    excluded: Iterable[str] = ()  # paths of the files that the settings leave out

    def select(self, is_selected: Callable[[str], bool]) -> "FileSet":
        """Return the files whose paths are selected; the others become `excluded`."""
        indices, paths, excluded = array("L"), [], []
        for index, path in enumerate(self.paths):
            if is_selected(path):
                indices.append(index)
                paths.append(path)
            else:
                excluded.append(path)

        @contextlib.contextmanager
        def open_selected() -> Iterator[Callable[[int, str], FileContent]]:
            with self.open() as read:
                yield lambda index, path: read(indices[index], path)

        selected = dataclasses.replace(self, paths=PackedPaths(paths), open=open_selected)
        return dataclasses.replace(selected, excluded=PackedPaths(excluded)) if excluded else self


class ListingLimit:
    """A limit on how many files are listed, for a first look at a source of any size.

    Time is that of the processor, so that what is found hardly depends on what else the machine does.

    Args:
        max_entries: The number of files in all folders, and of entries in tar archives.
        max_seconds: The processor time after which nothing more is listed.
    """

    def __init__(self, max_entries: float = math.inf, max_seconds: float = math.inf) -> None:
        self.remaining, self.deadline = max_entries, time.process_time() + max_seconds
        self.is_reached = False

    def take(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield items until the limit is reached."""
        for item in items:
            if self.remaining <= 0 or time.process_time() > self.deadline:
                self.is_reached = True
                return
            self.remaining -= 1
            yield item

    def thin(self, paths: list[str]) -> list[str]:
        """Return the paths in one folder within the limit: all folders, which end with a slash, and as many files.

        A few files of each folder are always among them, so that no class and no split is missed.
        """
        if time.process_time() > self.deadline:
            self.is_reached = True
            return []
        if len(paths) > self.remaining:
            files = [path for path in paths if not path.endswith("/")]
            # The tables and archives come first, because they have the labels.
            files.sort(key=lambda path: (is_image(path), path))
            kept = max(int(self.remaining), MIN_FILES_PER_FOLDER)
            self.is_reached |= kept < len(files)
            paths = [*files[:kept], *(path for path in paths if path.endswith("/"))]
        self.remaining -= len(paths)
        return paths


NO_LIMIT = ListingLimit()


class Annotation(NamedTuple):
    """The labels that the source assigns to one image."""

    label: str = ""
    split: str = ""
    group: str = ""
    fault: str = ""  # why the image can't be used, if its annotation shows that; else ""
    extra_values: tuple[str, ...] = ()  # values of the additional columns of a table


def normalize_path(name: str) -> str | None:
    """Normalize a relative path to names separated by slashes; return None if it is absolute or contains `..`."""
    parts = name.split("/")
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[/\\]", name) or ".." in name.replace("\\", "/").split("/"):
        return None
    return "/".join(part for part in parts if part not in ("", "."))


def check_encoding(name: str) -> None:
    """Check that the name of a file can be written as UTF-8.

    Raises:
        ConvoyError: If it can't.
    """
    if not name.isascii() and name.encode(errors="replace").decode() != name:
        raise ConvoyError(f"{name!a} has a name that is not UTF-8: rename it")


def is_junk(path: str) -> bool:
    """Check whether a path is hidden, or in a folder that operating systems create."""
    return path.startswith(".") or "/." in path or not JUNK_NAMES.isdisjoint(path.lower().split("/"))


def is_image(path: str) -> bool:
    """Check whether a path has the extension of an image."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def find_split(path: str) -> str:
    """Return the split that a file or else its folder is named after; "" for none.

    Examples of such files are train.csv and test-00000-of-00002.parquet.
    """
    *folders, name = path.split("/")
    return find_split_name(name) or (SPLIT_NAMES.get(folders[-1].lower(), "") if folders else "")


def find_split_name(name: str) -> str:
    """Return the first split whose name occurs as a separate word in `name`; "" for none."""
    match = SPLIT_NAME_PATTERN.search(name.lower())
    return SPLIT_NAMES[match[1]] if match else ""


SPLIT_NAME_PATTERN = re.compile(
    rf"(?<![a-z])({'|'.join(sorted(SPLIT_NAMES, reverse=True))})(?:set|data|images)?(?![a-z])"
)
