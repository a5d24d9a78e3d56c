"""Data folder: images in class folders, archives or Parquet files, or next to a table of their labels."""

import collections
import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from convoy.core.errors import ConvoyError
from convoy.core.text import truncate_names
from convoy.data.image_io import InvalidImageError
from convoy.data.sources.archive import ARCHIVES, open_archive
from convoy.data.sources.base import Sample, Source
from convoy.data.sources.file_listing import Annotation, FileSet, PackedPaths, is_image, is_junk, split_in
from convoy.data.sources.folder_layout import FolderLayout, find_layout
from convoy.data.sources.label_table import (
    TABLES,
    TEXTS,
    Table,
    hidden_splits,
    holds_labels,
    labels_in,
    may_be_tables,
    more_columns,
    read_csv,
    read_parquet,
)
from convoy.data.sources.parquet import Parquet, classes_in, image_column, label_column, members, open_parquet

UNREAD = (".7z", ".rar", ".zip", ".z01", ".001", ".tar", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".lzma",
          ".arrow", ".feather", ".h5", ".hdf5", ".lmdb", ".mat", ".mdb", ".npy", ".npz", ".pkl", ".tfrec", ".tfrecord",
          ".json", ".jsonl", ".xls", ".xlsx")  # fmt: skip
# An error message lists this many files if no file has a label.
FOUND = 5  # files

# Returns the annotations of the file at a path; none if the file is not one of the images.
AnnotateFn = Callable[[str], Sequence[Annotation]]


def read_folder(data: Path) -> Source:
    """Find the labelled images in a folder or file; each image is read only when iteration reaches it.

    If there are label tables, only these determine the labels. Otherwise the labels come from Parquet files with images
    and labels, and from class folders: `<class>/...` or `<train|val|test>/<class>/...`, in folders or
    archives. Outer folders that contain everything else are descended into.

    Args:
        data: The data folder, or a single archive, table or Parquet file.

    Returns:
        The source of all images, including those whose label is unknown.

    Raises:
        ConvoyError: If no label is found, if there are links that point to anything but a file in the folder, or if
            an archive, table or Parquet file is broken.
    """
    places = _places(data)
    tables, shards, others, looked = _tables(places)
    more = more_columns(tables)
    if tables:
        (says, astray), notes = _by_table(tables, places, more), hidden_splits(tables)
    else:
        (says, notes), astray = _by_folder(places, shards), []
    notes = [
        *(f"{other}: it is not used" for other in others),
        *(note for files in places for note in files.notes),
        *notes,
    ]

    labels, unread = {member.label for member in astray}, []
    count = len(astray) + sum(shard.count for shard in shards)
    found = [*others, *(f"{member.path} {member.content!s}" for member in astray[:3])]
    for files, said in zip(places, says, strict=True):
        for path in files.paths:
            _check_name(f"{files.name}{path}")
            rows = said(path)
            if path.lower().endswith(TABLES) and f"{files.name}{path}" not in looked:
                unread.append(f"{files.name}{path} is not used: tables of labels are looked for at the top alone")
            elif not rows and path.lower().endswith(UNREAD):
                unread.append(f"{files.name}{path} is of a kind that is not read: put there what is in it")
            for row in rows:
                count += 1
                labels.add(row.label)
                if row.fault and len(found) < len(others) + 3:
                    found.append(f"{files.name}{path} {row.fault}")
    classes = list(dict.fromkeys([*classes_in(shards), *sorted(labels - {""})]))
    if not classes:
        found = found or [
            f"{files.name}{path} is none of these" for files in places for path in itertools.islice(files.paths, 3)
        ]
        raise ConvoyError(
            f"{data.name}/ holds no images with a label: in the folder or bucket that data.dvc names, put them into one"
            " folder for each class, or beside a labels.csv with the columns path and label; either may be in zip or"
            f" tar archives. Do not put them into {data.name}/ itself, which DVC replaces by what is there"
            + "".join(f"\n  {line}" for line in found[:FOUND])
        )
    return Source(classes, count, _members(places, says, astray, shards), more, [*notes, *unread])


def refuse_links(folder: Path) -> None:
    """Check that a folder, including hidden folders, has no links except links to files in it.

    This is fast, because it runs before a copy that would follow the links.

    Raises:
        ConvoyError: If there are such links; the message lists all of them.
    """
    collections.deque(_scan(folder), maxlen=0)


