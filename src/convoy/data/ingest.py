"""Ingestion of a source: every image is decoded and validated, then packed or put in quarantine."""

import collections
import contextlib
import dataclasses
import json
import re
import shutil
import sys
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from tqdm import tqdm

from convoy.core.artifact_names import IMAGE_TABLE
from convoy.core.config import Fraction, PositiveInt, schema
from convoy.core.disk import format_size
from convoy.core.errors import ConvoyError
from convoy.data.cache import CacheDir, snapshot
from convoy.data.data_lock import DataLock, extend_classes
from convoy.data.decode_cache import RECORD, RECORDS_FILE, DecodeCache, write_decode_cache
from convoy.data.decode_pool import decode_all
from convoy.data.decode_worker import Batch
from convoy.data.image_io import MAX_PIXELS
from convoy.data.packed.packed_dataset import COLUMN_PREFIX, DESCRIPTION_FILE, ImageTable, PackedDataset
from convoy.data.packed.pixel_shards import PIXELS_FOLDER, MissingShardError, ShardWriter
from convoy.data.remarks import Remarks
from convoy.data.sources.archive import ARCHIVE_SUFFIXES
from convoy.data.sources.base import DatasetConfig, Sample, Source

# An error message lists this many invalid images by name, and counts the rest.
MAX_LISTED_IMAGES = 50
# After this many images the disk usage of all is estimated.
ESTIMATE_IMAGES = 256
# The pixels are stored in the output of the stage and in DVC's cache.
CACHE_COPIES = 2
# The columns of the image table that come from a `RECORD`.
RECORD_COLUMNS = [name for name in RECORD.names or () if name not in ("sha256", "file_stamp", "frames", "traits")]
# The beginning of a path that is not searched for a group: the name of the data folder or of an archive.
PATH_PREFIX = re.compile(
    rf"^(?:.*?(?:{'|'.join(map(re.escape, ARCHIVE_SUFFIXES))}):|[^/:]*[/:])", re.IGNORECASE | re.DOTALL
)


@schema
class FetchConfig:
    """Limits beyond which the fetch stage fails."""

    max_invalid_fraction: Fraction  # in [0, 1], of all images: those that are unusable or have contradictory labels
    max_pixels: PositiveInt = MAX_PIXELS  # images with more are refused, as they may be decompression bombs


@dataclasses.dataclass(frozen=True)
class IngestResult:
    """The result of ingesting a source."""

    packed: PackedDataset
    quarantine: pd.DataFrame  # path, label, reason of each excluded image
    merged: pd.DataFrame  # path, kept: each exact copy of a file, and the file kept in its place
    notes: list[str]  # warnings about what may be unintended, in sentences


class TooManyInvalidImages(ConvoyError):
    """Error raised when more images are unusable than allowed; `quarantine` has path, label and reason of each."""

    def __init__(self, quarantine: pd.DataFrame, count: int, params: FetchConfig) -> None:
        self.quarantine = quarantine
        first = quarantine.head(MAX_LISTED_IMAGES).itertuples(index=False)
        more = len(quarantine) - MAX_LISTED_IMAGES
        super().__init__(
            f"{len(quarantine)} of {count} images can't be used, more than fetch.max_invalid_fraction="
            f"{params.max_invalid_fraction} allows; fix or remove them:"
            + "".join(f"\n  {path} {reason}" for path, _, reason in first)
            + (f"\n  {more} more" if more > 0 else "")
        )


