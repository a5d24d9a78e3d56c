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
from convoy.data.packed.packed_dataset import FEW, SPLITS
from convoy.data.sources.base import SPLIT_WORDS, Sample
from convoy.data.sources.file_listing import Annotation, FileSet, below, is_image, split_word
from convoy.data.sources.parquet import Parquet, texts

TEXTS = (".csv", ".tsv")
TABLES = (*TEXTS, ".parquet")
# Maps each column that is used to the names it may have in a table, in any case. The first one present is taken.
USED = {
    "path": ("path", "file_name", "filename", "file", "file_path", "filepath", "image_path", "image", "image_id"),
    "label": ("label", "class", "class_name", "category"),
    "split": ("split",),
    "group": ("group",),
}
SEPARATORS = ",;\t|"
# The first rows that are tried without their first folders; at least one of them should lead to a file.
TRIED = 100  # rows


@dataclasses.dataclass(frozen=True)
class Table:
    """A label table found among the files of a file set."""

    title: str  # name in messages: labels.csv
    files: FileSet  # the file set that contains the table
    folder: str  # folder to which its paths are relative: "" or pets/
    split: str  # split of all rows if there is no split column
    rows: pd.DataFrame  # strings; columns path, label, and optionally split, group and others

    @property
    def beside(self) -> str:
        """The prefix of its paths in messages."""
        return f"{self.files.name}{self.folder}"