def _places(data: Path) -> list[FileSet]:
    """Return the file set of the files outside archives, followed by one for each archive."""
    if data.is_file():
        with data.open("rb") as file:
            is_table = file.read(4) == b"PAR1" or data.suffix.lower() in TABLES
        one_file = FileSet("", [data.name], lambda: contextlib.nullcontext(lambda *_: str(data)))
        return [one_file if is_table else open_archive(data, data.name)]
    archives: list[str] = []
    hidden: list[str] = []
    loose, around = PackedPaths(_loose(data, archives, hidden)), str(data)
    notes = [f"{truncate_names(hidden)}: not used, as a folder around it is hidden"] if hidden else []
    return [
        FileSet(f"{data.name}/", loose, lambda: contextlib.nullcontext(lambda _, path: f"{around}/{path}"), notes),
        *(open_archive(data / path, f"{data.name}/{path}") for path in archives),
    ]


def _loose(data: Path, archives: list[str], hidden: list[str]) -> Iterator[str]:
    """Yield the files that are neither junk nor archives.

    Archives are appended to `archives`, and images in hidden folders to `hidden`.
    """
    for path in _scan(data):
        if is_junk(path):
            if is_image(path) and any(folder.startswith(".") for folder in path.split("/")[:-1]):
                hidden.append(path)
            continue
        if path.lower().endswith(ARCHIVES):
            archives.append(path)
        else:
            yield path


def _scan(folder: Path) -> Iterator[str]:
    """Yield the sorted paths of all files below a folder, one folder at a time, as there may be very many."""
    inside = folder.resolve()
    faults: list[str] = []
    # A stack of folders, which end with a slash, and files; the next one is last.
    waiting = ["/"] if folder.is_dir() else []
    while waiting:
        path = waiting.pop()
        if not path.endswith("/"):
            yield path
            continue
        around, found = path.removeprefix("/"), []
        try:
            with os.scandir(f"{folder}/{around}") as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        found.append(f"{around}{entry.name}/")
                    elif fault := _fault(entry, inside):
                        faults.append(f"{folder.name}/{around}{entry.name} {fault}")
                    else:
                        found.append(f"{around}{entry.name}")
        except OSError as error:
            raise ConvoyError(f"{folder.name}/{around} can't be read: {error.strerror}") from error
        waiting += sorted(found, key=lambda path: path.removesuffix("/"), reverse=True)
    if faults:
        raise ConvoyError("\n".join(sorted(faults)).encode(errors="backslashreplace").decode())


def _fault(entry: os.DirEntry, inside: Path) -> str:
    if entry.is_file(follow_symlinks=False):
        return ""
    if not entry.is_symlink():
        return "is no plain file: take it away"
    link = Path(entry.path)
    try:
        target = link.resolve(strict=True)
        if target.is_file() and target.is_relative_to(inside):
            return ""
    # The link is broken or circular.
    except (OSError, RuntimeError):
        pass
    return (
        f"is a link to {link.readlink()}, which would bring in what is no file in the data: put the file itself there"
    )


def _tables(places: list[FileSet]) -> tuple[list[Table], list[Parquet], list[str], set[str]]:
    """Return the label tables, the Parquet files with images, messages about other tables, and the names of all."""
    tables, shards, others, looked = [], [], [], set()
    for files in places:
        # A file set without a name is a single file, which is a table.
        found = list(may_be_tables(files.paths) if files.name else enumerate(files.paths))
        if not found:
            continue
        with files.opened() as read:
            for index, path in found:
                name = f"{files.name}{path}"
                _check_name(name)
                looked.add(name)
                content = read(index, path)
                if isinstance(content, InvalidImageError):
                    raise ConvoyError(f"{name} {content}: put a sound copy there")
                if path.lower().endswith(TEXTS):
                    rows = read_csv(name, content)
                else:
                    shard = open_parquet(name, content, split_in(path))
                    if image_column(shard) is not None:
                        if isinstance(content, bytes):
                            raise ConvoyError(f"{name} holds images: take it out of the archive")
                        label_column(shard)
                        shards.append(shard)
                        continue
                    rows = read_parquet(shard)
                columns = ", ".join(map(str, rows.columns))
                if not columns:
                    others.append(f"{name} is empty")
                elif not holds_labels(rows.columns):
                    others.append(f"{name} has the columns {columns}, and not path and label")
                elif "submission" in path.lower():
                    others.append(f"{name} is named after a submission, whose labels are mere examples")
                else:
                    tables.append(Table(path, files, path[: path.rfind("/") + 1], split_in(path), rows))
    return tables, shards, others, looked