def ingest(
    source: Source, dataset: DatasetConfig, params: FetchConfig, lock: DataLock, folder: Path, cache_dir: CacheDir
) -> IngestResult:
    """Decode and validate every image of a source, and pack the valid ones into `folder`.

    Args:
        source: The labelled images; its samples are consumed.
        dataset: Name, group pattern and maximum image size of the data set.
        params: The limits beyond which ingestion fails.
        lock: The lock of the data set. Classes that are not in it are placed after those that are.
        folder: Where the packed data set is written.
        cache_dir: The cache. Images that an earlier run decoded are not decoded again, and what this run decodes is
            cached for the next one.

    Returns:
        The packed data set, the excluded images, the merged copies and warnings.

    Raises:
        TooManyInvalidImages: If more images are invalid or contradictory than `params` allows.
        ConvoyError: If fewer than two classes have images, or if the group pattern matches no path.
    """
    _check_mismatch(source, params)
    try:
        with snapshot(cache_dir, folder / "earlier") as cache_snapshot:
            invalid, remarks = _decode(source, dataset, params, folder, cache_snapshot)
    except MissingShardError as error:
        raise ConvoyError(str(error)) from error
    table = ImageTable(folder / IMAGE_TABLE)
    is_repeated = table.read_columns("pixel_hash")["pixel_hash"].duplicated(keep=False)
    # Only images with the same pixels can contradict or repeat each other, and these are few.
    repeated = table.read_rows(np.flatnonzero(is_repeated))
    contradictions = _find_contradictions(repeated)
    quarantine = pd.concat([invalid, contradictions], ignore_index=True)
    if len(quarantine) > params.max_invalid_fraction * source.count:
        raise TooManyInvalidImages(quarantine, source.count, params)
    copies = _find_copies(repeated.drop(index=contradictions.index))
    if len(contradictions) + len(copies):
        table.drop_rows(np.union1d(contradictions.index, copies.index))
    labels = set(table.read_columns("label")["label"].unique())
    _check_class_count(dataset.name, labels, source.notes)

    classes = extend_classes(lock.classes, [label for label in source.classes if label in labels])
    given = set(table.read_columns("split")["split"].unique())
    drawn = lock.splits_to_draw(given)
    description = {
        "name": dataset.name,
        "origin": dataset.origin,
        "longest_side": dataset.longest_side,
        "classes": classes,
        "drawn": drawn,
    }
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")
    write_decode_cache(folder / RECORDS_FILE, folder / PIXELS_FOLDER, cache_dir.folder)
    notes = [*source.notes, *remarks.describe(), *_note_equal_names(classes), *_note_ungrouped(table, dataset.group)]
    notes += [
        f"the source assigns {split} images now; some of its training images stay {split} images, as before: to change"
        " this, edit drawn in data.lock"
        for split in drawn
        if split in given
    ]
    return IngestResult(PackedDataset.load(folder), quarantine, copies.reset_index(drop=True), notes)


def _check_mismatch(source: Source, params: FetchConfig) -> None:
    """Raise ConvoyError if too many rows of a table lead to no file, or too many images are in no row."""
    found = source.mismatch
    if found and len(found.rows) + len(found.files) > params.max_invalid_fraction * source.count:
        raise ConvoyError(
            f"{found.message}, more than fetch.max_invalid_fraction={params.max_invalid_fraction} allows: correct the"
            " paths, name the column that has them by dataset.table.path in conf/dataset/, or leave files out by"
            " dataset.exclude"
        )


def find_group(path: str, label: str, pattern: str | None) -> str:
    """Return the name of the group that an image belongs to.

    The name of the data folder or of an archive is not searched, because the next version of an archive may have
    another name.

    Args:
        path: The path of the image, as in `Sample.path`.
        label: The class of the image.
        pattern: None for no groups; "folder" for the folder of the image, beginning with the class folder, if there
            is one, and without any folder around it; else a regular expression, whose first capturing group (without
            one, the complete match) is the name.

    Returns:
        The group, or "" if `pattern` is None, if the regular expression does not match, or if the folder is the class
        folder itself.
    """
    if pattern is None:
        return ""
    path = PATH_PREFIX.sub("", path)
    if pattern == "folder":
        folders = path.split("/")[:-1]
        folders = folders[folders.index(label) :] if label in folders else folders
        return "/".join(folders) if folders != [label] else ""
    match = re.search(pattern, path)
    return (match[min(1, match.re.groups)] or "") if match else ""


