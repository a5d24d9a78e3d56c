"""Label tables: CSV or Parquet files with a row for each image."""

import dataclasses
import io
import itertools
import sys
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa

from convoy.core.errors import ConvoyError, describe_error
from convoy.core.text import truncate_names
from convoy.data.image_io import InvalidImageError
from convoy.data.packed.packed_dataset import MAX_SLICE_VALUES, SPLITS
from convoy.data.sources.base import SPLIT_NAMES, Sample
from convoy.data.sources.file_listing import Annotation, FileSet, find_split_name, is_image, normalize_path
from convoy.data.sources.parquet import ParquetTable, iter_texts

CSV_SUFFIXES = (".csv", ".tsv")
TABLE_SUFFIXES = (*CSV_SUFFIXES, ".parquet")
# Maps each column that is used to the names it may have in a table, in any case. The first one present is taken.
COLUMN_NAMES = {
    "path": ("path", "file_name", "filename", "file", "file_path", "filepath", "image_path", "image", "image_id"),
    "label": ("label", "class", "class_name", "category"),
    "split": ("split",),
    "group": ("group",),
}
SEPARATORS = ",;\t|"
# The first rows that are tried without their first folders; at least one of them should lead to a file.
MAX_TRIED_ROWS = 100


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """A label table found among the files of a file set."""

    title: str  # name in messages: labels.csv
    files: FileSet  # the file set that contains the table
    folder: str  # folder to which its paths are relative: "" or pets/
    split: str  # split of all rows if there is no split column
    rows: pd.DataFrame  # strings; columns path, label, and optionally split, group and others

    @property
    def path_prefix(self) -> str:
        """The prefix of its paths in messages."""
        return f"{self.files.name}{self.folder}"

    @property
    def extra_columns(self) -> list[str]:
        """The columns that convoy itself does not use."""
        return [column for column in self.rows.columns if column not in COLUMN_NAMES]


