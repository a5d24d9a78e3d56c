"""Ingestion of a source: every image is decoded and validated, then packed or put in quarantine."""

import collections
import contextlib
import dataclasses
import json
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from tqdm import tqdm

from convoy.core.artifact_names import IMAGE_TABLE
from convoy.core.config import Fraction, schema
from convoy.core.errors import ConvoyError
from convoy.data.cache import CacheDir, snapshot
from convoy.data.data_lock import DataLock, extended
from convoy.data.decode_pool import decode_all
from convoy.data.decode_worker import RECORD, RECORDS, DecodeCache, keep
from convoy.data.packed.packed_dataset import COLUMN, DESCRIPTION, ImageTable, PackedDataset
from convoy.data.packed.pixel_shards import PIXELS, LostShard, ShardWriter
from convoy.data.sources.archive import ARCHIVES
from convoy.data.sources.base import DatasetConfig, Source

# An error message lists this many invalid images by name, and counts the rest.
TOLD = 50  # images


@schema
class FetchConfig:
    """Limits beyond which the fetch stage fails."""

    max_bad_fraction: Fraction  # in [0, 1], of all images: those that are unusable or have contradictory labels


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
        first = quarantine.head(TOLD).itertuples(index=False)
        super().__init__(
            f"{len(quarantine)} of {count} images can't be used, more than fetch.max_bad_fraction="
            f"{params.max_bad_fraction} allows; mend or remove them:"
            + "".join(f"\n  {path} {reason}" for path, _, reason in first)
            + (f"\n  {len(quarantine) - TOLD} more" if len(quarantine) > TOLD else "")
        )


def ingest(
    source: Source, dataset: DatasetConfig, params: FetchConfig, history: DataLock, folder: Path, earlier: CacheDir
) -> IngestResult:
    """Decode and validate every image of a source, and pack the valid ones into `folder`.

    Args:
        source: The labelled images; its samples are consumed.
        dataset: Name, group pattern and maximum image size of the data set.
        params: The limits beyond which ingestion fails.
        history: The lock of the data set. Classes that are not in it are placed after those that are.
        folder: Where the packed data set is written.
        earlier: The cache. Images that an earlier run decoded are not decoded again, and what this run decodes is
            cached for the next one.

    Returns:
        The packed data set, the excluded images, the merged copies and warnings.

    Raises:
        TooManyInvalidImages: If more images are invalid or contradictory than `params` allows.
        ConvoyError: If fewer than two classes have images, or if the group pattern matches no path.
    """
    try:
        with snapshot(earlier, folder / "earlier") as known:
            faulty = _decode(source, dataset, folder, known)
    except LostShard as lost:
        raise ConvoyError(str(lost)) from lost
    rows = ImageTable(folder / IMAGE_TABLE)
    shared = rows.columns("picture")["picture"].duplicated(keep=False)
    # Only images with the same pixels can contradict or repeat each other, and these are few.
    several = rows.at(np.flatnonzero(shared))
    contradictions = _contradictions(several)
    quarantine = pd.concat([faulty, contradictions], ignore_index=True)
    if len(quarantine) > params.max_bad_fraction * source.count:
        raise TooManyInvalidImages(quarantine, source.count, params)
    copies = _copies(several.drop(index=contradictions.index))
    if len(contradictions) + len(copies):
        rows.drop(np.union1d(contradictions.index, copies.index))
    labels = set(rows.columns("label")["label"].unique())
    _check_classes(dataset.name, labels, source.notes)

    classes = extended(history.classes, [label for label in source.classes if label in labels])
    given = set(rows.columns("split")["split"].unique())
    drawn = history.draws(given)
    described = {
        "name": dataset.name,
        "origin": dataset.origin,
        "longest_side": dataset.longest_side,
        "classes": classes,
        "drawn": drawn,
    }
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n")
    keep(folder / RECORDS, folder / PIXELS, earlier.folder)
    notes = [*source.notes, *_twins(classes), *_ungrouped(rows, dataset.group)]
    notes += [
        f"{split} images are given now, and some of those given for training stay {split} images as well, as they were"
        " before: data.lock says so under drawn, and may be mended there"
        for split in drawn
        if split in given
    ]
    return IngestResult(PackedDataset.load(folder), quarantine, copies.reset_index(drop=True), notes)