def _note_ungrouped(table: ImageTable, pattern: str | None) -> list[str]:
    """Return a note if the group pattern matches only some paths.

    Raises:
        ConvoyError: If it matches none.
    """
    if pattern is None:
        return []
    has_no_group = table.read_columns("group")["group"] == ""
    if not has_no_group.any():
        return []
    example = table.read_rows(np.flatnonzero(has_no_group)[:1])["path"].iloc[0]
    if has_no_group.all():
        raise ConvoyError(
            f"dataset.group={pattern!r} finds a group in no path, such as {example}: fix it in conf/dataset/, or set"
            " it to null"
        )
    return [
        f"dataset.group={pattern!r} finds no group in the paths of {has_no_group.sum()} of {len(has_no_group)} images,"
        f" such as {example}: each of them is split on its own"
    ]


def _note_equal_names(classes: Sequence[str]) -> list[str]:
    """Return notes about classes whose names look the same."""
    by_plain_name = collections.defaultdict(list)
    for name in classes:
        plain = " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())
        # pandas writes integers as 1.0 in a column with missing values.
        by_plain_name[re.sub(r"^(\d+)\.0+$", r"\1", plain)].append(name)
    return [
        f"the classes {' and '.join(map(repr, names))} are different classes: if they are one, give them the same name"
        for names in by_plain_name.values()
        if len(names) > 1
    ]


def _decode(
    source: Source, dataset: DatasetConfig, params: FetchConfig, folder: Path, cache_dir: CacheDir
) -> tuple[pd.DataFrame, Remarks]:
    """Write pixels, table and records of the usable images.

    Returns path, label and reason of the other images, and what is remarkable about the usable ones.

    Everything is written to disk batch by batch, so that memory does not grow with the number of images.
    """
    invalid: list[tuple[str, str, str]] = []
    remarks = Remarks()
    decoded = decode_all(source, dataset.longest_side, cache_dir, params.max_pixels, dataset.first_page)
    tables = _iter_tables(source, dataset, decoded, folder, cache_dir, invalid, remarks)
    ImageTable(folder / IMAGE_TABLE).write(tables)
    return pd.DataFrame(invalid, columns=["path", "label", "reason"], dtype="str"), remarks


