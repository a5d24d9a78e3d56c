"""Tables of labels: a row for each image, in CSV or Parquet."""

import dataclasses
import io
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa

from convoy.config import ConvoyError
from convoy.datasets.files import SPLIT_WORDS, Files, Said, below
from convoy.datasets.packed import FEW
from convoy.datasets.parquet import Parquet, texts
from convoy.datasets.source import SPLITS, Member
from convoy.images import BadImage

TABLES = (".csv", ".parquet")
PATHS = ("path", "file_name")  # the column that names the files is called one of these
USED = (*PATHS, "label", "split", "group")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of labels that lies among files."""

    title: str  # as messages call it: labels.csv
    files: Files  # among which it lies
    folder: str  # below which its paths are: "" or pets/
    split: str  # of all rows, where no column says it
    rows: pd.DataFrame  # text; path or file_name, label, and perhaps split, group and others


def may_be_tables(paths: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Which of some files, by number and path, may be tables: those at the top, or in folders of splits there.

    A folder around all of them is looked through.
    """
    around = ""
    tops = {path.partition("/")[0] for path in paths if "/" in path}
    if len(tops) == 1 and not any(path.lower().endswith(TABLES) for path in paths if "/" not in path):
        around = f"{tops.pop()}/"
    for index, path in enumerate(paths):
        if path.lower().endswith(TABLES) and path.startswith(around):
            *folders, _ = path.removeprefix(around).split("/")
            if not folders or (len(folders) == 1 and folders[0].lower() in SPLITS):
                yield index, path


def holds_labels(rows: pd.DataFrame) -> bool:
    return "label" in rows and any(column in rows for column in PATHS)


def read_csv(name: str, file: str | bytes) -> pd.DataFrame:
    """The rows of a table of labels as they are written; of another table the columns alone."""
    try:
        header = _csv(file, nrows=0)
        return _csv(file) if holds_labels(header) else header
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


def _csv(file: str | bytes, nrows: int | None = None) -> pd.DataFrame:
    source = io.BytesIO(file) if isinstance(file, bytes) else Path(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # of fields that would be left out
        # NA, 007 and true are labels like others; and the first column is never an index
        return pd.read_csv(
            source, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False, nrows=nrows
        ).fillna("")


def read_parquet(table: Parquet) -> pd.DataFrame:
    """As `read_csv`."""
    rows = pd.DataFrame(columns=table.schema.names)
    if not holds_labels(rows):
        return rows
    columns = [field.name for field in table.schema if field.name in USED or not pa.types.is_nested(field.type)]
    return pd.DataFrame(texts(table, columns), columns=columns)


def more_columns(tables: Sequence[Table]) -> list[str]:
    """The columns that convoy makes no use of, where they have few values: images can be told apart by them."""
    values: dict[str, set[str]] = {}
    for table in tables:
        for column in table.rows.columns.difference(list(USED), sort=False):
            values.setdefault(column, set()).update(table.rows[column].unique())
    return [column for column, there in values.items() if len(there) <= FEW]


def labels_in(
    tables: Sequence[Table], places: Sequence[Files], more: Sequence[str] = ()
) -> tuple[list[dict[str, tuple[Said, ...]]], list[Member]]:
    """What the tables say of the files in each place, by path; and members for the rows that lead to no file.

    `more` are the columns that are told too; of several rows for one file those of the first.

    A row may also name a file in an archive that lies beside its table, by the path in the archive.
    """
    there = [set(files.paths) for files in places]
    said: list[dict[str, tuple[Said, ...]]] = [{} for _ in places]
    shared: dict[tuple[Said, ...], tuple[Said, ...]] = {}  # one object for all images of which the same is said
    astray: dict[tuple[str, Said], None] = {}
    for table in tables:
        beside = f"{table.files.name}{table.folder}"
        near = [(place, table.folder) for place, files in enumerate(places) if files is table.files]
        near += [(place, "") for place, files in enumerate(places) if files.name.rpartition("/")[0] + "/" == beside]
        for path, row, others in _rows(table, more):
            names = [below(path), below(path.replace("\\", "/"))]
            files = [(k, folder + name) for name in names if name for k, folder in near if folder + name in there[k]]
            if None in names:
                astray[path, row._replace(fault=f"is named in {table.title} and points out of the data")] = None
            elif not path:
                astray[f"{table.files.name}{table.title}", row._replace(fault="has a row without a path")] = None
            elif not files:
                fault = f"is named in {table.title}, but there is no such file"
                astray[f"{beside}{path}", row._replace(fault=fault)] = None
            else:
                place, name = files[0]
                rows = said[place].get(name, ())
                if row not in [known._replace(more=()) for known in rows]:
                    row = row._replace(more=tuple(sys.intern(value) for value in others))  # few, of many images
                    said[place][name] = shared.setdefault((*rows, row), (*rows, row))
    return said, [Member(path, row.label, row.split, row.group, BadImage(row.fault)) for path, row in astray]


def _rows(table: Table, more: Sequence[str]) -> Iterator[tuple[str, Said, list[str]]]:
    """The path in each row that is not empty, what it says, and what the columns `more` say."""
    columns = [next(column for column in PATHS if column in table.rows), *USED[len(PATHS) :], *more]
    empty = pd.Series("", index=table.rows.index)
    for path, label, word, group, *others in zip(*(table.rows.get(column, empty) for column in columns), strict=True):
        fault = f"has the split {word!r} in {table.title}, which is none of {SPLIT_WORDS}"
        if not label:
            fault = f"has no label in {table.title}"
        elif not word or word.lower() in SPLITS:
            fault = ""
        if path or label:
            split = SPLITS.get(word.lower(), "") if "split" in table.rows else table.split
            yield path, Said(label, split, group, fault), others
