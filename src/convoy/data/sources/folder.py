"""Data folder: images in class folders, archives or Parquet files, or next to a table of their labels."""

import collections
import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pathspec import GitIgnoreSpec

from convoy.core.errors import ConvoyError
from convoy.core.text import truncate_names
from convoy.data.image_io import InvalidImageError
from convoy.data.sources.archive import ARCHIVE_SUFFIXES, open_archive
from convoy.data.sources.base import EVERYTHING, Sample, Selection, Source
from convoy.data.sources.companions import note_companions
from convoy.data.sources.file_listing import (
    NO_LIMIT,
    Annotation,
    FileSet,
    ListingLimit,
    PackedPaths,
    check_encoding,
    find_split,
    is_image,
    is_junk,
)
from convoy.data.sources.folder_layout import FolderLayout, find_layout
from convoy.data.sources.label_table import (
    LabelTable,
    Matches,
    check_one_label,
    describe_mismatch,
    find_extra_columns,
    match_labels,
    note_hidden_splits,
)
from convoy.data.sources.parquet import ParquetTable, find_classes, iter_samples
from convoy.data.sources.split_list import SplitLists
from convoy.data.sources.table_file import TABLE_SUFFIXES
from convoy.data.sources.table_search import find_tables

UNSUPPORTED_SUFFIXES = (
    ".7z", ".rar", ".zip", ".z01", ".001", ".tar", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".lzma",
    ".arrow", ".feather", ".h5", ".hdf5", ".lmdb", ".mat", ".mdb", ".npy", ".npz", ".pkl", ".tfrec", ".tfrecord",
    ".json", ".jsonl", ".xls", ".xlsx",
)  # fmt: skip
# The end of the fault of an image that no row of a table leads to.
NOT_IN_TABLE = ", so its label is unknown"
FOLDER_FORMS = (
    "folders may be class folders (cat/1.jpg), with split folders around all of them (train/cat/1.jpg) or with images"
    " in them (cat/train/1.jpg); move the images, name them in a labels.csv with the columns path and label, or leave"
    " folders out by dataset.exclude (convoy use --exclude FOLDER/)"
)
NO_MATCHES = Matches([], [], [])
# An error message lists this many files if no file has a label.
MAX_LISTED_FILES = 5

# Returns the annotations of the file at a path; none if the file is not one of the images.
AnnotateFn = Callable[[str], Sequence[Annotation]]


class NoLabelsError(ConvoyError):
    """Error raised when no image has a label; `problems` says why for some of the files, in sentences."""

    def __init__(self, folder: str, problems: Sequence[str]) -> None:
        self.problems = problems[:MAX_LISTED_FILES]
        super().__init__(
            f"{folder}/ holds no images with a label: in the folder or bucket that data.dvc names, put them into one"
            " folder for each class, or beside a labels.csv with the columns path and label; either may be in zip or"
            f" tar archives. Do not put them into {folder}/ itself, which DVC replaces by the content of that folder"
            " or bucket" + "".join(f"\n  {problem}" for problem in self.problems)
        )


def read_folder(data: Path, selection: Selection = EVERYTHING) -> Source:
    """Find the labelled images in a folder or file; each image is read only when iteration reaches it.

    Args:
        data: The data folder, or a single archive, table or Parquet file.
        selection: Which files are images, and which one is the table of labels.

    Returns:
        The source of all images, as `read_file_sets` returns it.
    """
    return read_file_sets(list_file_sets(data), data.name, selection)


