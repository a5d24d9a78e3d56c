"""Tables of labels: a row for each image, in CSV or Parquet."""

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

from convoy.data.image_io import InvalidImageError
from convoy.data.packed_dataset import FEW, SPLITS
from convoy.data.sources.base import SPLIT_WORDS, Sample
from convoy.data.sources.file_listing import Annotation, FileSet, below, is_image, split_word
from convoy.data.sources.parquet import Parquet, texts
from convoy.errors import ConvoyError
from convoy.text import truncate_names

TEXTS = (".csv", ".tsv")
TABLES = (*TEXTS, ".parquet")
# what is used of a table, and the names its column may have, in any case: the first one that is there
USED = {
    "path": ("path", "file_name", "filename", "file", "file_path", "filepath", "image_path", "image", "image_id"),
    "label": ("label", "class", "class_name", "category"),
    "split": ("split",),
    "group": ("group",),
}
SEPARATORS = ",;\t|"
TRIED = 100  # rows, of which one at least should lead to a file


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of labels that lies among files."""

    title: str  # as messages call it: labels.csv
    files: FileSet  # among which it lies
    folder: str  # below which its paths are: "" or pets/
    split: str  # of all rows, where no column says it
    rows: pd.DataFrame  # text; path, label, and perhaps split, group and others

    @property
    def beside(self) -> str:
        """What stands before its paths in messages."""
        return f"{self.files.name}{self.folder}"


def may_be_tables(paths: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Which of some files, by number and path, may be tables: those at the top, or in folders of splits there.

    Folders around all of them are looked through.
    """
    around = _around(paths)
    for index, path in enumerate(paths):
        if path.lower().endswith(TABLES) and path.startswith(around):
            *folders, _ = path.removeprefix(around).split("/")
            if not folders or (len(folders) == 1 and folders[0].lower() in SPLIT_WORDS):
                yield index, path


def _around(paths: Iterable[str]) -> str:
    """The folder, with a slash at its end, around which there are only other folders; "" for none."""
    chain: list[str] = []  # the folders that are looked through, as far as is known
    most = sys.maxsize  # of them
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
    """The rows of a table of labels as they are written; of another table the columns alone."""
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
        said = " ".join(str(error).split())
        raise ConvoyError(
            f"{name} is not whole CSV ({said}): put commas between the fields, and quotes around a field that has"
            ' a comma or a quote in it, which is then written ""'
        ) from error


