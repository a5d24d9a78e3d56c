"""Table file: a CSV, JSON Lines, Parquet or text file with a row for each image, read as text."""

import collections
import io
import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from convoy.core.errors import ConvoyError, describe_error
from convoy.core.text import truncate_names
from convoy.data.sources.base import SPLIT_NAMES, TableConfig
from convoy.data.sources.file_listing import IMAGE_SUFFIXES, find_split
from convoy.data.sources.parquet import ParquetTable, iter_texts

CSV_SUFFIXES = (".csv", ".tsv")
TABLE_SUFFIXES = (*CSV_SUFFIXES, ".jsonl", ".parquet")
LIST_SUFFIXES = (".txt", ".lst")
# Tables that are refused rather than overlooked.
OTHER_TABLE_SUFFIXES = (".arrow", ".feather", ".json", ".ods", ".xls", ".xlsx")
# Maps each column that is used to the names it may have in a table, in any case. The first one present is taken.
COLUMN_NAMES = {
    "path": ("path", "file_name", "filename", "file", "file_path", "filepath", "image_path", "image", "image_id"),
    "label": ("label", "class", "class_name", "category"),
    "split": ("split",),
    "group": ("group",),
}
SEPARATORS = ",;\t|"
# The values of a one-hot table, in lower case.
ONE_HOT_VALUES = {"0": 0, "0.0": 0, "-1": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}
# The path at the start of a line of a list, with or without quotes: up to the ending of an image, else up to a space.
LINE = re.compile(
    rf'"?(?P<path>.+?(?:{"|".join(map(re.escape, IMAGE_SUFFIXES))})|[^\s,;"]+)"?(?:[\s,;]+(?P<rest>.*))?', re.IGNORECASE
)
# CUB-200 writes 1 for a training image and 0 for a test image into this file.
TRAIN_TEST_SPLIT = re.compile(r"train.?test", re.IGNORECASE)
ID_LIST = "images.txt"
SPLIT_LIST_NAME = re.compile("split|partition", re.IGNORECASE)
# Labels with one of these between two other labels are several labels.
LABEL_SEPARATORS = "|;,"
MAX_LISTED_COLUMNS = 30

IsImageName = Callable[[str], bool]


class UnknownTableError(Exception):
    """Error for a file that is no label table and no split list; its message says what was found instead.

    Args:
        message: What was found.
        names_images: Whether the file names images, so that it must not be overlooked.
    """

    def __init__(self, message: str, names_images: bool = False) -> None:
        super().__init__(message)
        self.names_images = names_images


def read_csv(name: str, file: str | bytes, config: TableConfig, is_image_name: IsImageName) -> pd.DataFrame:
    """Read a CSV file, or a list in such a file, as text.

    Args:
        name: The name of the table in messages.
        file: The path of the file, or its content.
        config: The names of its columns.
        is_image_name: Whether a text is the path or the name of an image.

    Returns:
        The columns path and label or split, and others; "" for an empty field.

    Raises:
        ConvoyError: If the file is not valid CSV in UTF-8.
        UnknownTableError: If it has other columns.
    """
    try:
        first_line = _read_text(name, file, max_lines=1)
        if (line := LINE.match(first_line)) and is_image_name(line["path"]):
            return read_list(name, file, is_image_name)
        headers = [_parse_csv(file, separator, nrows=0) for separator in SEPARATORS]
        complete = [_is_label_table(_map_columns(header.columns, config)) for header in headers]
        chosen = complete.index(True) if any(complete) else max(range(4), key=lambda k: len(headers[k].columns))
        _check_columns(headers[chosen].columns, config)
        if "path" not in _map_columns(headers[chosen].columns, config):
            raise UnknownTableError(_describe_columns(headers[chosen].columns))
        return select_columns(name, _parse_csv(file, SEPARATORS[chosen]), config)
    except pd.errors.EmptyDataError:
        raise UnknownTableError("is empty") from None
    except UnicodeDecodeError as error:
        raise _not_utf8_error(name, error) from error
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
        table = pd.read_csv(
            source, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False, nrows=nrows
        ).fillna("")
    return table.rename(columns=str.strip)


