"""Table search: the label tables and split lists among the files of a source; any other table is refused."""

import collections
import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence

import pandas as pd
from pathspec import GitIgnoreSpec

from convoy.core.errors import ConvoyError
from convoy.core.text import truncate_names
from convoy.data.image_io import InvalidImageError
from convoy.data.sources.base import SPLIT_NAMES, FileContent, TableConfig
from convoy.data.sources.file_listing import FileSet, check_encoding, find_split, find_split_name, is_image
from convoy.data.sources.label_table import LabelTable
from convoy.data.sources.parquet import ParquetTable, find_image_column, find_label_column, open_parquet
from convoy.data.sources.table_file import (
    CSV_SUFFIXES,
    ID_LIST,
    LIST_SUFFIXES,
    OTHER_TABLE_SUFFIXES,
    SPLIT_LIST_NAME,
    TABLE_SUFFIXES,
    UnknownTableError,
    read_csv,
    read_ids,
    read_jsonl,
    read_list,
    read_parquet,
)

ALL_SUFFIXES = (*TABLE_SUFFIXES, *LIST_SUFFIXES, *OTHER_TABLE_SUFFIXES)
# A folder with more tables or lists has one for each image, which are not read.
MAX_TABLES_PER_FOLDER = 40
# A list of names without the endings of images must name this fraction of the images, or it may be about other names.
MIN_LISTED_FRACTION = 0.9


@dataclasses.dataclass
class FoundTables:
    """The tables among the files of a source."""

    labels: list[LabelTable] = dataclasses.field(default_factory=list)
    splits: list[LabelTable] = dataclasses.field(default_factory=list)  # lists or tables that have splits and no labels
    shards: list[ParquetTable] = dataclasses.field(default_factory=list)  # Parquet files with images
    names: set[str] = dataclasses.field(default_factory=set)  # of all tables that were considered
    notes: list[str] = dataclasses.field(default_factory=list)


def find_tables(file_sets: Sequence[FileSet], config: TableConfig, is_sample: bool = False) -> FoundTables:
    """Find and read the tables of a source.

    Tables are considered at the top, in split folders at the top, and in folders that hold no images. Outer folders
    that contain everything else are descended into.

    Args:
        file_sets: The files outside archives, and those in each archive.
        config: Which file is the table, and the names of its columns.
        is_sample: Whether only some of the files are listed, so that lists may name others.

    Raises:
        ConvoyError: If a table is broken, or in no form that is accepted.
    """
    found, unknown = FoundTables(), []
    image_names = _ImageNames(file_sets)
    for number, files in enumerate(file_sets):
        # A file set without a name is a single file, which is a table.
        candidates = list(_find_candidates(files.paths) if files.name else enumerate(files.paths))
        found.names |= {f"{files.name}{path}" for _, path in candidates}
        chosen = [(index, path) for index, path in candidates if _is_chosen(files, path, config, found.notes)]
        if not chosen:
            continue
        with files.open() as read:
            # Archives are read from their start to their end.
            contents = [(path, _check_content(f"{files.name}{path}", read(index, path))) for index, path in chosen]
        ids = {_folder(path): read_ids(path, content) for path, content in contents if _title(path) == ID_LIST}
        for path, content in contents:
            try:
                rows = _read(f"{files.name}{path}", content, config, image_names, ids.get(_folder(path)), is_sample)
            except UnknownTableError as fault:
                if not _is_list(path) or fault.names_images or (_is_split_list(path) and not is_sample):
                    unknown.append(_refuse(f"{files.name}{path}", str(fault)))
                continue
            if isinstance(rows, ParquetTable):
                found.shards.append(rows)
            elif not _is_list(path) or _is_split_list(path) or image_names.are_meant(rows["path"]):
                table = LabelTable(path, number, _folder(path), find_split(path), rows)
                (found.labels if "label" in rows else found.splits).append(table)
    if unknown:
        raise ConvoyError("\n".join(unknown))
    if config.file and not found.labels and not found.shards:
        raise ConvoyError(
            f"dataset.table.file={config.file} names no table of labels in the source, which has the tables"
            f" {truncate_names(sorted(found.names)) or '(none)'}: correct it in conf/dataset/ (convoy use --table)"
        )
    return found


def _is_chosen(files: FileSet, path: str, config: TableConfig, notes: list[str]) -> bool:
    """Check whether a file is to be read; a note is added if a table is not."""
    name = f"{files.name}{path}"
    check_encoding(name)
    if config.file is not None:
        is_named = GitIgnoreSpec.from_lines([config.file]).match_file(path)
        if not is_named and not _is_list(path):
            notes.append(f"{name} is not used: dataset.table.file={config.file} names another table")
        return is_named or _is_split_list(path) or _title(path) == ID_LIST
    if "submission" in _title(path).lower():
        notes.append(f"{name} has the name of a sample submission, whose labels are only examples: it is not used")
        return False
    return True


def _check_content(name: str, content: FileContent) -> str | bytes:
    if isinstance(content, InvalidImageError):
        raise ConvoyError(f"{name} {content}: replace it with an intact copy")
    return content


def _folder(path: str) -> str:
    return path[: path.rfind("/") + 1]