def _csv(file: str | bytes, separator: str, nrows: int | None = None) -> pd.DataFrame:
    source = io.BytesIO(file) if isinstance(file, bytes) else Path(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # of fields that would be left out
        # NA, 007 and true are labels like others; and the first column is never an index
        return pd.read_csv(
            source, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False, nrows=nrows
        ).fillna("")


def read_parquet(table: Parquet) -> pd.DataFrame:
    """As `read_csv`."""
    meant = _meant(table.schema.names)
    if not holds_labels(meant.values()):
        return pd.DataFrame(columns=table.schema.names)
    columns = [field.name for field in table.schema if field.name in meant or not pa.types.is_nested(field.type)]
    return pd.DataFrame(texts(table, columns), columns=columns).rename(columns=meant)


def _meant(columns: Iterable[str]) -> dict[str, str]:
    """What is used, by the names of its columns."""
    plain: dict[str, str] = {}
    for column in columns:
        plain.setdefault(column, column)  # as it is written goes before what is like it
    for column in columns:
        plain.setdefault("_".join(column.lower().replace("-", " ").split()), column)
    found = {meant: next((plain[name] for name in names if name in plain), None) for meant, names in USED.items()}
    return {column: meant for meant, column in found.items() if column is not None}


def more_columns(tables: Sequence[Table]) -> list[str]:
    """The columns that convoy makes no use of, where they have few values: images can be told apart by them."""
    values: dict[str, set[str]] = {}
    for table in tables:
        for column in table.rows.columns.difference(list(USED), sort=False):
            values.setdefault(column, set()).update(table.rows[column].unique())
    return [column for column, there in values.items() if len(there) <= FEW]


def hidden_splits(tables: Sequence[Table]) -> list[str]:
    """What is said of columns that look like splits and are called something else."""
    notes = []
    for table in tables:
        for column in () if "split" in table.rows else table.rows.columns.difference(list(USED), sort=False):
            words = set(table.rows[column].str.strip().str.lower().unique()) - {""}
            if words <= SPLIT_WORDS.keys() and len({SPLIT_WORDS[word] for word in words}) > 1:
                notes.append(
                    f"the column {column} of {table.title} says {truncate_names(sorted(words))}: call it split if the"
                    " images are to be split so"
                )
            elif split_word(column) and len(words) == 2:  # is_test: 0 or 1
                notes.append(
                    f"the column {column} of {table.title} is not used: if the images are to be split so, give the"
                    f" table a column split that says {', '.join(SPLITS)}"
                )
    return notes


def labels_in(
    tables: Sequence[Table], places: Sequence[FileSet], more: Sequence[str] = ()
) -> tuple[list[dict[str, tuple[Annotation, ...]]], list[Sample]]:
    """What the tables say of the files in each place, by path; and members for the rows that lead to no file.

    `more` are the columns that are told too; of several rows for one file those of the first.
    """
    there = [set(files.paths) for files in places]
    said: list[dict[str, tuple[Annotation, ...]]] = [{} for _ in places]
    shared: dict[
        tuple[Annotation, ...], tuple[Annotation, ...]
    ] = {}  # one object for all images of which the same is said
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
                for elsewhere, same in others_so_called:  # in an archive beside what was unpacked from it
                    fault = f"has the path of {places[place].name}{name}, for which {table.title} is taken: keep one"
                    said[elsewhere].setdefault(same, (Annotation(fault=fault),))
                row = row._replace(more=tuple(sys.intern(value) for value in others))  # few, of many images
                rows = _with(said[place].get(name, ()), row)
                said[place][name] = shared.setdefault(rows, rows)
    return said, [Sample(path, row.label, row.split, row.group, InvalidImageError(row.fault)) for path, row in astray]


def _with(rows: tuple[Annotation, ...], row: Annotation) -> tuple[Annotation, ...]:
    """What is said of a file already, and this where it says more: a split, where all else was said without one."""
    plain = row._replace(split="", more=())
    alike = [known for known in rows if known._replace(split="", more=()) == plain]
    if any(known.split == row.split or not row.split for known in alike):
        return rows
    return (*(known for known in rows if known.split or known not in alike), row)


class _FilePathResolver:
    """The files that the rows of a table may name.

    By their path below the table's folder, or in an archive there. Where no row leads to a file so, by their path
    without the first folders, in which the table was made; else by names that stand in whatever folders, with their
    endings or without.
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
        self.skipped = 0  # of the folders in a path, the first
        if not any(map(self.find, table.rows["path"])):
            self._skip(table.rows["path"].head(TRIED).tolist())
            self.names = {} if self.skipped else self._names(places)

    def find(self, path: str) -> list[tuple[int, str]]:
        """The place and the path of the file, or of several with this name."""
        written = dict.fromkeys((below(path), below(path.replace("\\", "/"))))
        names = [name.split("/", self.skipped)[-1] for name in written if name]
        exact = [(k, folder + name) for name in names for k, folder in self.folders if folder + name in self.there[k]]
        if not exact and not path.isascii():
            alike = [(k, self.composed[k].get(_nfc(folder + name))) for name in names for k, folder in self.folders]
            exact = [(k, file) for k, file in alike if file]
        return exact or self.names.get(path, [])

    def _skip(self, paths: Sequence[str]) -> None:
        """The fewest folders at the beginning without which a path leads to a file; none where none ever does."""
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
    """The files whose names have more than ASCII, by what they are in another writing of the same letters.

    macOS writes an accent apart from its letter.
    """
    return {_nfc(path): path for path in paths if not path.isascii()}


def _nfc(path: str) -> str:
    return unicodedata.normalize("NFC", path)


def _rows(table: Table, more: Sequence[str]) -> Iterator[tuple[str, Annotation, list[str]]]:
    """The path in each row that is not empty, what it says, and what the columns `more` say."""
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
