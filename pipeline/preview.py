"""First look at a source of labelled images: what a second or two shows of its classes, splits and images."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from convoy.core.errors import ConvoyError
from convoy.core.text import truncate_names
from convoy.data.image_io import FORMATS, InvalidImageError, read_size
from convoy.data.sources.archive import ARCHIVE_SUFFIXES
from convoy.data.sources.base import EVERYTHING, FileContent, Sample, Selection, Source
from convoy.data.sources.file_listing import FileSet, ListingLimit, is_image
from convoy.data.sources.folder import NoLabelsError, list_file_sets, read_file_sets
from convoy.data.sources.label_table import MAX_MULTI_LABEL_FRACTION
from convoy.data.sources.table_file import CSV_SUFFIXES
from convoy.data.sources.table_search import ALL_SUFFIXES

MAX_ENTRIES = 10_000
# Processor time, so that what is found hardly depends on what else the machine does.
MAX_LISTING_S = 1.0
MAX_TOTAL_S = 2.0
MAX_OPENED_IMAGES = 100
NOT_READABLE = f"can't be opened as {', '.join(FORMATS)}"


@dataclasses.dataclass(frozen=True)
class Preview:
    """What a first look at a source of labelled images shows."""

    classes: dict[str, int]  # class -> number of images
    splits: dict[str, int]  # train, val, test or "" for none -> number of images
    is_sample: bool  # whether these are only the first images
    loose_files: int  # number of images that are files of their own, neither in archives nor in Parquet files
    height: int  # pixels, median of some images
    width: int  # pixels, median of some images
    is_grey: bool  # whether all of some images are grey
    problems: list[str]  # why images can't be used, in sentences
    notes: list[str]  # warnings about what may be unintended, in sentences
    mismatch: str  # how a table and the files do not meet, in one sentence; "" if they do

    @property
    def count(self) -> int:
        """Number of images that can be used."""
        return sum(self.classes.values())


def preview_source(path: Path, selection: Selection = EVERYTHING) -> Preview:
    """Look at a source of labelled images for a second or two.

    Args:
        path: A folder, an archive or a Parquet file.
        selection: Which files are images, and which one is the table of labels.

    Returns:
        What was found: everything, or a sample of a large source.

    Raises:
        ConvoyError: If there is nothing that convoy can learn from: the source is broken or empty, or has no labels,
            several labels for each image, a single class, or no image that can be opened.
    """
    deadline = time.process_time() + MAX_TOTAL_S
    limit = ListingLimit(MAX_ENTRIES, MAX_LISTING_S)
    file_sets = _list(path, limit)
    count = sum(1 for files in file_sets for _ in files.paths)
    if not count:
        raise ConvoyError(f"{path} is empty: put labelled images there")
    # Reading all images of an archive would take long, so only some are read, at equal distances.
    distance = -(-count // MAX_OPENED_IMAGES)
    try:
        some = [_skip_images(files, distance) for files in file_sets]
        source = read_file_sets(some, path.name, selection, limit.is_reached)
    except NoLabelsError as error:
        raise ConvoyError(
            f"{path} holds no images with a label: put them into one folder for each class, or beside a labels.csv with"
            " the columns path and label; either may be in zip or tar archives"
            + "".join(f"\n  {problem}" for problem in error.problems)
        ) from None
    tally = _count(source, deadline)
    is_complete = tally.is_complete and not limit.is_reached
    mismatch = source.mismatch.message if source.mismatch else ""
    if mismatch and not tally.opened:
        raise ConvoyError(f"{path} holds no image that can be used\n  {mismatch}")
    _check(path, tally, is_complete)
    loose_files = 0 if path.is_file() else sum(map(is_image, file_sets[0].paths))
    notes = [note for note in source.notes if note != mismatch]
    if tally.unreadable:
        opened = len(tally.opened) + len(tally.unreadable)
        notes.append(f"{len(tally.unreadable)} of {opened} images {NOT_READABLE}: {truncate_names(tally.unreadable)}")
    heights, widths, are_grey = zip(*tally.opened, strict=True)
    return Preview(
        classes=tally.classes,
        splits=tally.splits,
        is_sample=not is_complete,
        loose_files=loose_files,
        height=int(np.median(heights)),
        width=int(np.median(widths)),
        is_grey=all(are_grey),
        # In a sample, tables name files that were not listed.
        problems=[] if limit.is_reached else tally.problems,
        notes=notes,
        mismatch=mismatch,
    )


def _list(path: Path, limit: ListingLimit) -> list[FileSet]:
    if path.is_file() and path.suffix.lower() in CSV_SUFFIXES:
        raise ConvoyError(
            f"{path} is a table without images: name the folder of the table and the images, {path.parent}"
        )
    try:
        return list_file_sets(path, limit)
    except ConvoyError as error:
        if path.is_file() and not path.name.lower().endswith(ARCHIVE_SUFFIXES):
            raise ConvoyError(
                f"{path} is neither a folder nor a zip or tar archive nor a Parquet file: extract or convert it"
            ) from error
        raise
    except OSError as error:
        raise ConvoyError(f"{path} can't be read: {error.strerror}") from error


def _skip_images(files: FileSet, distance: int) -> FileSet:
    """Return a file set that reads its tables, one image in `distance`, and nothing (b"") of the others."""

    @contextlib.contextmanager
    def open_some() -> Iterator[Callable[[int, str], FileContent]]:
        with files.open() as read:
            yield (
                lambda index, path: (
                    read(index, path) if index % distance == 0 or path.lower().endswith(ALL_SUFFIXES) else b""
                )
            )

    # A file set without a name is a single table.
    return dataclasses.replace(files, open=open_some) if files.name else files


@dataclasses.dataclass
class _Tally:
    """The images of a source, counted, and the sizes of some of them."""

    classes: dict[str, int]  # class -> number of images
    splits: dict[str, int] = dataclasses.field(default_factory=lambda: collections.defaultdict(int))
    opened: list[tuple[int, int, bool]] = dataclasses.field(default_factory=list)  # height, width, is grey
    unreadable: list[str] = dataclasses.field(default_factory=list)  # paths
    problems: list[str] = dataclasses.field(default_factory=list)  # sentences
    multi_label: list[str] = dataclasses.field(default_factory=list)  # path and two labels
    is_complete: bool = True


def _count(source: Source, deadline: float) -> _Tally:
    """Count the images of a source until the deadline, and open those whose content was read."""
    tally = _Tally(dict.fromkeys(source.classes, 0))
    previous = Sample("", "", "", "", "")
    for sample in source.samples:
        if time.process_time() > deadline and tally.opened:
            tally.is_complete = False
            break
        if isinstance(sample.content, InvalidImageError):
            tally.problems.append(f"{sample.path} {sample.content}")
            continue
        if sample.path == previous.path and sample.label != previous.label:
            tally.multi_label.append(f"{sample.path} ({previous.label}, {sample.label})")
        previous = sample
        tally.classes[sample.label] += 1
        tally.splits[sample.split] += 1
        if isinstance(sample.content, str | bytes) and sample.content and len(tally.opened) < MAX_OPENED_IMAGES:
            try:
                content = sample.content
                tally.opened.append(read_size(content if isinstance(content, bytes) else Path(content).read_bytes()))
            # Pillow raises all kinds of errors for broken files.
            except Exception:
                tally.unreadable.append(sample.path)
    return tally


def _check(path: Path, tally: _Tally, is_complete: bool) -> None:
    """Raise ConvoyError if there is nothing in a source that convoy can learn from."""
    if not tally.opened:
        unreadable = [f"{name} {NOT_READABLE}" for name in tally.unreadable]
        raise ConvoyError("\n  ".join([f"{path} holds no image that can be used", *(tally.problems + unreadable)[:3]]))
    if len(tally.multi_label) > MAX_MULTI_LABEL_FRACTION * sum(tally.classes.values()):
        raise ConvoyError(
            f"{path} holds images with several labels, such as {tally.multi_label[0]}, and convoy learns one label for"
            " an image: keep one label for each image"
        )
    found = [name for name, count in tally.classes.items() if count]
    if len(found) == 1 and is_complete:
        raise ConvoyError(
            f"{path} holds images of one class, {found[0]!r}, and a classifier needs two or more: put the images of"
            " each class into a folder of its own"
        )
