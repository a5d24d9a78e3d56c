"""Parquet files: images with their labels in one file, as data hubs export them, or only a label table."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from convoy.core.errors import ConvoyError, describe_error
from convoy.data.decode_worker import MAX_FILE_BYTES, TOO_LARGE
from convoy.data.image_io import InvalidImageError
from convoy.data.packed.packed_dataset import SPLITS
from convoy.data.sources.base import SPLIT_NAMES, FileContent, Sample, TableConfig

# The number of rows, each with an image, that are in memory at once.
CHUNK_ROWS = 16


@dataclasses.dataclass(frozen=True)
class ParquetTable:
    """A Parquet file of which only the schema has been read."""

    name: str  # name in messages: data/train-00000-of-00002.parquet
    file: str | bytes  # path or content of the file
    schema: pa.Schema
    classes: dict[str, list[str]]  # column -> class names, indexed by the numbers in the column
    count: int  # number of rows
    split: str  # split of all rows if there is no split column
    columns: TableConfig = dataclasses.field(default_factory=TableConfig)  # the names that its columns have

    def rows(self, columns: Sequence[str]) -> Iterator[tuple]:
        """Yield the values of some columns row by row, with only a few rows in memory at once."""
        count = 0
        with _explain_errors(self.name), _open(self.file) as file:
            for batch in file.iter_batches(CHUNK_ROWS, columns=list(columns), use_threads=False):
                count += len(batch)
                yield from zip(*(batch.column(column).to_pylist() for column in columns), strict=True)
            if count != self.count:
                raise ValueError(f"{count} of {self.count} rows")


def open_parquet(name: str, file: str | bytes, split: str) -> ParquetTable:
    """Read the schema of a Parquet file.

    Args:
        name: The name of the file in messages.
        file: The path of the file, or its content.
        split: The split of all rows if there is no split column.

    Raises:
        ConvoyError: If the file is broken, or has two columns of the same name.
    """
    with _explain_errors(name), _open(file) as opened:
        schema = opened.schema_arrow
        if len(set(schema.names)) < len(schema.names):
            raise ConvoyError(f"{name} has two columns of the same name: rename one of them")
        return ParquetTable(name, file, schema, _read_class_names(schema), opened.metadata.num_rows, split)


def find_image_column(table: ParquetTable) -> str | None:
    """Return the name of the column with the encoded images, or None if there is none, as in a label table.

    Raises:
        ConvoyError: If several columns could be meant.
    """
    columns = [field.name for field in table.schema if _is_bytes(field.type) or _has_bytes(field.type)]
    named = [column for column in columns if column in ("image", "img")] or columns
    if len(named) > 1:
        raise ConvoyError(
            f"{table.name} has several columns of bytes, {', '.join(named)}: rename the one with the images to image,"
            " or remove the others"
        )
    return named[0] if named else None


def find_label_column(table: ParquetTable) -> str:
    """Return the name of the column with the labels.

    Raises:
        ConvoyError: If there is none, if several columns could be meant, or if it has several labels for an image.
    """
    classes = [column for column in table.classes if column not in ("split", "group")]
    if isinstance(table.columns.label, str):
        column = table.columns.label
        if column not in table.schema.names:
            raise ConvoyError(
                f"{table.name} has no column {column}, which dataset.table.label names, but"
                f" {', '.join(table.schema.names)}"
            )
    elif "label" in table.schema.names:
        column = "label"
    elif len(classes) == 1:
        column = classes[0]
    elif classes:
        raise ConvoyError(
            f"{table.name} has several columns of classes, {', '.join(classes)}, but no column label: name the one to"
            " predict by dataset.table.label (convoy use --label)"
        )
    else:
        raise ConvoyError(
            f"{table.name} has the columns {', '.join(table.schema.names)}, but no column label: name the one with the"
            " classes by dataset.table.label (convoy use --label)"
        )
    if pa.types.is_nested(table.schema.field(column).type):
        raise ConvoyError(
            f"{table.name} has several labels for an image in the column {column}, but convoy supports only one:"
            " make it a column of strings or integers"
        )
    return column


def find_classes(tables: Sequence[ParquetTable]) -> list[str]:
    """Return all classes of some files.

    First come the class names in the schemas, in the order of their numbers; then other numbers; then other strings.
    """
    names: dict[str, None] = {}
    numbers, strings = set(), set()
    for table in tables:
        column = find_label_column(table)
        names |= dict.fromkeys(table.classes.get(column, []))
        for value in set() if column in table.classes else {value for (value,) in table.rows([column])}:
            if text := _format_value(value):
                numbers.add((value, text)) if isinstance(value, int | float) else strings.add(text)
    return list(dict.fromkeys([*names, *(text for _, text in sorted(numbers)), *sorted(strings)]))


def iter_samples(table: ParquetTable) -> Iterator[Sample]:
    """Yield the images of a file with their labels."""
    label, image = find_label_column(table), find_image_column(table)
    split_column, group_column = table.columns.split or "split", table.columns.group or "group"
    others = [column for column in (split_column, group_column) if column in table.schema.names]
    columns = [label, str(image), *others]
    for row, values in enumerate(table.rows(columns)):
        cells = dict(zip(columns, values, strict=True))
        text, fault = _read_label(table, label, cells[label])
        split = _format_category(table, split_column, cells.get(split_column))
        if split and split.lower() not in SPLIT_NAMES:
            fault = fault or f"has the split {split!r}, which is none of {', '.join(SPLITS)}"
        yield Sample(
            path=f"{table.name}:{row}",
            label=text,
            split=SPLIT_NAMES.get(split.lower(), "") if split_column in cells else table.split,
            group=_format_category(table, group_column, cells.get(group_column)),
            content=InvalidImageError(fault) if fault else _read_content(cells[str(image)]),
        )


def iter_texts(table: ParquetTable, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield rows as strings, with class names in place of class numbers, and "" for a missing value."""
    for values in table.rows(columns):
        yield tuple(_format_category(table, column, value) for column, value in zip(columns, values, strict=True))


