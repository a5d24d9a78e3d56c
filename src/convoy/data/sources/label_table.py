"""Label tables: which image each row is for, and what is wrong with a row."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from convoy.core.errors import ConvoyError
from convoy.core.text import truncate_names
from convoy.data.image_io import InvalidImageError
from convoy.data.packed.packed_dataset import MAX_SLICE_VALUES, SPLITS
from convoy.data.sources.base import SPLIT_NAMES, Mismatch, Sample
from convoy.data.sources.file_listing import Annotation, FileSet, find_split_name
from convoy.data.sources.path_matching import PathMatcher
from convoy.data.sources.table_file import COLUMN_NAMES, multi_label_error

# A message about a mismatch lists this many rows, and as many files.
MAX_LISTED_PATHS = 3
# Number and fraction of images with several labels up to which these are mistakes.
MAX_MULTI_LABELS = 2
MAX_MULTI_LABEL_FRACTION = 0.05


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """A label table, or a split list, among the files of a file set."""

    title: str  # name in messages: labels.csv
    file_set: int  # index of the file set that contains the table
    folder: str  # folder of the table, to which its paths are relative: "" or pets/
    split: str  # split of all rows if there is no split column
    rows: pd.DataFrame  # strings; columns path, label or split, and optionally group and others

    @property
    def extra_columns(self) -> list[str]:
        """The columns that convoy itself does not use."""
        return [column for column in self.rows.columns if column not in COLUMN_NAMES]


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
                    f" the images by it, set dataset.table.split={column}"
                )
            elif find_split_name(column) and len(values) == 2:
                # For example a column is_test with the values 0 and 1.
                notes.append(
                    f"the column {column} of {table.title} is not used: to split the images by it, add a column split"
                    f" with the values {', '.join(SPLITS)}"
                )
    return notes


def find_faults(table: LabelTable) -> list[str]:
    """Return what is wrong with each row of a table, "" if nothing is.

    Raises:
        ConvoyError: If the column of the splits has other values than splits.
    """
    # Its import takes 0.4 s, which only data with a table need.
    from pandera.errors import SchemaErrors
    from pandera.pandas import Check, Column, DataFrameSchema

    rows = table.rows.reset_index(drop=True)
    faults = [""] * len(rows)
    checks = {
        "path": Check.ne("", error="has a row without a path"),
        "label": Check.ne("", error=f"has no label in {table.title}"),
        "split": Check.isin(["", *SPLIT_NAMES], error="split"),
    }
    columns = {key: Column(str, check, required=False) for key, check in checks.items()}
    if "split" in rows:
        splits = rows["split"].str.strip()
        rows["split"] = splits.str.lower()
        if len(rows) and not rows["split"].isin(["", *SPLIT_NAMES]).any():
            raise ConvoyError(
                f"the column of the splits in {table.title} has the values {truncate_names(sorted(set(splits)))}, and"
                f" not {', '.join(SPLITS)}: write these, or name another column by dataset.table.split (--split)"
            )
    try:
        DataFrameSchema(columns).validate(rows, lazy=True)
    except SchemaErrors as errors:
        for row, check in errors.failure_cases[["index", "check"]].itertuples(index=False):
            if check == "split":
                check = f"has the split {splits[row]!r} in {table.title}, which is none of {', '.join(SPLITS)}"
            faults[row] = faults[row] or check
    return faults


@dataclasses.dataclass(frozen=True)
class Matches:
    """The files that the rows of tables lead to."""

    # For each file set the annotations of its files by path.
    annotations: list[dict[str, tuple[Annotation, ...]]]
    samples: list[Sample]  # with an error, for the rows that can't be used or lead to no file
    unmatched: list[str]  # the paths of the rows that lead to no file


def match_labels(
    tables: Sequence[LabelTable], file_sets: Sequence[FileSet], extra_columns: Sequence[str] = ()
) -> Matches:
    """Match the rows of label tables, or of split lists, to files.

    Args:
        tables: The tables or lists.
        file_sets: The file sets in which the files are looked up.
        extra_columns: Additional columns to include in the annotations. If several rows name the same file, the values
            of the first row are used.
    """
    annotations: list[dict[str, tuple[Annotation, ...]]] = [{} for _ in file_sets]
    # Images with the same annotations share one object, which saves memory.
    shared: dict[tuple[Annotation, ...], tuple[Annotation, ...]] = {}
    faulty: dict[tuple[str, Annotation], None] = {}
    unmatched: dict[str, None] = {}
    excluded = [dataclasses.replace(files, paths=files.excluded) for files in file_sets]
    has_excluded = any(True for files in excluded for _ in files.paths)
    for table in tables:
        paths = table.rows["path"].tolist()
        matcher = PathMatcher(file_sets, table.file_set, table.folder, paths)
        left_out = PathMatcher(excluded, table.file_set, table.folder, paths) if has_excluded else None
        prefix = f"{file_sets[table.file_set].name}{table.folder}"
        for path, row, values in _iter_annotations(table, extra_columns):
            files = matcher.find(path)
            if not path:
                row = row._replace(fault="has a row without a path")
                faulty[f"{file_sets[table.file_set].name}{table.title}", row] = None
            elif matcher.points_out(path):
                faulty[path, row._replace(fault=f"is named in {table.title} and points out of the data")] = None
            elif not files:
                if not (left_out and left_out.find(path)):
                    fault = f"is named in {table.title}, but there is no such file"
                    faulty[f"{prefix}{path}", row._replace(fault=fault)] = None
                    unmatched[path] = None
            elif len({file.removeprefix(table.folder) for _, file in files}) > 1:
                fault = f"is named in {table.title}, but {len(files)} files have this name: add their folders, or leave"
                fault += " out the others by dataset.exclude"
                faulty[f"{prefix}{path}", row._replace(fault=fault)] = None
                unmatched[path] = None
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
    samples = [Sample(path, row.label, row.split, row.group, InvalidImageError(row.fault)) for path, row in faulty]
    return Matches(annotations, samples, list(unmatched))


def _add_annotation(rows: tuple[Annotation, ...], row: Annotation) -> tuple[Annotation, ...]:
    """Add an annotation to those of a file, unless it adds nothing new.

    An annotation with a split replaces one that is the same except for the missing split.
    """
    plain = row._replace(split="", extra_values=())
    same = [known for known in rows if known._replace(split="", extra_values=()) == plain]
    if any(known.split == row.split or not row.split for known in same):
        return rows
    return (*(known for known in rows if known.split or known not in same), row)


def _iter_annotations(table: LabelTable, extra_columns: Sequence[str]) -> Iterator[tuple[str, Annotation, list[str]]]:
    """Yield the path, the annotation and the values of the extra columns for each row that is not empty."""
    columns = ["path", "label", "split", "group", *extra_columns]
    empty = pd.Series("", index=table.rows.index)
    cells = zip(*(table.rows.get(column, empty) for column in columns), strict=True)
    for (path, label, name, group, *values), fault in zip(cells, find_faults(table), strict=True):
        if path or label:
            split = SPLIT_NAMES.get(name.strip().lower(), "") if "split" in table.rows else table.split
            yield path, Annotation(label, split, group, fault), values


def describe_mismatch(tables: Sequence[LabelTable], rows: Sequence[str], files: Sequence[str]) -> Mismatch | None:
    """Describe the rows of tables that lead to no file, and the images that no row leads to."""
    if not rows and not files:
        return None
    total = sum(len(table.rows) for table in tables)
    parts = [
        f"{len(paths):,} {what} ({', '.join(paths[:MAX_LISTED_PATHS])}{', ...' * (len(paths) > MAX_LISTED_PATHS)})"
        for paths, what in ((rows, f"of {total:,} rows lead to no file"), (files, "images are in no row"))
        if paths
    ]
    return Mismatch(rows, files, f"{' and '.join(table.title for table in tables)}: {', and '.join(parts)}")


def check_one_label(annotations: Sequence[Mapping[str, tuple[Annotation, ...]]], tables: Sequence[LabelTable]) -> None:
    """Check that tables do not give many images several labels, each in a row of its own.

    Raises:
        ConvoyError: If they do.
    """
    several = {
        path: dict.fromkeys(row.label for row in rows if row.label)
        for by_path in annotations
        for path, rows in by_path.items()
        if len(rows) > 1
    }
    several = {path: labels for path, labels in several.items() if len(labels) > 1}
    if len(several) > max(MAX_MULTI_LABELS, MAX_MULTI_LABEL_FRACTION * sum(map(len, annotations))):
        path, labels = next(iter(several.items()))
        raise multi_label_error(" and ".join(table.title for table in tables), f"{path} ({', '.join(labels)})")