def _iter_tables(
    source: Source,
    dataset: DatasetConfig,
    decoded: Iterator[tuple[list[Sample], Batch]],
    folder: Path,
    cache_dir: CacheDir,
    invalid: list[tuple[str, str, str]],
    remarks: Remarks,
) -> Iterator[pa.Table]:
    """Yield the table rows of the usable images batch by batch, and append the other images to `invalid`."""
    schema, no_values = _table_schema(source.extra_columns), ("",) * len(source.extra_columns)
    yield schema.empty_table()
    offset, is_estimated = 0, False
    with (
        contextlib.closing(DecodeCache.load(cache_dir)) as cache,
        contextlib.closing(ShardWriter(folder / PIXELS_FOLDER, cache.pixels)) as shards,
        (folder / RECORDS_FILE).open("wb") as records,
        tqdm(total=source.count, desc=dataset.name, unit=" images", mininterval=1) as bar,
    ):
        for samples, batch in decoded:
            sizes = batch.sizes
            shards.write(batch.records["pixel_hash"], sizes, batch.records["offset"], batch.pixels)
            batch.records["offset"] = offset + np.cumsum(sizes) - sizes
            offset += int(sizes.sum())
            records.write(batch.records.tobytes())

            rows = []
            for sample, fault in zip(samples, batch.faults, strict=True):
                if fault:
                    invalid.append((sample.path, sample.label, fault))
                else:
                    group = sample.group or find_group(sample.path, sample.label, dataset.group)
                    rows.append((sample.path, sample.label, sample.split, group, *(sample.extra_values or no_values)))
            remarks.add([path for path, *_ in rows], batch.records)
            columns = _build_columns(rows, batch.records, 4 + len(source.extra_columns))
            yield pa.Table.from_arrays(columns, schema=schema)
            bar.update(len(samples))
            if not is_estimated and bar.n >= min(ESTIMATE_IMAGES, source.count):
                is_estimated = True
                free = shutil.disk_usage(folder).free
                if note := estimate_disk_usage(offset * source.count // bar.n, free):
                    bar.write(f"{dataset.name}: {note}", file=sys.stderr)


def estimate_disk_usage(pixel_bytes: int, free_bytes: int) -> str | None:
    """Return a note if decoded images would fill more than half of the free disk space, else None.

    Args:
        pixel_bytes: The size of the pixels of all images.
        free_bytes: The free space on the disk.
    """
    needed = CACHE_COPIES * pixel_bytes
    if needed <= free_bytes / 2:
        return None
    return (
        f"the decoded images need about {format_size(needed)} of the {format_size(free_bytes)} that are free, with the"
        " copy in DVC's cache: set a lower dataset.longest_side in conf/dataset/, or make room (`convoy gc`)"
    )


def _table_schema(extra_columns: Sequence[str]) -> pa.Schema:
    """Return the schema of the image table as pandas writes it, so that pandas reads back the same types."""
    texts = ["path", "label", "split", "group", "sha256"]
    fields = [(name, pa.large_string()) for name in texts]
    fields += [(name, pa.from_numpy_dtype(RECORD[name])) for name in RECORD_COLUMNS]
    fields += [(f"{COLUMN_PREFIX}{name}", pa.large_string()) for name in extra_columns]
    return pa.Table.from_pandas(pa.schema(fields).empty_table().to_pandas(), preserve_index=False).schema


def _build_columns(rows: list[tuple[str, ...]], records: np.ndarray, width: int) -> list[pa.Array]:
    """Return the columns of a batch in the order of `_table_schema`, with the SHA-256 in hexadecimal.

    Args:
        rows: For each image: path, label, split and group, then the additional columns of the source.
        records: (N,) `RECORD`, one for each image.
        width: The number of strings for each image in `rows`.
    """
    texts = [pa.array([row[column] for row in rows], pa.large_string()) for column in range(width)]
    checksums = pa.array([sha256.hex() for sha256 in records["sha256"].tolist()], pa.large_string())
    recorded = [pa.array(records[name]) for name in RECORD_COLUMNS]
    return [*texts[:4], checksums, *recorded, *texts[4:]]


def _find_contradictions(table: pd.DataFrame) -> pd.DataFrame:
    """Return path, label and reason of the rows whose pixels also occur under another label, by their index."""
    codes = pd.Series(pd.factorize(table["label"])[0], index=table.index).groupby(table["pixel_hash"])
    contradictory = table[codes.transform("min") != codes.transform("max")]
    reasons = {}
    for _, same_pixels in contradictory.groupby("pixel_hash", sort=False):
        first = same_pixels.drop_duplicates("label")
        others = {label: first[first["label"] != label].iloc[0] for label in first["label"]}
        for row, label in same_pixels["label"].items():
            other = others[label]
            if other["path"] == table.at[row, "path"]:
                reasons[row] = f"is also labelled {other['label']!r}"
            else:
                reasons[row] = f"has the same pixels as {other['path']}, which is labelled {other['label']!r}"
    return contradictory[["path", "label"]].assign(reason=pd.Series(reasons, dtype="str"))


def _find_copies(table: pd.DataFrame) -> pd.DataFrame:
    """Return path and kept of the rows whose file already occurs in an earlier row, by their index.

    A copy with another group or split is not listed: the two may belong to different splits, and only the preprocess
    stage knows the splits.
    """
    key = table["sha256"] + " " + table["split"] + " " + table["group"]
    is_copy = key.duplicated()
    kept = dict(zip(key[~is_copy], table["path"][~is_copy], strict=True))
    return pd.DataFrame({"path": table["path"][is_copy], "kept": key[is_copy].map(kept)})


def _check_class_count(name: str, classes: Collection[str], notes: Sequence[str]) -> None:
    if len(classes) < 2:
        found = f"images of one class, {next(iter(classes))!r}" if classes else "no images that can be used"
        raise ConvoyError(
            f"{name} has {found}, and a classifier needs two classes or more: give each class a folder of its own"
            + "".join(f"\n  {note}" for note in notes)
        )
