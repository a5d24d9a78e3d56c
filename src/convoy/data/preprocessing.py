"""Preprocessing: resize the images of a packed data set to one size and write them by split."""

import collections
import dataclasses
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from convoy.core.artifact_names import DATASET_INFO, IMAGE_TABLE
from convoy.core.config import ImageSize, ProperFraction, Seed, schema
from convoy.core.errors import ConvoyError
from convoy.core.text import MAX_LISTED_NAMES, truncate_names
from convoy.data.cache import CacheDir
from convoy.data.near_duplicates import confirm_pairs, find_candidate_pairs
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.data.packed.packed_dataset import COLUMN_PREFIX, SPLITS, ImageTable, PackedDataset
from convoy.data.resize import EXCLUDED, write_resized
from convoy.data.splitting import (
    NEAR_DUPLICATE_REASON,
    assign_groups,
    draw_splits,
    exclude_leaks,
    find_cross_split_duplicates,
)

MAX_LISTED_PAIRS = 10_000
# The fraction of all images, excluded as near-duplicates, from which a note recommends to use groups.
MANY_NEAR_DUPLICATES = 0.1


@schema
class PreprocessConfig:
    """Settings of the images and splits that all networks share."""

    size: ImageSize  # pixels; height and width
    channels: Literal["auto", 1, 3]  # auto: 1 where every image is grey, else 3
    # Fraction of the images without a given split; also of the given training images if no test images are given.
    test_fraction: ProperFraction
    # Fraction of the remaining such images; also of the given training images if no validation images are given.
    val_fraction: ProperFraction
    # Correlation of their thumbnails from which two images are near-duplicates.
    near_duplicate_threshold: Annotated[float, Field(gt=0, le=1)]


@schema
class SplitConfig:
    """Settings of the random splits."""

    seed: Seed


@dataclasses.dataclass(frozen=True)
class PreprocessResult:
    """Result of preprocessing: the prepared images, near-duplicates and excluded images."""

    info: DatasetInfo
    rows: np.ndarray  # (N,) row numbers in the packed data set, in the order of the arrays
    near_duplicates: pd.DataFrame  # path, label, other, other_label: at most `MAX_LISTED_PAIRS` pairs
    pair_count: int  # number of near-duplicate pairs in total
    conflict_count: int  # number of pairs with two different labels, which come first in `near_duplicates`
    excluded: pd.DataFrame  # path, label, reason: images excluded because they would leak between splits
    # test, other: sha256 of test images and of their (near-)duplicates in other splits
    cross_split_duplicates: pd.DataFrame
    notes: list[str]  # remarks about the splits for the user


def prepare(
    packed: PackedDataset, params: PreprocessConfig, seed: int, folder: Path, cache_dir: CacheDir
) -> PreprocessResult:
    """Write `task.json`, `images.parquet` and, for each split, `<split>_pixels.npy` and `<split>_labels.npy`.

    `images.parquet` has a row for each image in the order of the arrays: path, label, sha256, group, split, and the
    other columns of a label table.

    Args:
        packed: The data set to prepare.
        params: Size, channels and splits of the images.
        seed: Seed of the random splits.
        folder: Folder to write to. It must not be the one of `packed`, whose table has the same name and is read
            while this function runs.
        cache_dir: Cache of resized images of an earlier run, which are not resized again. It is updated to this run.

    Returns:
        The description of the prepared data and of the images that were excluded.

    Raises:
        ConvoyError: If no image is left for training, validation or test.
    """
    split_ids, group_split_ids = _split(packed, params, seed)
    pairs = find_near_duplicates(packed, params.near_duplicate_threshold)
    is_repeated = packed.table.read_columns("pixel_hash")["pixel_hash"].duplicated(keep=False)
    # Only the few rows that may be excluded are loaded completely.
    involved = np.union1d(np.flatnonzero(is_repeated | (group_split_ids > split_ids)), pairs)
    table, pairs = packed.table.read_rows(involved), np.searchsorted(involved, pairs)
    cross_split_duplicates = find_cross_split_duplicates(table, split_ids[involved], pairs)
    excluded = exclude_leaks(table, split_ids[involved], group_split_ids[involved], pairs)
    split_ids[excluded.index] = EXCLUDED
    labels = _label_ids(packed)
    notes = [
        *_check_counts(packed, labels, split_ids),
        *_recommend_groups(excluded, len(split_ids)),
        *_note_enlarged(packed, params.size),
    ]
    for split_id, split in enumerate(SPLITS):
        np.save(folder / f"{split}_labels.npy", labels[split_ids == split_id].astype(np.int64))
    ImageTable(folder / IMAGE_TABLE).write(_iter_split_tables(packed, split_ids))

    is_grey = bool((packed.pixel_extents[:, 2] == 1).all())
    channels = params.channels if params.channels != "auto" else 1 if is_grey else 3
    info = _write_images(packed, split_ids, params.size, channels, folder, cache_dir)
    left, right = labels[involved[pairs]].T
    return PreprocessResult(
        info=info,
        rows=np.concatenate([np.flatnonzero(split_ids == split_id) for split_id in range(len(SPLITS))]),
        near_duplicates=_list_pairs(table, pairs),
        pair_count=len(pairs),
        conflict_count=int((left != right).sum()),
        excluded=excluded.reset_index(drop=True),
        cross_split_duplicates=cross_split_duplicates,
        notes=notes,
    )