def read_file_sets(
    file_sets: list[FileSet], folder: str, selection: Selection = EVERYTHING, is_sample: bool = False
) -> Source:
    """Find the labelled images in file sets; each image is read only when iteration reaches it.

    If there are label tables, only these determine the labels. Otherwise the labels come from Parquet files with images
    and labels, and from class folders: `<class>/...` or `<train|val|test>/<class>/...`, in folders or
    archives. Outer folders that contain everything else are descended into. Lists of splits add to both.

    Args:
        file_sets: The files outside archives, and those in each archive.
        folder: The name of the data folder in messages.
        selection: Which files are images, and which one is the table of labels.
        is_sample: Whether the file sets are only the first part of the source.

    Returns:
        The source of all images, including those whose label is unknown.

    Raises:
        NoLabelsError: If no label is found.
        ConvoyError: If a table or Parquet file is broken, or in no form that docs/data.md lists.
    """
    file_sets = [_select(files, selection) for files in file_sets]
    tables = find_tables(file_sets, selection.table, is_sample)
    lists = SplitLists([] if is_sample else tables.splits, file_sets)
    extra_columns, matches = find_extra_columns(tables.labels), NO_MATCHES
    if tables.labels:
        matches = match_labels(tables.labels, file_sets, extra_columns)
        check_one_label(matches.annotations, tables.labels)
        annotate_fns, notes = _annotate_by_table(tables.labels, matches), note_hidden_splits(tables.labels)
    else:
        annotate_fns, notes = _annotate_by_folder(file_sets, tables.shards), []
    annotate_fns = [lists.apply(number, annotate) for number, annotate in enumerate(annotate_fns)]

    labels, ignored, unlisted, labelled = {sample.label for sample in matches.samples}, [], [], []
    count = len(matches.samples) + sum(shard.count for shard in tables.shards)
    problems = [f"{sample.path} {sample.content!s}" for sample in matches.samples[:3]]
    for files, annotate in zip(file_sets, annotate_fns, strict=True):
        for path in files.paths:
            name = f"{files.name}{path}"
            check_encoding(name)
            annotations = annotate(path)
            if path.lower().endswith(TABLE_SUFFIXES) and name not in tables.names:
                ignored.append(f"{name} is not used: tables of labels must be at the top")
            elif not annotations and path.lower().endswith(UNSUPPORTED_SUFFIXES) and name not in tables.names:
                ignored.append(f"{name} has an unsupported format: extract or convert it")
            if any(not annotation.fault for annotation in annotations):
                labelled.append(path)
            for annotation in annotations:
                count += 1
                labels.add(annotation.label)
                if annotation.fault and len(problems) < 3:
                    problems.append(f"{name} {annotation.fault}")
                if tables.labels and annotation.fault.endswith(NOT_IN_TABLE):
                    unlisted.append(name)
    mismatch = describe_mismatch(tables.labels, matches.unmatched, unlisted)
    classes = list(dict.fromkeys([*find_classes(tables.shards), *sorted(labels - {""})]))
    if not classes:
        problems = problems or [
            f"{files.name}{path} is none of these" for files in file_sets for path in itertools.islice(files.paths, 3)
        ]
        raise NoLabelsError(folder, problems)
    notes = [
        *tables.notes,
        *(note for files in file_sets for note in files.notes),
        *_note_excluded(file_sets),
        *([mismatch.message] if mismatch else []),
        *notes,
        *ignored,
        *note_companions(labelled),
    ]
    samples = _iter_samples(file_sets, annotate_fns, matches.samples, tables.shards)
    return Source(
        classes, count, samples, extra_columns, notes, ", ".join(table.title for table in tables.labels), mismatch
    )


def _select(files: FileSet, selection: Selection) -> FileSet:
    """Return the files that `dataset.include` and `dataset.exclude` leave."""
    if selection.include is None and not selection.exclude:
        return files
    included = None if selection.include is None else GitIgnoreSpec.from_lines(selection.include)
    excluded = GitIgnoreSpec.from_lines(selection.exclude or [])

    def is_selected(path: str) -> bool:
        is_included = included is None or not is_image(path) or included.match_file(path)
        return is_included and not excluded.match_file(path)

    return files.select(is_selected)


def _note_excluded(file_sets: Sequence[FileSet]) -> list[str]:
    paths = [f"{files.name}{path}" for files in file_sets for path in files.excluded]
    verb = "is" if len(paths) == 1 else "are"
    return [f"{truncate_names(paths)} {verb} left out by dataset.include or dataset.exclude"] if paths else []


def reject_links(folder: Path) -> None:
    """Check that a folder, including hidden folders, has no links except links to files in it.

    This is fast, because it runs before a copy that would follow the links.

    Raises:
        ConvoyError: If there are such links; the message lists all of them.
    """
    collections.deque(_scan(folder), maxlen=0)