def may_be_tables(paths: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield index and path of the files that may be label tables, at the top or in split folders at the top.

    Outer folders that contain everything else are descended into.
    """
    around = _around(paths)
    for index, path in enumerate(paths):
        if path.lower().endswith(TABLES) and path.startswith(around):
            *folders, _ = path.removeprefix(around).split("/")
            if not folders or (len(folders) == 1 and folders[0].lower() in SPLIT_WORDS):
                yield index, path


def _around(paths: Iterable[str]) -> str:
    """Return the innermost folder, with a trailing slash, that contains everything; "" if there is none.

    Files directly in the folders around it are ignored unless they may be tables.
    """
    # The folders that contain everything seen so far, outermost first, of which at most `most` count.
    chain: list[str] = []
    most = sys.maxsize
    seen = ""
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder != seen:
            seen, folders = folder, folder.split("/")
            alike = sum(
                1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chain, folders, strict=False))
            )
            if alike == len(chain):
                chain = folders
            elif alike < len(folders):
                most = min(most, alike)
        if name.lower().endswith(TABLES):
            most = min(most, len(folder.split("/")) if folder else 0)
    return "".join(f"{name}/" for name in chain[:most])


def holds_labels(columns: Collection[str]) -> bool:
    return "label" in columns and "path" in columns


def read_csv(name: str, file: str | bytes) -> pd.DataFrame:
    """Read a CSV file as text: all rows of a label table, but only the column names of any other table.

    Args:
        name: The name of the table in messages.
        file: The path of the file, or its content.

    Returns:
        Strings, with the columns in `USED` renamed to its keys; "" for an empty field.

    Raises:
        ConvoyError: If the file is not valid CSV in UTF-8.
    """
    try:
        headers = []
        for separator in SEPARATORS:
            header = _csv(file, separator, nrows=0)
            meant = _meant(header.columns)
            if holds_labels(meant.values()):
                return _csv(file, separator).rename(columns=meant)
            headers.append(header)
        return max(headers, key=lambda header: len(header.columns))
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except UnicodeDecodeError as error:
        raise ConvoyError(f"{name} is not in UTF-8 ({error}): save it as CSV in UTF-8") from error
    except (ValueError, OSError, pd.errors.ParserWarning) as error:
        raise ConvoyError(
            f"{name} is not whole CSV ({describe_error(error)}): put commas between the fields, and quotes around a"
            ' field that has a comma or a quote in it, which is then written ""'
        ) from error


def _csv(file: str | bytes, separator: str, nrows: int | None = None) -> pd.DataFrame:
    source = io.BytesIO(file) if isinstance(file, bytes) else Path(file)
    with warnings.catch_warnings():
        # pandas only warns about rows with too many fields, and drops the extra ones.
        warnings.simplefilter("error", pd.errors.ParserWarning)
        # NA, 007 and true are ordinary labels, and the first column is never an index.
        return pd.read_csv(
            source, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False, nrows=nrows
        ).fillna("")


def read_parquet(table: Parquet) -> pd.DataFrame:
    """Read a Parquet table as text, in the same form as `read_csv`."""
    meant = _meant(table.schema.names)
    if not holds_labels(meant.values()):
        return pd.DataFrame(columns=table.schema.names)
    columns = [field.name for field in table.schema if field.name in meant or not pa.types.is_nested(field.type)]
    return pd.DataFrame(texts(table, columns), columns=columns).rename(columns=meant)


def _meant(columns: Iterable[str]) -> dict[str, str]:
    """Map the columns of a table that are used to the keys of `USED`."""
    plain: dict[str, str] = {}
    # An exact match takes precedence over one that ignores case and separators.
    for column in columns:
        plain.setdefault(column, column)
    for column in columns:
        plain.setdefault("_".join(column.lower().replace("-", " ").split()), column)
    found = {meant: next((plain[name] for name in names if name in plain), None) for meant, names in USED.items()}
    return {column: meant for meant, column in found.items() if column is not None}


def more_columns(tables: Sequence[Table]) -> list[str]:
    """Return the unused columns with at most `FEW` different values, by which images can be divided into slices."""
    values: dict[str, set[str]] = {}
    for table in tables:
        for column in table.rows.columns.difference(list(USED), sort=False):
            values.setdefault(column, set()).update(table.rows[column].unique())
    return [column for column, there in values.items() if len(there) <= FEW]


def hidden_splits(tables: Sequence[Table]) -> list[str]:
    """Return warnings about columns that look like splits but have another name."""
    notes = []
    for table in tables:
        for column in () if "split" in table.rows else table.rows.columns.difference(list(USED), sort=False):
            words = set(table.rows[column].str.strip().str.lower().unique()) - {""}
            if words <= SPLIT_WORDS.keys() and len({SPLIT_WORDS[word] for word in words}) > 1:
                notes.append(
                    f"the column {column} of {table.title} says {truncate_names(sorted(words))}: call it split if the"
                    " images are to be split so"
                )
            elif split_word(column) and len(words) == 2:
                # For example a column is_test with the values 0 and 1.
                notes.append(
                    f"the column {column} of {table.title} is not used: if the images are to be split so, give the"
                    f" table a column split that says {', '.join(SPLITS)}"
                )
    return notes


def labels_in(
    tables: Sequence[Table], places: Sequence[FileSet], more: Sequence[str] = ()
) -> tuple[list[dict[str, tuple[Annotation, ...]]], list[Sample]]:
    """Match the rows of label tables to files.

    Args:
        tables: The label tables.
        places: The file sets in which the files are looked up.
        more: Additional columns to include in the annotations. If several rows name the same file, the values of the
            first row are used.

    Returns:
        For each file set, the annotations of its files by path; and a sample with an error for each row that leads to
        no file.
    """
    there = [set(files.paths) for files in places]
    said: list[dict[str, tuple[Annotation, ...]]] = [{} for _ in places]
    # Images with the same annotations share one object, which saves memory.
    shared: dict[tuple[Annotation, ...], tuple[Annotation, ...]] = {}
    astray: dict[tuple[str, Annotation], None] = {}
    for table in tables:
        near = _FilePathResolver(table, places, there)
        for path, row, others in _rows(table, more):
            files = near.find(path)
            if None in (below(path), below(path.replace("\\", "/"))):
                astray[path, row._replace(fault=f"is named in {table.title} and points out of the data")] = None
            elif not path:
                astray[f"{table.files.name}{table.title}", row._replace(fault="has a row without a path")] = None
            elif not files:
                fault = f"is named in {table.title}, but there is no such file"
                astray[f"{table.beside}{path}", row._replace(fault=fault)] = None
            elif near.names and len(files) > 1:
                fault = f"is named in {table.title}, and {len(files)} files are called so: write their folders, too"
                astray[f"{table.beside}{path}", row._replace(fault=fault)] = None
            else:
                (place, name), *others_so_called = files
                # The same path occurs again if an archive is next to the files unpacked from it.
                for elsewhere, same in others_so_called:
                    fault = f"has the path of {places[place].name}{name}, for which {table.title} is taken: keep one"
                    said[elsewhere].setdefault(same, (Annotation(fault=fault),))
                # There are few different values for many images, so interning them saves memory.
                row = row._replace(more=tuple(sys.intern(value) for value in others))
                rows = _with(said[place].get(name, ()), row)
                said[place][name] = shared.setdefault(rows, rows)
    return said, [Sample(path, row.label, row.split, row.group, InvalidImageError(row.fault)) for path, row in astray]


def _with(rows: tuple[Annotation, ...], row: Annotation) -> tuple[Annotation, ...]:
    """Add an annotation to those of a file, unless it adds nothing new.

    An annotation with a split replaces one that is the same except for the missing split.
    """
    plain = row._replace(split="", more=())
    alike = [known for known in rows if known._replace(split="", more=()) == plain]
    if any(known.split == row.split or not row.split for known in alike):
        return rows
    return (*(known for known in rows if known.split or known not in alike), row)


class _FilePathResolver:
    """A resolver from the paths in a label table to files.

    It uses the first of these rules by which a row leads to a file:

    1. The path is relative to the folder of the table, or to an archive in that folder.
    2. The same without the first folders of the path, which are those in which the table was created.
    3. The path is only the name of an image in any folder, with or without its extension.
    """

    def __init__(self, table: Table, places: Sequence[FileSet], there: Sequence[set[str]]) -> None:
        self.there = there
        self.folders = [(place, table.folder) for place, files in enumerate(places) if files is table.files]
        self.folders += [
            (place, "")
            for place, files in enumerate(places)
            if files is not table.files and files.name.startswith(table.beside)
        ]
        self.names: dict[str, list[tuple[int, str]]] = {}
        self.composed = [_composed(paths) for paths in there]
        # The number of folders at the beginning of a path that are ignored.
        self.skipped = 0
        if not any(map(self.find, table.rows["path"])):
            self._skip(table.rows["path"].head(TRIED).tolist())
            self.names = {} if self.skipped else self._names(places)

    def find(self, path: str) -> list[tuple[int, str]]:
        """Return the index of the file set and the path of the file, or of each file with this name."""
        written = dict.fromkeys((below(path), below(path.replace("\\", "/"))))
        names = [name.split("/", self.skipped)[-1] for name in written if name]
        exact = [(k, folder + name) for name in names for k, folder in self.folders if folder + name in self.there[k]]
        if not exact and not path.isascii():
            alike = [(k, self.composed[k].get(_nfc(folder + name))) for name in names for k, folder in self.folders]
            exact = [(k, file) for k, file in alike if file]
        return exact or self.names.get(path, [])

    def _skip(self, paths: Sequence[str]) -> None:
        """Set `skipped` to the fewest leading folders without which a path leads to a file, or to 0 if none does."""
        for self.skipped in range(1, max((path.replace("\\", "/").count("/") for path in paths), default=0) + 1):
            if any(map(self.find, paths)):
                return
        self.skipped = 0

    def _names(self, places: Sequence[FileSet]) -> dict[str, list[tuple[int, str]]]:
        names: dict[str, list[tuple[int, str]]] = {}
        for place, folder in self.folders:
            for path in places[place].paths:
                if path.startswith(folder) and is_image(path):
                    name = path.rpartition("/")[2]
                    for key in (name, name.rpartition(".")[0]):
                        names.setdefault(key, []).append((place, path))
        return names


def _composed(paths: Collection[str]) -> dict[str, str]:
    """Map the Unicode-composed form (NFC) of each non-ASCII path to the path as it is written.

    macOS writes an accent as a separate character after its letter.
    """
    return {_nfc(path): path for path in paths if not path.isascii()}


def _nfc(path: str) -> str:
    return unicodedata.normalize("NFC", path)


def _rows(table: Table, more: Sequence[str]) -> Iterator[tuple[str, Annotation, list[str]]]:
    """Yield the path, the annotation and the values of the columns `more` for each row that is not empty."""
    columns = [*USED, *more]
    empty = pd.Series("", index=table.rows.index)
    for path, label, word, group, *others in zip(*(table.rows.get(column, empty) for column in columns), strict=True):
        word = word.strip()
        fault = f"has the split {word!r} in {table.title}, which is none of {', '.join(SPLITS)}"
        if not label:
            fault = f"has no label in {table.title}"
        elif not word or word.lower() in SPLIT_WORDS:
            fault = ""
        if path or label:
            split = SPLIT_WORDS.get(word.lower(), "") if "split" in table.rows else table.split
            yield path, Annotation(label, split, group, fault), others