def prepare_size(packed: PackedDataset, prepared: Path, size: int, folder: Path, cache_dir: CacheDir) -> list[str]:
    """Write the images that `prepare` wrote in another size: their arrays and `task.json`, with the same splits.

    Args:
        packed: The data set that was prepared.
        prepared: Folder that `prepare` wrote.
        size: Height and width, in pixels.
        folder: Folder to write to.
        cache_dir: Cache of resized images of an earlier run, which is updated to this run.

    Returns:
        Remarks for the user.
    """
    table = ImageTable(prepared / IMAGE_TABLE).read_columns("path", "split")
    ids = pd.Series(table["split"].astype(str).map(SPLITS.index).to_numpy(), index=table["path"])
    paths = packed.table.read_columns("path")["path"]
    split_ids = ids.reindex(paths, fill_value=EXCLUDED).to_numpy(np.int8)
    channels = DatasetInfo.load(prepared / DATASET_INFO).channels
    _write_images(packed, split_ids, size, channels, folder, cache_dir)
    for split in SPLITS:
        shutil.copyfile(prepared / f"{split}_labels.npy", folder / f"{split}_labels.npy")
    return _note_enlarged(packed, size, "the size of a network, ")


def _write_images(
    packed: PackedDataset, split_ids: np.ndarray, size: int, channels: int, folder: Path, cache_dir: CacheDir
) -> DatasetInfo:
    """Write the pixels of each split and their description, in the order of the packed data set."""
    files = [folder / f"{split}_pixels.npy" for split in SPLITS]
    mean, std = write_resized(packed, split_ids, (size, size, channels), files, cache_dir).mean_and_std()
    info = DatasetInfo(
        dataset=packed.name,
        classes=packed.classes,
        size=size,
        channels=channels,
        mean=mean,
        std=std,
        longest_side=packed.longest_side,
    )
    info.save(folder / DATASET_INFO)
    return info