def list_file_sets(data: Path, limit: ListingLimit = NO_LIMIT) -> list[FileSet]:
    """List the files in a folder and in the archives in it.

    Args:
        data: The data folder, or a single archive, table or Parquet file.
        limit: Only files within this limit are listed.

    Returns:
        The file set of the files outside archives, followed by one for each archive.

    Raises:
        ConvoyError: If there are links that point to anything but a file in the folder, or if an archive is broken.
    """
    if data.is_file():
        with data.open("rb") as file:
            is_table = file.read(4) == b"PAR1" or data.suffix.lower() in TABLE_SUFFIXES
        single_file = FileSet("", [data.name], lambda: contextlib.nullcontext(lambda *_: str(data)))
        return [single_file if is_table else open_archive(data, data.name, limit)]
    archives: list[str] = []
    hidden: list[str] = []
    paths, folder = PackedPaths(_list_files(data, limit, archives, hidden)), str(data)
    notes = [f"{truncate_names(hidden)}: not used, because a folder that contains it is hidden"] if hidden else []
    return [
        FileSet(f"{data.name}/", paths, lambda: contextlib.nullcontext(lambda _, path: f"{folder}/{path}"), notes),
        *(open_archive(data / path, f"{data.name}/{path}", limit) for path in limit.take(archives)),
    ]


def _list_files(data: Path, limit: ListingLimit, archives: list[str], hidden: list[str]) -> Iterator[str]:
    """Yield the files that are neither junk nor archives.

    Archives are appended to `archives`, and images in hidden folders to `hidden`.
    """
    for path in _scan(data, limit):
        if is_junk(path):
            if is_image(path) and any(folder.startswith(".") for folder in path.split("/")[:-1]):
                hidden.append(path)
        elif path.lower().endswith(ARCHIVE_SUFFIXES):
            archives.append(path)
        else:
            yield path


def _scan(folder: Path, limit: ListingLimit = NO_LIMIT) -> Iterator[str]:
    """Yield the sorted paths of all files below a folder, one folder at a time, as there may be very many."""
    root = folder.resolve()
    faults: list[str] = []
    # A stack of folders, which end with a slash, and files; the next one is last.
    stack = ["/"] if folder.is_dir() else []
    while stack:
        path = stack.pop()
        if not path.endswith("/"):
            yield path
            continue
        parent, found = path.removeprefix("/"), []
        try:
            with os.scandir(f"{folder}/{parent}") as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        found.append(f"{parent}{entry.name}/")
                    elif fault := _find_fault(entry, root):
                        faults.append(f"{folder.name}/{parent}{entry.name} {fault}")
                    else:
                        found.append(f"{parent}{entry.name}")
        except OSError as error:
            raise ConvoyError(f"{folder.name}/{parent} can't be read: {error.strerror}") from error
        stack += sorted(limit.thin(found), key=lambda path: path.removesuffix("/"), reverse=True)
    if faults:
        raise ConvoyError("\n".join(sorted(faults)).encode(errors="backslashreplace").decode())


def _find_fault(entry: os.DirEntry, root: Path) -> str:
    """Return why an entry is neither a file nor a link to a file in `root`, "" if it is one."""
    if entry.is_file(follow_symlinks=False):
        return ""
    if not entry.is_symlink():
        return "is not a regular file: remove it"
    link = Path(entry.path)
    try:
        target = link.resolve(strict=True)
        if target.is_file() and target.is_relative_to(root):
            return ""
    # The link is broken or circular.
    except (OSError, RuntimeError):
        pass
    return f"is a link to {link.readlink()}, which is not a file in the data: replace it by the file itself"


def _annotate_by_table(tables: Sequence[LabelTable], matches: Matches) -> list[AnnotateFn]:
    """Return the annotations from tables for each file set."""
    unlisted = (Annotation(fault=f"is not in {' or '.join(table.title for table in tables)}{NOT_IN_TABLE}"),)

    def annotate(annotations: dict[str, tuple[Annotation, ...]], path: str) -> Sequence[Annotation]:
        return annotations.get(path, unlisted if is_image(path) else ())

    by_path = matches.annotations
    if not any(row.split for annotations in by_path for rows in annotations.values() for row in rows):
        by_path = [_add_splits(annotations) for annotations in by_path]
    return [functools.partial(annotate, annotations) for annotations in by_path]