def group_in(path: str, label: str, pattern: str | None) -> str:
    """Return the name of the group that an image belongs to.

    The name of the data folder or of an archive is not part of the path that is searched, because next week's archive
    has another name.

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
    path = _AROUND.sub("", path)
    if pattern == "folder":
        folders = path.split("/")[:-1]
        inside = folders[folders.index(label) :] if label in folders else folders
        return "/".join(inside) if inside != [label] else ""
    match = re.search(pattern, path)
    return (match[min(1, match.re.groups)] or "") if match else ""


_AROUND = re.compile(rf"^(?:.*?(?:{'|'.join(map(re.escape, ARCHIVES))}):|[^/:]*[/:])", re.IGNORECASE | re.DOTALL)


def _ungrouped(rows: ImageTable, pattern: str | None) -> list[str]:
    """Return a warning if the group pattern matches only some paths; raise an error if it matches none."""
    if pattern is None:
        return []
    there = rows.columns("group")["group"] == ""
    if not there.any():
        return []
    first = rows.at(np.flatnonzero(there)[:1])["path"].iloc[0]
    if there.all():
        raise ConvoyError(
            f"dataset.group={pattern!r} finds a group in no path, such as {first}: mend it in conf/dataset/, or set it"
            " to null"
        )
    return [
        f"dataset.group={pattern!r} finds no group in the paths of {there.sum()} of {len(there)} images, such as"
        f" {first}: each of them is split on its own"
    ]


def _twins(classes: Sequence[str]) -> list[str]:
    """Return warnings about classes whose names look the same."""
    named = collections.defaultdict(list)
    for name in classes:
        plain = " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())
        # pandas writes integers as 1.0 in a column with missing values.
        named[re.sub(r"^(\d+)\.0+$", r"\1", plain)].append(name)
    return [
        f"the classes {' and '.join(map(repr, names))} are learned apart: give them one name if they are one class"
        for names in named.values()
        if len(names) > 1
    ]


def _decode(source: Source, dataset: DatasetConfig, folder: Path, earlier: CacheDir) -> pd.DataFrame:
    """Write pixels, table and records of the usable images, and return path, label and reason of the others.

    Everything is written to disk batch by batch, so that memory does not grow with the number of images.
    """
    faults: list[tuple[str, str, str]] = []
    ImageTable(folder / IMAGE_TABLE).write(_tables(source, dataset, folder, earlier, faults))
    return pd.DataFrame(faults, columns=["path", "label", "reason"], dtype="str")


def _tables(
    source: Source, dataset: DatasetConfig, folder: Path, earlier: CacheDir, faults: list[tuple[str, str, str]]
) -> Iterator[pa.Table]:
    """Yield the table rows of the usable images batch by batch, and append the other images to `faults`."""
    schema, unsaid = _schema(source.more), ("",) * len(source.more)
    yield schema.empty_table()
    offset = 0
    with (
        contextlib.closing(DecodeCache.load(earlier)) as known,
        contextlib.closing(ShardWriter(folder / PIXELS, known.pixels)) as pixels,
        (folder / RECORDS).open("wb") as records,
        tqdm(total=source.count, desc=dataset.name, unit=" images", mininterval=1) as bar,
    ):
        for members, batch in decode_all(source, dataset.longest_side, earlier):
            sizes = batch.sizes
            pixels.write(batch.records["picture"], sizes, batch.records["offset"], batch.pixels)
            batch.records["offset"] = offset + np.cumsum(sizes) - sizes
            offset += int(sizes.sum())
            records.write(batch.records.tobytes())

            sound = []
            for member, fault in zip(members, batch.faults, strict=True):
                if fault:
                    faults.append((member.path, member.label, fault))
                else:
                    group = member.group or group_in(member.path, member.label, dataset.group)
                    sound.append((member.path, member.label, member.split, group, *(member.more or unsaid)))
            yield pa.Table.from_arrays(_columns(sound, batch.records, 4 + len(source.more)), schema=schema)
            bar.update(len(members))


RECORDED = [name for name in RECORD.names or () if name not in ("sha256", "stamp")]


def _schema(more: Sequence[str]) -> pa.Schema:
    """Return the schema of the image table as pandas writes it, so that pandas reads back the same types."""
    texts = ["path", "label", "split", "group", "sha256"]
    fields = [(name, pa.large_string()) for name in texts]
    fields += [(name, pa.from_numpy_dtype(RECORD[name])) for name in RECORDED]
    fields += [(f"{COLUMN}{name}", pa.large_string()) for name in more]
    return pa.Table.from_pandas(pa.schema(fields).empty_table().to_pandas(), preserve_index=False).schema


def _columns(said: list[tuple[str, ...]], records: np.ndarray, width: int) -> list[pa.Array]:
    """Return the columns of a batch in the order of `_schema`, with the SHA-256 in hexadecimal.

    Args:
        said: For each image: path, label, split and group, then the additional columns of the source.
        records: (N,) `RECORD`, one for each image.
        width: The number of strings for each image in `said`.
    """
    texts = _strings(said, width)
    digests = pa.array([digest.hex() for digest in records["sha256"].tolist()], pa.large_string())
    recorded = [pa.array(records[name]) for name in RECORDED]
    return [*texts[:4], digests, *recorded, *texts[4:]]


def _strings(rows: list[tuple], width: int) -> list[pa.Array]:
    return [pa.array([row[column] for row in rows], pa.large_string()) for column in range(width)]


def _contradictions(table: pd.DataFrame) -> pd.DataFrame:
    """Return path, label and reason of the rows whose pixels also occur under another label, by their index."""
    codes = pd.Series(pd.factorize(table["label"])[0], index=table.index).groupby(table["picture"])
    several = table[codes.transform("min") != codes.transform("max")]
    reasons = {}
    for _, same in several.groupby("picture", sort=False):
        first = same.drop_duplicates("label")
        others = {label: first[first["label"] != label].iloc[0] for label in first["label"]}
        for row, label in same["label"].items():
            other = others[label]
            same_file = other["path"] == table.at[row, "path"]
            picture = "" if same_file else f"shows the same picture as {other['path']}, which "
            reasons[row] = f"{picture}is labelled {other['label']!r}{' as well' * same_file}"
    return several[["path", "label"]].assign(reason=pd.Series(reasons, dtype="str"))


def _copies(table: pd.DataFrame) -> pd.DataFrame:
    """Return path and kept of the rows whose file already occurs in an earlier row, by their index.

    A copy with another group or split is not listed: the two may belong to different splits, and only the preprocess
    stage knows the splits.
    """
    same = table["sha256"] + " " + table["split"] + " " + table["group"]
    again = same.duplicated()
    kept = dict(zip(same[~again], table["path"][~again], strict=True))
    return pd.DataFrame({"path": table["path"][again], "kept": same[again].map(kept)})


def _check_classes(name: str, classes: Collection[str], notes: Sequence[str]) -> None:
    if len(classes) < 2:
        have = f"images of one class, {next(iter(classes))!r}" if classes else "no images that can be used"
        raise ConvoyError(
            f"{name} has {have}, and a classifier needs two classes or more: give each class a folder of its own"
            + "".join(f"\n  {note}" for note in notes)
        )