def _read_label(table: ParquetTable, column: str, value: Any) -> tuple[str, str]:
    """Return the class name of a label and an error message, one of which is ""."""
    text = _format_category(table, column, value)
    if text:
        return text, ""
    if _format_value(value):
        return "", f"has the label {value}, but its file has names only for 0 to {len(table.classes[column]) - 1}"
    return "", "has no label"


def _format_category(table: ParquetTable, column: str, value: Any) -> str:
    text, names = _format_value(value), table.classes.get(column)
    if names is None or not text:
        return text
    return names[value] if 0 <= value < len(names) else ""


def _format_value(value: Any) -> str:
    """Convert a value to text; null, NaN and -1 mean that there is none and become ""."""
    if value is None or value != value or value == -1:
        return ""
    # pandas writes integers as floats in a column with missing values.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _read_content(value: Any) -> FileContent:
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is None:
        return InvalidImageError("has no bytes in its row")
    return content if len(content) <= MAX_FILE_BYTES else InvalidImageError(TOO_LARGE)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _has_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and any(field.name == "bytes" and _is_bytes(field.type) for field in kind)


def _read_class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the class names of integer columns that Hugging Face's `datasets` has stored in the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        named = {column: feature.get("names") for column, feature in features.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {
        field.name: [str(name) for name in names]
        for field in schema
        if pa.types.is_integer(field.type) and isinstance(names := named.get(field.name), list) and names
    }


def _open(file: str | bytes) -> pq.ParquetFile:
    source = io.BytesIO(file) if isinstance(file, bytes) else Path(file)
    # Read a part of a column at a time; by default a complete row group is loaded into memory.
    return pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)


@contextlib.contextmanager
def _explain_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ConvoyError(
            f"{name} is not a complete Parquet file ({describe_error(error)}): replace it with an intact copy"
        ) from error