def _add_splits(annotations: dict[str, tuple[Annotation, ...]]) -> dict[str, tuple[Annotation, ...]]:
    """Return the annotations with splits taken from folder names, for tables that assign no splits."""
    layout = find_layout(dict.fromkeys(path.rpartition("/")[0] for path in annotations if "/" in path))

    # The cache makes images with the same annotations share one object, which saves memory.
    @functools.cache
    def add_split(folder: str, rows: tuple[Annotation, ...]) -> tuple[Annotation, ...]:
        return tuple(row._replace(split=layout.find_class_and_split(folder)[1]) for row in rows)

    return {path: add_split(path.rpartition("/")[0], rows) for path, rows in annotations.items()}


def _annotate_by_folder(file_sets: list[FileSet], shards: list[ParquetTable]) -> list[AnnotateFn]:
    """Return the annotations from class folders for each file set.

    The Parquet files in `shards` are among the files and are skipped. Archives may be named after splits.

    Raises:
        ConvoyError: If the folders are in no form that docs/data.md lists.
    """
    skipped = {shard.name for shard in shards}
    splits = [find_split(files.name.removesuffix(":").partition("/")[2]) for files in file_sets]
    layouts = [_find_layout(files, skipped) for files in file_sets]
    for files, layout in zip(file_sets, layouts, strict=True):
        if layout.problem:
            raise ConvoyError(f"{files.name}{layout.problem}: {FOLDER_FORMS}")
    all_splits = {*splits, *(root.split for layout in layouts for root in layout.roots.values())} - {""}
    is_divided = "train" in all_splits and len(all_splits) > 1
    return [
        _make_annotate_fn(files, skipped, layout, split if is_divided else "")
        for files, layout, split in zip(file_sets, layouts, splits, strict=True)
    ]


def _find_layout(files: FileSet, skipped: set[str]) -> FolderLayout:
    """Find the layout of the folders with images, or of all folders with files if no file looks like an image."""
    has_images: dict[str, bool] = {}
    for path in files.paths:
        folder = path.rpartition("/")[0]
        if folder and not has_images.get(folder) and not (skipped and f"{files.name}{path}" in skipped):
            has_images[folder] = is_image(path)
    return find_layout([folder for folder, has in has_images.items() if has] or has_images)


def _make_annotate_fn(files: FileSet, skipped: set[str], layout: FolderLayout, archive_split: str) -> AnnotateFn:
    has_split_folders = not archive_split and any(root.split for root in layout.roots.values())
    of_a_split = " of a split" if has_split_folders else ""
    archive = files.name.rpartition("/")[2].partition(".")[0]
    unlabelled = (Annotation(fault=f"is in no class folder{of_a_split}, so its label is unknown"),)

    @functools.lru_cache(maxsize=1024)
    def annotate_folder(folder: str) -> Sequence[Annotation]:
        label, split = layout.find_class_and_split(folder)
        # For example test_images/1.jpg in test_images.zip: the folder repeats the name of the archive.
        if archive_split and label == archive:
            return ()
        return (Annotation(label, split or archive_split),) if label else ()

    def annotate(path: str) -> Sequence[Annotation]:
        if skipped and f"{files.name}{path}" in skipped:
            return ()
        return annotate_folder(path.rpartition("/")[0]) or (unlabelled if is_image(path) else ())

    return annotate


def _iter_samples(
    file_sets: list[FileSet], annotate_fns: list[AnnotateFn], unmatched: list[Sample], shards: list[ParquetTable]
) -> Iterator[Sample]:
    for files, annotate in zip(file_sets, annotate_fns, strict=True):
        with files.open() as read:
            for index, path in enumerate(files.paths):
                annotations = annotate(path)
                content = read(index, path) if any(not row.fault for row in annotations) else b""
                for label, split, group, fault, extra_values in annotations:
                    result = InvalidImageError(fault) if fault else content
                    yield Sample(f"{files.name}{path}", label, split, group, result, extra_values)
    yield from unmatched
    for shard in shards:
        yield from iter_samples(shard)