def _by_table(tables: list[Table], places: list[FileSet], more: list[str]) -> tuple[list[AnnotateFn], list[Sample]]:
    """Return the annotations from tables for each file set, and samples for table rows that match no file."""
    unnamed = (Annotation(fault=f"is not in {' or '.join(table.title for table in tables)}, so its label is unknown"),)

    def says(said: dict[str, tuple[Annotation, ...]], path: str) -> Sequence[Annotation]:
        return said.get(path, unnamed if is_image(path) else ())

    named, astray = labels_in(tables, places, more)
    if not any(row.split for told in named for rows in told.values() for row in rows):
        named = [_with_splits(told) for told in named]
    return [functools.partial(says, said) for said in named], astray


def _with_splits(told: dict[str, tuple[Annotation, ...]]) -> dict[str, tuple[Annotation, ...]]:
    """Return the annotations with splits taken from folder names, for tables that assign no splits."""
    layout = find_layout(dict.fromkeys(path.rpartition("/")[0] for path in told if "/" in path))

    # The cache makes images with the same annotations share one object, which saves memory.
    @functools.cache
    def rows_in(folder: str, rows: tuple[Annotation, ...]) -> tuple[Annotation, ...]:
        return tuple(row._replace(split=layout.said(folder)[1]) for row in rows)

    return {path: rows_in(path.rpartition("/")[0], rows) for path, rows in told.items()}


def _by_folder(places: list[FileSet], shards: list[Parquet]) -> tuple[list[AnnotateFn], list[str]]:
    """Return the annotations from class folders for each file set, and warnings about ambiguous folders.

    The Parquet files in `shards` are among the files and are skipped. Archives may be named after splits.
    """
    apart = {shard.name for shard in shards}
    splits = [split_in(files.name.removesuffix(":").partition("/")[2]) for files in places]
    layouts = [_layout(files, apart) for files in places]
    there = {*splits, *(root.split for layout in layouts for root in layout.roots.values())} - {""}
    given = "train" in there and len(there) > 1
    says = [
        _by_folder_in(files, apart, layout, split if given else "")
        for files, layout, split in zip(places, layouts, splits, strict=True)
    ]
    return says, list(dict.fromkeys(note for layout in layouts for note in layout.notes))


def _layout(files: FileSet, apart: set[str]) -> FolderLayout:
    """Find the layout of the folders with images, or of all folders with files if no file looks like an image."""
    has_images: dict[str, bool] = {}
    for path in files.paths:
        folder = path.rpartition("/")[0]
        if folder and not has_images.get(folder) and not (apart and f"{files.name}{path}" in apart):
            has_images[folder] = is_image(path)
    return find_layout([folder for folder, has in has_images.items() if has] or has_images)


def _by_folder_in(files: FileSet, apart: set[str], layout: FolderLayout, split: str) -> AnnotateFn:
    in_splits = "" if split or not any(root.split for root in layout.roots.values()) else " of a split"
    archive = files.name.rpartition("/")[2].partition(".")[0]
    unlabelled = (Annotation(fault=f"lies in no class folder{in_splits}, so its label is unknown"),)

    @functools.lru_cache(maxsize=1024)
    def says_folder(folder: str) -> Sequence[Annotation]:
        label, given = layout.said(folder)
        # For example test_images/1.jpg in test_images.zip: the folder repeats the name of the archive.
        if split and label == archive:
            return ()
        return (Annotation(label, given or split),) if label else ()

    def says(path: str) -> Sequence[Annotation]:
        if apart and f"{files.name}{path}" in apart:
            return ()
        return says_folder(path.rpartition("/")[0]) or (unlabelled if is_image(path) else ())

    return says


def _check_name(name: str) -> None:
    if not name.isascii() and name.encode(errors="replace").decode() != name:
        raise ConvoyError(f"{name!a} has a name that is not UTF-8: rename it")


def _members(
    places: list[FileSet], says: list[AnnotateFn], astray: list[Sample], shards: list[Parquet]
) -> Iterator[Sample]:
    for files, said in zip(places, says, strict=True):
        with files.opened() as read:
            for index, path in enumerate(files.paths):
                rows = said(path)
                content = read(index, path) if [row for row in rows if not row.fault] else b""
                for label, split, group, fault, more in rows:
                    shown = InvalidImageError(fault) if fault else content
                    yield Sample(f"{files.name}{path}", label, split, group, shown, more)
    yield from astray
    for shard in shards:
        yield from members(shard)