def find_table_candidates(paths: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield index and path of the files that may be label tables, at the top or in split folders at the top.

    Outer folders that contain everything else are descended into.
    """
    top = _find_outer_folder(paths)
    for index, path in enumerate(paths):
        if path.lower().endswith(TABLE_SUFFIXES) and path.startswith(top):
            *folders, _ = path.removeprefix(top).split("/")
            if not folders or (len(folders) == 1 and folders[0].lower() in SPLIT_NAMES):
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
        if name.lower().endswith(TABLE_SUFFIXES):
            max_depth = min(max_depth, len(folder.split("/")) if folder else 0)
    return "".join(f"{name}/" for name in common[:max_depth])


def has_label_columns(columns: Collection[str]) -> bool:
    """Check whether a table has the columns of a label table."""
    return "label" in columns and "path" in columns


def read_csv(name: str, file: str | bytes) -> pd.DataFrame:
    """Read a CSV file as text: all rows of a label table, but only the column names of any other table.

    Args:
        name: The name of the table in messages.
        file: The path of the file, or its content.

    Returns:
        Strings, with the columns in `COLUMN_NAMES` renamed to its keys; "" for an empty field.

    Raises:
        ConvoyError: If the file is not valid CSV in UTF-8.
    """
    try:
        headers = []
        for separator in SEPARATORS:
            header = _parse_csv(file, separator, nrows=0)
            names = _map_columns(header.columns)
            if has_label_columns(names.values()):
                return _parse_csv(file, separator).rename(columns=names)
            headers.append(header)
        return max(headers, key=lambda header: len(header.columns))
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except UnicodeDecodeError as error:
        raise ConvoyError(f"{name} is not in UTF-8 ({error}): save it as CSV in UTF-8") from error
    except (ValueError, OSError, pd.errors.ParserWarning) as error:
        raise ConvoyError(
            f"{name} is not complete CSV ({describe_error(error)}): put commas between the fields, and quotes around a"
            ' field that has a comma or a quote in it, which is then written ""'
        ) from error


def _parse_csv(file: str | bytes, separator: str, nrows: int | None = None) -> pd.DataFrame:
    source = io.BytesIO(file) if isinstance(file, bytes) else Path(file)
    with warnings.catch_warnings():
        # pandas only warns about rows with too many fields, and drops the extra ones.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        # NA, 007 and true are ordinary labels, and the first column is never an index.
        return pd.read_csv(
            source, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False, nrows=nrows
        ).fillna("")


def read_parquet(table: ParquetTable) -> pd.DataFrame:
    """Read a Parquet table as text, in the same form as `read_csv`."""
    names = _map_columns(table.schema.names)
    if not has_label_columns(names.values()):
        return pd.DataFrame(columns=table.schema.names)
    columns = [field.name for field in table.schema if field.name in names or not pa.types.is_nested(field.type)]
    return pd.DataFrame(iter_texts(table, columns), columns=columns).rename(columns=names)


def _map_columns(columns: Iterable[str]) -> dict[str, str]:
    """Map the columns of a table that are used to the keys of `COLUMN_NAMES`."""
    plain: dict[str, str] = {}
    # An exact match takes precedence over one that ignores case and separators.
    for column in columns:
        plain.setdefault(column, column)
    for column in columns:
        plain.setdefault("_".join(column.lower().replace("-", " ").split()), column)
    found = {key: next((plain[name] for name in names if name in plain), None) for key, names in COLUMN_NAMES.items()}
    return {column: key for key, column in found.items() if column is not None}


def find_extra_columns(tables: Sequence[LabelTable]) -> list[str]:
    """Return the unused columns with few different values, by which images can be divided into slices."""
    values: dict[str, set[str]] = {}
    for table in tables:
        for column in table.extra_columns:
            values.setdefault(column, set()).update(table.rows[column].unique())
    return [column for column, distinct in values.items() if len(distinct) <= MAX_SLICE_VALUES]


def note_hidden_splits(tables: Sequence[LabelTable]) -> list[str]:
    """Return notes about columns that look like splits but have another name."""
    notes = []
    for table in tables:
        for column in [] if "split" in table.rows else table.extra_columns:
            values = set(table.rows[column].str.strip().str.lower().unique()) - {""}
            if values <= SPLIT_NAMES.keys() and len({SPLIT_NAMES[value] for value in values}) > 1:
                notes.append(
                    f"the column {column} of {table.title} has the values {truncate_names(sorted(values))}: to split"
                    " the images by it, rename it to split"
                )
            elif find_split_name(column) and len(values) == 2:
                # For example a column is_test with the values 0 and 1.
                notes.append(
                    f"the column {column} of {table.title} is not used: to split the images by it, add a column split"
                    f" with the values {', '.join(SPLITS)}"
                )
    return notes


def match_labels(
    tables: Sequence[LabelTable], file_sets: Sequence[FileSet], extra_columns: Sequence[str] = ()
) -> tuple[list[dict[str, tuple[Annotation, ...]]], list[Sample]]:
    """Match the rows of label tables to files.

    Args:
        tables: The label tables.
        file_sets: The file sets in which the files are looked up.
        extra_columns: Additional columns to include in the annotations. If several rows name the same file, the values
            of the first row are used.

    Returns:
        For each file set, the annotations of its files by path; and a sample with an error for each row that leads to
        no file.
    """
    paths = [set(files.paths) for files in file_sets]
    annotations: list[dict[str, tuple[Annotation, ...]]] = [{} for _ in file_sets]
    # Images with the same annotations share one object, which saves memory.
    shared: dict[tuple[Annotation, ...], tuple[Annotation, ...]] = {}
    unmatched: dict[tuple[str, Annotation], None] = {}
    for table in tables:
        resolver = _FilePathResolver(table, file_sets, paths)
        for path, row, values in _iter_annotations(table, extra_columns):
            files = resolver.find(path)
            if None in (normalize_path(path), normalize_path(path.replace("\\", "/"))):
                unmatched[path, row._replace(fault=f"is named in {table.title} and points out of the data")] = None
            elif not path:
                unmatched[f"{table.files.name}{table.title}", row._replace(fault="has a row without a path")] = None
            elif not files:
                fault = f"is named in {table.title}, but there is no such file"
                unmatched[f"{table.path_prefix}{path}", row._replace(fault=fault)] = None
            elif resolver.names and len(files) > 1:
                fault = f"is named in {table.title}, but {len(files)} files have this name: add their folders"
                unmatched[f"{table.path_prefix}{path}", row._replace(fault=fault)] = None
            else:
                (file_set, file), *duplicates = files
                # The same path occurs again if an archive is next to the files unpacked from it.
                for other_set, other in duplicates:
                    fault = f"has the path of {file_sets[file_set].name}{file}, to which {table.title} refers: keep one"
                    annotations[other_set].setdefault(other, (Annotation(fault=fault),))
                # There are few different values for many images, so interning them saves memory.
                row = row._replace(extra_values=tuple(sys.intern(value) for value in values))
                rows = _add_annotation(annotations[file_set].get(file, ()), row)
                annotations[file_set][file] = shared.setdefault(rows, rows)
    samples = [Sample(path, row.label, row.split, row.group, InvalidImageError(row.fault)) for path, row in unmatched]
    return annotations, samples


def _add_annotation(rows: tuple[Annotation, ...], row: Annotation) -> tuple[Annotation, ...]:
    """Add an annotation to those of a file, unless it adds nothing new.

    An annotation with a split replaces one that is the same except for the missing split.
    """
    plain = row._replace(split="", extra_values=())
    same = [known for known in rows if known._replace(split="", extra_values=()) == plain]
    if any(known.split == row.split or not row.split for known in same):
        return rows
    return (*(known for known in rows if known.split or known not in same), row)


class _FilePathResolver:
    """A resolver from the paths in a label table to files.

    It uses the first of these rules by which a row leads to a file:

    1. The path is relative to the folder of the table, or to an archive in that folder.
    2. The same without the first folders of the path, which are those in which the table was created.
    3. The path is only the name of an image in any folder, with or without its extension.
    """

    def __init__(self, table: LabelTable, file_sets: Sequence[FileSet], paths: Sequence[set[str]]) -> None:
        self.paths = paths
        self.folders = [(index, table.folder) for index, files in enumerate(file_sets) if files is table.files]
        self.folders += [
            (index, "")
            for index, files in enumerate(file_sets)
            if files is not table.files and files.name.startswith(table.path_prefix)
        ]
        self.names: dict[str, list[tuple[int, str]]] = {}
        self.composed = [_map_composed(file_paths) for file_paths in paths]
        # The number of folders at the beginning of a path that are ignored.
        self.skipped = 0
        if not any(map(self.find, table.rows["path"])):
            self._skip_folders(table.rows["path"].head(MAX_TRIED_ROWS).tolist())
            self.names = {} if self.skipped else self._map_names(file_sets)

    def find(self, path: str) -> list[tuple[int, str]]:
        """Return the index of the file set and the path of the file, or of each file with this name."""
        variants = dict.fromkeys((normalize_path(path), normalize_path(path.replace("\\", "/"))))
        names = [variant.split("/", self.skipped)[-1] for variant in variants if variant]
        candidates = [(index, folder + name) for name in names for index, folder in self.folders]
        found = [(index, file) for index, file in candidates if file in self.paths[index]]
        if not found and not path.isascii():
            composed = [(index, self.composed[index].get(_compose(file))) for index, file in candidates]
            found = [(index, file) for index, file in composed if file]
        return found or self.names.get(path, [])

    def _skip_folders(self, paths: Sequence[str]) -> None:
        """Set `skipped` to the fewest leading folders without which a path leads to a file, or to 0 if none does."""
        for self.skipped in range(1, max((path.replace("\\", "/").count("/") for path in paths), default=0) + 1):
            if any(map(self.find, paths)):
                return
        self.skipped = 0

    def _map_names(self, file_sets: Sequence[FileSet]) -> dict[str, list[tuple[int, str]]]:
        names: dict[str, list[tuple[int, str]]] = {}
        for index, folder in self.folders:
            for path in file_sets[index].paths:
                if path.startswith(folder) and is_image(path):
                    name = path.rpartition("/")[2]
                    for key in (name, name.rpartition(".")[0]):
                        names.setdefault(key, []).append((index, path))
        return names


def _map_composed(paths: Collection[str]) -> dict[str, str]:
    """Map the Unicode-composed form (NFC) of each non-ASCII path to the path as it is written.

    macOS writes an accent as a separate character after its letter.
    """
    return {_compose(path): path for path in paths if not path.isascii()}


def _compose(path: str) -> str:
    return unicodedata.normalize("NFC", path)


def _iter_annotations(table: LabelTable, extra_columns: Sequence[str]) -> Iterator[tuple[str, Annotation, list[str]]]:
    """Yield the path, the annotation and the values of the extra columns for each row that is not empty."""
    columns = [*COLUMN_NAMES, *extra_columns]
    empty = pd.Series("", index=table.rows.index)
    for path, label, name, group, *values in zip(*(table.rows.get(column, empty) for column in columns), strict=True):
        name = name.strip()
        fault = f"has the split {name!r} in {table.title}, which is none of {', '.join(SPLITS)}"
        if not label:
            fault = f"has no label in {table.title}"
        elif not name or name.lower() in SPLIT_NAMES:
            fault = ""
        if path or label:
            split = SPLIT_NAMES.get(name.lower(), "") if "split" in table.rows else table.split
            yield path, Annotation(label, split, group, fault), values