def _title(path: str) -> str:
    return path.rpartition("/")[2]


def _is_list(path: str) -> bool:
    return path.lower().endswith(LIST_SUFFIXES)


def _is_split_list(path: str) -> bool:
    """Check whether a file has the name of a split list, so that it must not be overlooked."""
    return _is_list(path) and bool(find_split_name(_title(path)) or SPLIT_LIST_NAME.search(_title(path)))


def _refuse(name: str, fault: str) -> str:
    title = _title(name.rpartition(":")[2])
    if _is_list(name):
        return (
            f"{name} {fault}: a list has the path, the name or the id of an image in each line, and a label, a split"
            " or nothing after it; if it is something else, leave it out by dataset.exclude"
            f" (convoy use --exclude {title})"
        )
    return (
        f"{name} {fault}: a table of labels needs path and label, or path and a column for each class; say which"
        f" columns these are by dataset.table (convoy use --table {title} --path COLUMN --label COLUMN, and --group and"
        f" --split if there are such columns), or leave the file out by dataset.exclude (--exclude {title})"
    )


def _read(
    name: str,
    content: str | bytes,
    config: TableConfig,
    image_names: "_ImageNames",
    ids: dict[str, str] | None,
    is_sample: bool,
) -> pd.DataFrame | ParquetTable:
    """Read a table; of a Parquet file with images only the schema.

    Raises:
        ConvoyError: If the file is broken.
        UnknownTableError: If it is in no form that is accepted.
    """
    suffix = name.lower()
    if suffix.endswith(LIST_SUFFIXES):
        # Other lists have ids of something else, such as classes.txt of CUB-200.
        ids = ids if _is_split_list(name) else None
        return read_list(name, content, lambda text: is_sample or text in image_names, ids)
    if suffix.endswith(CSV_SUFFIXES):
        return read_csv(name, content, config, image_names.__contains__)
    if suffix.endswith(".jsonl"):
        return read_jsonl(name, content, config)
    if suffix.endswith(OTHER_TABLE_SUFFIXES):
        raise UnknownTableError("is not in CSV, JSON Lines or Parquet")
    shard = dataclasses.replace(open_parquet(name, content, find_split(name)), columns=config)
    if find_image_column(shard) is None:
        return read_parquet(shard, config)
    if isinstance(content, bytes):
        raise ConvoyError(f"{name} contains images: extract it from the archive")
    find_label_column(shard)
    return shard


class _ImageNames:
    """The names of all images, with and without their endings."""

    def __init__(self, file_sets: Sequence[FileSet]) -> None:
        self.file_sets = file_sets

    @functools.cached_property
    def stems(self) -> collections.Counter[str]:
        names = (path.rpartition("/")[2] for files in self.file_sets for path in files.paths if is_image(path))
        return collections.Counter(name.rpartition(".")[0] for name in names)

    def __contains__(self, text: object) -> bool:
        name = str(text).replace("\\", "/").rpartition("/")[2]
        return is_image(name) or name in self.stems

    def are_meant(self, paths: pd.Series) -> bool:
        """Check whether the names in a list are those of images, and not of something else."""
        if all(map(is_image, paths)):
            return True
        return all(path in self for path in paths) and len(paths) >= MIN_LISTED_FRACTION * self.stems.total()


def _find_candidates(paths: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield index and path of the files that may be label tables or split lists."""
    top = _find_outer_folder(paths)
    image_folders = {path.rpartition("/")[0] for path in paths if is_image(path)}
    tables = [
        (index, path)
        for index, path in enumerate(paths)
        if path.startswith(top) and path.lower().endswith(ALL_SUFFIXES)
    ]
    counts = collections.Counter(_folder(path)[:-1] for _, path in tables)
    for index, path in tables:
        *folders, name = path.removeprefix(top).split("/")
        is_top = not folders or (len(folders) == 1 and folders[0].lower() in SPLIT_NAMES)
        folder = _folder(path)[:-1]
        outer = itertools.accumulate(folder.split("/"), "{}/{}".format)
        is_apart = image_folders.isdisjoint(outer) and counts[folder] <= MAX_TABLES_PER_FOLDER
        is_named = name.lower().endswith(TABLE_SUFFIXES) or _is_split_list(path) or name == ID_LIST
        if is_top or (is_apart and is_named):
            yield index, path


def _find_outer_folder(paths: Iterable[str]) -> str:
    """Return the innermost folder, with a trailing slash, that contains everything; "" if there is none.

    Files directly in the folders around it are ignored unless they may be tables.
    """
    # The folders that contain all previous paths, outermost first, of which at most `max_depth` count.
    common: list[str] = []
    max_depth = sys.maxsize
    previous = ""
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder != previous:
            previous, folders = folder, folder.split("/")
            is_equal = (left == right for left, right in zip(common, folders, strict=False))
            shared = sum(1 for _ in itertools.takewhile(bool, is_equal))
            if shared == len(common):
                common = folders
            elif shared < len(folders):
                max_depth = min(max_depth, shared)
        if name.lower().endswith(ALL_SUFFIXES):
            max_depth = min(max_depth, len(folder.split("/")) if folder else 0)
    return "".join(f"{name}/" for name in common[:max_depth])