def _split(packed: PackedDataset, params: PreprocessConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the result of `assign_groups` for the given or drawn splits."""
    ids = {split: split_id for split_id, split in enumerate(SPLITS)}
    split_ids = [
        draw_splits(chunk, params.test_fraction, params.val_fraction, seed, packed.drawn).map(ids).to_numpy(np.int8)
        for chunk in packed.table.iter_chunks("sha256", "group", "split")
    ]
    return assign_groups(packed.table.read_columns("group", "split"), np.concatenate(split_ids), packed.drawn)


def find_near_duplicates(packed: PackedDataset, min_correlation: float) -> np.ndarray:
    """Find the pairs of near-duplicate images, including identical images in different files.

    Pairs with similar perceptual hashes are candidates; those whose thumbnails correlate enough are kept.

    Args:
        packed: The data set to search.
        min_correlation: Least correlation of the thumbnails, in (0, 1].

    Returns:
        (P, 2) row numbers.
    """
    starts = (
        int(sha256[:16], 16) for chunk in packed.table.iter_chunks("sha256") for sha256 in chunk["sha256"].tolist()
    )
    # Sorted by checksum, the rows give the same pairs whatever the files are called.
    order = np.fromiter(starts, np.uint64, len(packed.table)).argsort(kind="stable")
    pairs = order[find_candidate_pairs(packed.table.read_columns("phash")["phash"].to_numpy()[order])]
    return pairs[confirm_pairs(packed.read_image, pairs, min_correlation)]


def _label_ids(packed: PackedDataset) -> np.ndarray:
    """Return the (N,) int32 index of each row's label in the list of classes."""
    labels = packed.table.read_columns("label")["label"].array
    return np.array([packed.classes.index(name) for name in labels.categories], np.int32)[labels.codes]


def _iter_split_tables(packed: PackedDataset, split_ids: np.ndarray) -> Iterator[pa.Table]:
    """Yield the rows of `images.parquet` in chunks."""
    others = [name for name in pq.read_schema(packed.table.file).names if name.startswith(COLUMN_PREFIX)]
    columns = ["path", "label", "sha256", "group", "split"]
    for split_id, split in enumerate(SPLITS):
        start = 0
        for table in packed.table.iter_tables(*columns, *others):
            chunk = table.filter(split_ids[start : (start := start + len(table))] == split_id)
            yield chunk.set_column(columns.index("split"), "split", pa.array([split] * len(chunk), pa.large_string()))


def _list_pairs(table: pd.DataFrame, pairs: np.ndarray) -> pd.DataFrame:
    """Return path, label, other and other_label of `MAX_LISTED_PAIRS`, those with two different labels first."""
    labels = pd.factorize(table["label"])[0]
    has_same_label = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    left, right = pairs[np.argsort(has_same_label, kind="stable")][:MAX_LISTED_PAIRS].T
    names = ["path", "label"]
    others = table[names].iloc[right].set_axis(["other", "other_label"], axis=1)
    return pd.concat([table[names].iloc[left].reset_index(drop=True), others.reset_index(drop=True)], axis=1)


def read_checksums(table: ImageTable, splits: Collection[str]) -> np.ndarray:
    """Return the sorted sha256 of all images of the given splits.

    The checksums are (N,) S32, 32 bytes each; as text each would take 113 bytes.
    """
    checksums = bytearray()
    for chunk in table.iter_chunks("sha256", "split"):
        checksums += bytes.fromhex("".join(chunk["sha256"][chunk["split"].isin(splits)]))
    return np.sort(np.frombuffer(checksums, "S32"))


def read_test_checksums(folder: Path) -> np.ndarray:
    """Return the sorted sha256 of the test images that `prepare` wrote into a folder.

    The result is (N,) S32, and empty if the table is missing or damaged.
    """
    try:
        return read_checksums(ImageTable(folder / IMAGE_TABLE), ["test"])
    except (OSError, pa.ArrowException):
        return np.empty(0, "S32")


# Notes for the user


def _check_counts(packed: PackedDataset, labels: np.ndarray, split_ids: np.ndarray) -> list[str]:
    """Return notes about classes that lack images in some splits.

    Raises:
        ConvoyError: If a split has no images at all.
    """
    counts = np.zeros((len(packed.classes), len(SPLITS) + 1), np.int64)
    # `EXCLUDED` is -1 and thus counts in the last column.
    np.add.at(counts, (labels, split_ids), 1)
    for split, count in zip(SPLITS, counts.sum(axis=0), strict=False):
        if not count:
            raise ConvoyError(_explain_empty_split(packed, split, len(split_ids), counts[:, EXCLUDED].sum()))
    # Description of what is missing -> class -> note.
    notes: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for label, (*by_split, excluded) in zip(packed.classes, counts.tolist(), strict=True):
        missing = [split for split, count in zip(SPLITS, by_split, strict=True) if not count]
        reference = f", and {excluded} excluded: excluded.csv says why" if excluded else ""
        if not sum(by_split) + excluded:
            note = f"class {label!r} has no image: it stays in the class list, but no network can learn it"
            notes["have no image"][label] = note
        elif missing:
            where = f"no image in {' and '.join(missing)}"
            notes[f"have {where}"][label] = f"class {label!r} has {where}, of {sum(by_split)}{reference}"
    return [
        note
        for lack, by_class in notes.items()
        for note in (
            by_class.values()
            if len(by_class) <= MAX_LISTED_NAMES
            else [f"{len(by_class)} classes {lack}: {truncate_names(list(by_class))}"]
        )
    ]


def _explain_empty_split(packed: PackedDataset, split: str, count: int, excluded: int) -> str:
    """Return the error message for a split without images."""
    groups = set(packed.table.read_columns("group")["group"].unique()) - {""}
    given = sorted(packed.table.read_columns("split")["split"].unique())
    if {"", "train"} & set(given):
        fix = f"add {'groups' if groups else 'images'} to {packed.name}"
        fix += ", or change preprocess.test_fraction and preprocess.val_fraction"
    else:
        fix = f"all of {packed.name} is assigned to {' and '.join(given)}, by names of folders or tables or by a"
        fix += " column; add training images, or remove these splits"
    return (
        f"there is no {split} image left of {count}"
        + (f" in {len(groups)} groups, none of which is divided between splits" if groups else "")
        + (f", {excluded} of which are excluded because of images in other splits" if excluded else "")
        + f": {fix}"
    )


def _recommend_groups(excluded: pd.DataFrame, count: int) -> list[str]:
    """Recommend groups if very many images are excluded as near-duplicates."""
    near_duplicates = int(excluded["reason"].str.startswith(NEAR_DUPLICATE_REASON).sum())
    if near_duplicates < MANY_NEAR_DUPLICATES * count:
        return []
    return [
        f"{near_duplicates} of {count} images are excluded as near-duplicates of images in other splits: if they are"
        " frames of videos, or show the same objects, define groups with dataset.group in conf/dataset/"
    ]


def _note_enlarged(packed: PackedDataset, size: int, setting: str = "preprocess.size=") -> list[str]:
    """Report images that fetch reduced below `size` although their files are larger."""
    count = 0
    for chunk in packed.table.iter_chunks("source_height", "source_width", "height", "width"):
        original, stored = chunk[["source_height", "source_width"]].min(axis=1), chunk[["height", "width"]].min(axis=1)
        count += int((stored < original.clip(upper=size)).sum())
    if not count:
        return []
    return [
        f"{count} of {len(packed.table)} images were reduced to less than {setting}{size} and are enlarged"
        " again: raise dataset.longest_side in conf/dataset/"
    ]