def read_jsonl(name: str, file: str | bytes, config: TableConfig) -> pd.DataFrame:
    """Read a file with a JSON object in each line as text, in the same form as `read_csv`."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_read_text(name, file).splitlines(), start=1):
        try:
            if line.strip():
                rows.append({str(key): value for key, value in json.loads(line).items()})
        except (ValueError, AttributeError):
            raise ConvoyError(f"{name} has no JSON object in line {number}: write one for each image") from None
    columns = dict.fromkeys(key for row in rows for key in row)
    used = _map_columns(columns, config)
    for row in rows:
        if isinstance(values := row.get(used.get("label", "")), list) and len(values) > 1:
            raise multi_label_error(name, f"{row.get(used.get('path', ''))} ({', '.join(map(str, values))})")
    flat = [
        key for key in columns if key in used.values() or not any(isinstance(row.get(key), dict | list) for row in rows)
    ]
    return select_columns(
        name, pd.DataFrame([[_to_text(row.get(key)) for key in flat] for row in rows], columns=flat), config
    )


def _to_text(value: Any) -> str:
    return "" if value is None or value == [] else str(value[0] if isinstance(value, list) else value)


def read_parquet(table: ParquetTable, config: TableConfig) -> pd.DataFrame:
    """Read a Parquet table as text, in the same form as `read_csv`."""
    used = set(_map_columns(table.schema.names, config).values())
    columns = [field.name for field in table.schema if field.name in used or not pa.types.is_nested(field.type)]
    return select_columns(table.name, pd.DataFrame(iter_texts(table, columns), columns=columns), config)


def read_list(
    name: str, file: str | bytes, is_image_name: IsImageName, ids: dict[str, str] | None = None
) -> pd.DataFrame:
    """Read a list without a header: a path, a name or an id in each line, and a label or a split after it.

    Args:
        name: The name of the list in messages.
        file: The path of the file, or its content.
        is_image_name: Whether a text is the path or the name of an image.
        ids: Maps ids to paths, as the list images.txt beside this one.

    Returns:
        The columns path, and label or split.

    Raises:
        UnknownTableError: If the lines are not of this form, or name no images.
    """
    rows = [(line["path"], (line["rest"] or "").strip(' \t,;"')) for line in _match_lines(_read_text(name, file))]
    paths = [(ids or {}).get(path, path) for path, _ in rows]
    values = [value for _, value in rows]
    if not any(map(is_image_name, paths)):
        shown = ", ".join(repr(path) for path in paths[:3])
        raise UnknownTableError(f"has no names of images, but {shown}" if rows else "is empty")
    # Labels may have spaces and commas in them.
    if several := next((value for value in values if "\t" in value), ""):
        raise UnknownTableError(f"has several values after the names of images, such as {several!r}", names_images=True)
    title = name.rpartition("/")[2]
    if SPLIT_LIST_NAME.search(title):
        names = {"1": "train", "0": "test"} if TRAIN_TEST_SPLIT.search(title) else {}
        splits = [names.get(value, SPLIT_NAMES.get(value.lower(), "")) for value in values]
        if not all(splits):
            raise UnknownTableError(f"has the splits {truncate_names(sorted(set(values)))}, and not train, val, test")
        return pd.DataFrame({"path": paths, "split": splits}, dtype=str)
    if not any(values):
        if not (split := find_split(title)):
            raise UnknownTableError("has names of images without labels, and no split in its own name")
        return pd.DataFrame({"path": paths, "split": split}, dtype=str)
    return pd.DataFrame({"path": paths, "label": values}, dtype=str)


def read_ids(name: str, file: str | bytes) -> dict[str, str]:
    """Read a list with an id and a path in each line, such as images.txt of CUB-200, as a mapping."""
    words = [line.split(None, 1) for line in _read_text(name, file).splitlines()]
    return {word[0]: word[1].strip() for word in words if len(word) == 2}


def _match_lines(text: str) -> list[re.Match[str]]:
    return [line for row in text.splitlines() if (line := LINE.fullmatch(row.strip()))]


def _read_text(name: str, file: str | bytes, max_lines: int = 0) -> str:
    """Return the text of a file, or of its first lines that are not blank."""
    try:
        with io.BytesIO(file) if isinstance(file, bytes) else Path(file).open("rb") as opened:
            if not max_lines:
                return opened.read().decode("utf-8-sig")
            lines = (line for line in opened if line.strip())
            return next(lines, b"").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8_error(name, error) from error


def _not_utf8_error(name: str, error: UnicodeDecodeError) -> ConvoyError:
    return ConvoyError(f"{name} is not in UTF-8 ({error}): save it as CSV in UTF-8")


# Columns


def select_columns(name: str, table: pd.DataFrame, config: TableConfig) -> pd.DataFrame:
    """Rename the columns that are used to the keys of `COLUMN_NAMES`, and make one label of one-hot columns.

    Raises:
        UnknownTableError: If there are no columns for path and label, or path and split.
    """
    used = _map_columns(table.columns, config)
    _check_columns(table.columns, config)
    if "path" not in used:
        raise UnknownTableError(_describe_columns(table.columns))
    others = [column for column in table.columns if column not in used.values()]
    one_hot = config.label if isinstance(config.label, list) else []
    if "label" not in used and not one_hot and config.label is None and len(others) > 1:
        one_hot = others if len(table) and not _read_one_hot(table[others]).isna().any(axis=None) else []
    if one_hot:
        labels = _join_one_hot(name, table, used["path"], one_hot)
        table = table.drop(columns=one_hot).assign(label=labels)
        used["label"] = "label"
    elif not _is_label_table(used) and "split" not in used:
        raise UnknownTableError(_describe_columns(table.columns))
    if "label" in used:
        check_single_labels(name, table.rename(columns={used[key]: key for key in ("path", "label")}))
    names = {column: key for key, column in used.items()}
    # A column that has the name of another that is used instead.
    names |= {column: f"{column} (not used)" for column in table.columns if column in used and column not in names}
    return table.rename(columns=names)


def _map_columns(columns: Sequence[str] | Any, config: TableConfig) -> dict[str, str]:
    """Map the keys of `COLUMN_NAMES` to the columns that are used for them."""
    plain: dict[str, str] = {}
    # An exact match takes precedence over one that ignores case and separators.
    for column in columns:
        plain.setdefault(column, column)
    for column in columns:
        plain.setdefault("_".join(column.lower().replace("-", " ").split()), column)
    used = {}
    for key, names in COLUMN_NAMES.items():
        wanted = getattr(config, key)
        accepted = () if isinstance(wanted, list) else (wanted,) if wanted else names
        if found := next((plain[name] for name in accepted if name in plain), None):
            used[key] = found
    return used


def _check_columns(columns: Sequence[str] | Any, config: TableConfig) -> None:
    """Raise UnknownTableError if there is no column of a name that the settings give."""
    for key in COLUMN_NAMES:
        wanted = getattr(config, key) or []
        for name in [wanted] if isinstance(wanted, str) else wanted:
            if name not in columns:
                raise UnknownTableError(
                    f"{_describe_columns(columns)}, but not {name}, which dataset.table.{key} names"
                )


def _is_label_table(used: dict[str, str]) -> bool:
    return "path" in used and "label" in used


def _describe_columns(columns: Sequence[str] | Any) -> str:
    shown = [str(column) for column in columns]
    more = f" and {len(shown) - MAX_LISTED_COLUMNS} more" if len(shown) > MAX_LISTED_COLUMNS else ""
    return f"has the columns {', '.join(shown[:MAX_LISTED_COLUMNS])}{more}" if shown else "is empty"


def _read_one_hot(table: pd.DataFrame) -> pd.DataFrame:
    """Return 0 or 1 for each field of one-hot columns, NaN for any other value."""
    return table.apply(lambda column: column.str.strip().str.lower().map(ONE_HOT_VALUES))


def _join_one_hot(name: str, table: pd.DataFrame, path: str, columns: list[str]) -> list[str]:
    """Return the name of the column that is 1 in each row, "" where none is."""
    values = _read_one_hot(table[columns])
    if values.isna().any(axis=None):
        column = next(column for column in columns if values[column].isna().any())
        value = table[column][values[column].isna()].iloc[0]
        raise UnknownTableError(f"has {value!r} in the column {column}, and not 0 or 1")
    if (several := values.sum(axis=1) > 1).any():
        row = int(several.to_numpy().argmax())
        found = [column for column in columns if values[column].iloc[row]]
        raise multi_label_error(name, f"{table[path].iloc[row]} ({', '.join(found)})")
    return [
        columns[position] if has_label else ""
        for position, has_label in zip(values.to_numpy().argmax(axis=1), values.any(axis=1), strict=True)
    ]


# Several labels


def check_single_labels(name: str, table: pd.DataFrame) -> None:
    """Check that no label is a list of several labels, such as cat|dog where cat and dog are labels as well.

    Raises:
        ConvoyError: If there are such labels.
    """
    labels = set(table["label"])
    counts = collections.Counter(part for label in labels for part in _split_label(label))
    for label in sorted(labels):
        parts = _split_label(label)
        is_json = label.startswith("[") and label.endswith("]") and "," in label
        # Paris, Texas is one label, even beside Paris, France and Austin, Texas.
        minimum = 2 if "," not in label else len(labels) + 1
        if is_json or (len(parts) > 1 and all(part in labels or counts[part] >= minimum for part in parts)):
            raise multi_label_error(name, f"{table['path'][table['label'] == label].iloc[0]} ({label})")


def _split_label(label: str) -> list[str]:
    """Return the different parts between separators, without empty ones, such as those of a label that is "|"."""
    separator = next((each for each in LABEL_SEPARATORS if each in label), None)
    return sorted({part.strip() for part in label.split(separator)} - {""}) if separator else [label]


def multi_label_error(name: str, example: str) -> ConvoyError:
    """Return the error for a table that gives an image several labels."""
    return ConvoyError(
        f"{name} has several labels for an image, such as {example}, and convoy learns one: keep one label for each"
        " image, or name the column with a single label by dataset.table.label (convoy use --label)"
    )
