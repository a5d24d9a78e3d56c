"""Preprocessing: split a packed data set into training, validation and test images of one size."""

import collections
import dataclasses
import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from convoy.core.artifact_names import DATASET_INFO, IMAGE_TABLE
from convoy.core.config import ProperFraction, schema
from convoy.core.errors import ConvoyError
from convoy.core.text import MAX_LISTED_NAMES, truncate_names
from convoy.data.cache import CacheDir
from convoy.data.near_duplicates import candidate_pairs, confirm_pairs
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.data.packed.packed_dataset import COLUMN, SPLITS, ImageTable, PackedDataset
from convoy.data.resize import EXCLUDED, write_resized

LISTED = 10_000  # pairs of near-duplicates
# The fraction of all images, excluded as near-duplicates, from which a note recommends to use groups.
MANY = 0.1
# The start of the reason of every image that is excluded as a near-duplicate.
ALIKE = "nearly equals"


@schema
class PreprocessConfig:
    """Settings of the images and splits that all networks share."""

    size: Annotated[int, Field(ge=32, le=1024)]  # pixels; height and width
    channels: Literal["auto", 1, 3]  # auto: 1 where every image is grey, else 3
    # Fraction of the images without a given split; also of the given training images if no test images are given.
    test_fraction: ProperFraction
    # Fraction of the remaining such images; also of the given training images if no validation images are given.
    val_fraction: ProperFraction
    # Correlation of their thumbnails from which two images are near-duplicates.
    near_duplicate: Annotated[float, Field(gt=0, le=1)]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Result of preprocessing: the prepared images, near-duplicates and excluded images."""

    info: DatasetInfo
    rows: np.ndarray  # (N,) row numbers in the packed data set, in the order of the arrays
    near: pd.DataFrame  # path, label, other, other_label: near-duplicates, at most `LISTED` pairs
    pairs: int  # number of near-duplicate pairs in total
    doubtful: int  # number of pairs with two different labels, which come first in `near`
    withheld: pd.DataFrame  # path, label, reason: images excluded because they would leak between splits
    alike: pd.DataFrame  # test, other: sha256 of test images and of their (near-)duplicates in other splits
    notes: list[str]  # remarks about the splits for the user


def prepare(packed: PackedDataset, params: PreprocessConfig, seed: int, folder: Path, earlier: CacheDir) -> Prepared:
    """Write `task.json`, `images.parquet` and, for each split, `<split>_pixels.npy` and `<split>_labels.npy`.

    `images.parquet` has a row for each image in the order of the arrays: path, label, sha256, group, split, and the
    other columns of a label table.

    Args:
        packed: The data set to prepare.
        params: Size, channels and splits of the images.
        seed: Seed of the random splits.
        folder: Folder to write to. It must not be the one of `packed`, whose table has the same name and is read
            while this function runs.
        earlier: Cache of resized images of an earlier run, which are not resized again. It is updated to this run.

    Returns:
        The description of the prepared data and of the images that were excluded.

    Raises:
        ConvoyError: If no image is left for training, validation or test.
    """
    sides, groups = _sides(packed, params, seed)
    near = near_duplicates(packed, params.near_duplicate)
    shared = packed.rows.columns("picture")["picture"].duplicated(keep=False)
    # Only the few rows that may be excluded are loaded completely.
    involved = np.union1d(np.flatnonzero(shared | (groups > sides)), near)
    some, near = packed.rows.at(involved), np.searchsorted(involved, near)
    alike = cross_split_duplicates(some, sides[involved], near)
    withheld = exclude_leaks(some, sides[involved], groups[involved], near)
    sides[withheld.index] = EXCLUDED
    labels = _labels(packed)
    notes = [*_notes(packed, labels, sides), *_alike(withheld, len(sides)), *_enlarged(packed, params.size)]
    one, other = labels[involved[near]].T

    for side, name in enumerate(SPLITS):
        np.save(folder / f"{name}_labels.npy", labels[sides == side].astype(np.int64))
    ImageTable(folder / IMAGE_TABLE).write(_tables(packed, sides))

    grey = bool((packed.places[:, 2] == 1).all())
    channels = params.channels if params.channels != "auto" else 1 if grey else 3
    files = [folder / f"{name}_pixels.npy" for name in SPLITS]
    sums = write_resized(packed, sides, (params.size, params.size, channels), files, earlier)
    mean, std = sums.mean_and_std()
    info = DatasetInfo(
        dataset=packed.name,
        classes=packed.classes,
        size=params.size,
        channels=channels,
        mean=mean,
        std=std,
        longest_side=packed.longest_side,
    )
    info.save(folder / DATASET_INFO)
    rows = np.concatenate([np.flatnonzero(sides == side) for side in range(len(SPLITS))])
    listed = _named(some, near)
    withheld, doubtful = withheld.reset_index(drop=True), int((one != other).sum())
    return Prepared(info, rows, listed, len(near), doubtful, withheld, alike, notes)


def _sides(packed: PackedDataset, params: PreprocessConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the result of `assign_groups` for the given or drawn splits."""
    places = {name: place for place, name in enumerate(SPLITS)}
    pieces = packed.rows.pieces("sha256", "group", "split")
    sides = [split_ids(piece, params, seed, packed.drawn).map(places).to_numpy(np.int8) for piece in pieces]
    return assign_groups(packed.rows.columns("group", "split"), np.concatenate(sides), packed.drawn)


def assign_groups(said: pd.DataFrame, sides: np.ndarray, drawn: Collection[str]) -> tuple[np.ndarray, np.ndarray]:
    """Move the rows of a group to one split, the furthest from training that any of its rows is in.

    Only rows whose split is drawn are moved. A row to which the source gives another split keeps it.

    Args:
        said: Columns group and split (N rows) as the source gives them; "" means none.
        sides: (N,) indices into `SPLITS`, the split of each row by itself.
        drawn: Splits that are drawn from images given for training, too.

    Returns:
        Two (N,) arrays of indices into `SPLITS`: the split of each row, and the split of its group that is the furthest
        from training. For rows without a group both are the same.
    """
    groups = said["group"].astype("category").array
    furthest = np.zeros(len(groups.categories), np.int8)
    np.maximum.at(furthest, groups.codes, sides)
    together = np.where(said["group"] == "", sides, furthest[groups.codes])
    to_drawn = np.isin(together, [SPLITS.index(split) for split in drawn])
    free = (said["split"] == "") | ((said["split"] == "train") & to_drawn)
    return np.where(free, together, sides), together


def _labels(packed: PackedDataset) -> np.ndarray:
    """Return the (N,) int32 index of each row's label in the list of classes."""
    labels = packed.rows.columns("label")["label"].array
    return np.array([packed.classes.index(name) for name in labels.categories], np.int32)[labels.codes]


def _tables(packed: PackedDataset, sides: np.ndarray) -> Iterator[pa.Table]:
    """Yield the rows of `images.parquet` in chunks."""
    more = [name for name in pq.read_schema(packed.rows.file).names if name.startswith(COLUMN)]
    said = ["path", "label", "sha256", "group", "split"]
    for side, name in enumerate(SPLITS):
        start = 0
        for table in packed.rows.tables(*said, *more):
            here = table.filter(sides[start : (start := start + len(table))] == side)
            yield here.set_column(said.index("split"), "split", pa.array([name] * len(here), pa.large_string()))


def _named(table: pd.DataFrame, near: np.ndarray) -> pd.DataFrame:
    """Return path, label, other and other_label of at most `LISTED` pairs, those with two different labels first."""
    labels = pd.factorize(table["label"])[0]
    one, other = near[np.argsort(labels[near[:, 0]] == labels[near[:, 1]], kind="stable")][:LISTED].T
    names = ["path", "label"]
    others = table[names].iloc[other].set_axis(["other", "other_label"], axis=1)
    return pd.concat([table[names].iloc[one].reset_index(drop=True), others.reset_index(drop=True)], axis=1)


def split_ids(table: pd.DataFrame, params: PreprocessConfig, seed: int, drawn: Collection[str]) -> pd.Series:
    """Assign each row to train, val or test.

    A split that the source gives is kept. Otherwise the split follows from a hash of the seed and the name of the
    image's group, or the checksum of its file if it has no group. So new images never move an old one.

    Args:
        table: Columns sha256, group and split; "" means no group and no given split.
        params: Fractions of the validation and test images.
        seed: Seed of the random splits.
        drawn: Splits that are drawn from images given for training, too.

    Returns:
        The name of the split of each row, with the index of `table`.
    """
    keys = zip(table["sha256"].tolist(), table["group"].tolist(), strict=True)
    key = _uniform([f"{seed}:group:{group}" if group else f"{seed}:{digest}" for digest, group in keys])
    training = (table["split"] == "train").to_numpy()
    test = np.where(training & ("test" not in drawn), 0.0, params.test_fraction)
    val = np.where(training & ("val" not in drawn), 0.0, params.val_fraction)
    sides = pd.Series("train", index=table.index)
    sides[key < test + (1 - test) * val] = "val"
    sides[key < test] = "test"
    return sides.where(training | (table["split"] == ""), table["split"])


def _uniform(texts: list[str]) -> np.ndarray:
    """Hash N texts to (N,) float64 numbers, uniform in [0, 1)."""
    starts = b"".join([hashlib.sha256(text.encode()).digest()[:8] for text in texts])
    return np.frombuffer(starts, ">u8") / 2.0**64


def digests_of(rows: ImageTable, splits: Collection[str]) -> np.ndarray:
    """Return the sorted sha256 of all images of the given splits.

    The checksums are (N,) S32, 32 bytes each; as text each would take 113 bytes.
    """
    found = bytearray()
    for piece in rows.pieces("sha256", "split"):
        found += bytes.fromhex("".join(piece["sha256"][piece["split"].isin(splits)]))
    return np.sort(np.frombuffer(found, "S32"))


def tested_in(folder: Path) -> np.ndarray:
    """Return the sorted sha256 of the test images that `prepare` wrote into a folder.

    The result is (N,) S32, and empty if the table is missing or damaged.
    """
    try:
        return digests_of(ImageTable(folder / IMAGE_TABLE), ["test"])
    except (OSError, pa.ArrowException):
        return np.empty(0, "S32")


def near_duplicates(packed: PackedDataset, least: float) -> np.ndarray:
    """Find the pairs of near-duplicate images, including identical images in different files.

    Pairs with similar perceptual hashes are candidates; those whose thumbnails correlate by at least `least` are kept.

    Args:
        packed: The data set to search.
        least: Least correlation of the thumbnails, in (0, 1].

    Returns:
        (P, 2) row numbers.
    """
    starts = (int(digest[:16], 16) for piece in packed.rows.pieces("sha256") for digest in piece["sha256"].tolist())
    # Sorted by checksum, the rows give the same pairs whatever the files are called.
    order = np.fromiter(starts, np.uint64, len(packed.rows)).argsort(kind="stable")
    pairs = order[candidate_pairs(packed.rows.columns("phash")["phash"].to_numpy()[order])]
    return pairs[confirm_pairs(packed.image, pairs, least)]


def exclude_leaks(table: pd.DataFrame, sides: np.ndarray, together: np.ndarray, near: np.ndarray) -> pd.DataFrame:
    """Find the images that must be excluded because they would leak between splits.

    Three kinds of images are excluded:

    * images of a group to which the source gives several splits, except those in its split furthest from training;
    * the image nearer to training of two near-duplicates in different splits. Moving it to the other split instead
      would mean that new images move old ones: no rule that sees only the images can keep both where they are;
    * all but one of the files with identical pixels.

    Args:
        table: N rows with the columns path, label, sha256, group and picture (the pixel hash).
        sides: (N,) indices into `SPLITS`, the split of each row.
        together: (N,) indices into `SPLITS`, the split of each row's group that is the furthest from training.
        near: (P, 2) row positions of near-duplicates.

    Returns:
        path, label and reason of each excluded image, with its index in `table`.
    """
    apart = sides < together
    reasons: dict[Any, str] = {
        row: f"is of the group {group!r}, of which there are {SPLITS[side]} images"
        for row, group, side in zip(table.index[apart], table["group"][apart], together[apart], strict=True)
    }
    several = table.assign(rank=-sides)[~apart]
    several = several[several["picture"].duplicated(keep=False)].sort_values(["rank", "sha256"])
    first = several.drop_duplicates("picture").set_index("picture")["path"]
    same = several.loc[several["picture"].duplicated(), "picture"].map(first)
    reasons |= {row: f"shows the same picture as {path}" for row, path in same.items()}

    one, other = near[~apart[near].any(axis=1)].T
    swapped = sides[one] > sides[other]
    lower, upper = np.where(swapped, other, one), np.where(swapped, one, other)
    across = np.flatnonzero(sides[lower] < sides[upper])
    # One near-duplicate is enough as the reason for an image.
    across = across[np.unique(lower[across], return_index=True)[1]]
    for row, like in zip(lower[across], upper[across], strict=True):
        reasons.setdefault(table.index[row], f"{ALIKE} the {SPLITS[sides[like]]} image {table['path'].iat[like]}")
    rows = sorted(reasons)
    reason = pd.Series([reasons[row] for row in rows], index=rows, dtype="str")
    return table.loc[rows, ["path", "label"]].assign(reason=reason)


def cross_split_duplicates(table: pd.DataFrame, sides: np.ndarray, near: np.ndarray) -> pd.DataFrame:
    """List the test images that have a duplicate or near-duplicate in another split.

    An earlier model may have been trained on such a duplicate, and so know the test image.

    Args:
        table: N rows with the columns sha256 and picture (the pixel hash).
        sides: (N,) indices into `SPLITS`, the split of each row.
        near: (P, 2) row positions of near-duplicates.

    Returns:
        Categorical columns test and other: the sha256 of a test image, and of its duplicate in another split.
    """
    is_test = sides == SPLITS.index("test")
    rows = pd.DataFrame({"row": np.arange(len(table)), "picture": table["picture"].to_numpy()})
    same = rows[is_test].merge(rows[~is_test], on="picture")[["row_x", "row_y"]].to_numpy()
    test, other = np.concatenate([same, near, near[:, ::-1]]).T
    across = is_test[test] & ~is_test[other]
    codes, digests = pd.factorize(table["sha256"])
    found = {"test": codes[test[across]], "other": codes[other[across]]}
    return pd.DataFrame({name: pd.Categorical.from_codes(each, digests) for name, each in found.items()})


def _notes(packed: PackedDataset, labels: np.ndarray, sides: np.ndarray) -> list[str]:
    counts = np.zeros((len(packed.classes), len(SPLITS) + 1), np.int64)
    # `EXCLUDED` is -1 and thus counts in the last column.
    np.add.at(counts, (labels, sides), 1)
    for name, images in zip(SPLITS, counts.sum(axis=0), strict=False):
        if not images:
            groups = set(packed.rows.columns("group")["group"].unique()) - {""}
            withheld = counts[:, EXCLUDED].sum()
            given = sorted(packed.rows.columns("split")["split"].unique())
            if {"", "train"} & set(given):
                mend = f"{packed.name} needs more {'groups' if groups else 'images'}"
                mend += " (or other fractions in preprocess.test_fraction and preprocess.val_fraction)"
            else:
                mend = f"all of {packed.name} is given for {' and '.join(given)}, by names of folders or tables or by a"
                mend += " column; give images for training, or leave the splits out"
            raise ConvoyError(
                f"there is no {name} image left of {len(sides)}"
                + (f" in {len(groups)} groups, each of which stays together" if groups else "")
                + (f", {withheld} of them withheld for what is on another side" if withheld else "")
                + f": {mend}"
            )
    # Description of what is missing -> class -> note.
    notes: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for label, (*here, withheld) in zip(packed.classes, counts.tolist(), strict=True):
        missing = [name for name, images in zip(SPLITS, here, strict=True) if not images]
        left = f", and {withheld} excluded: excluded.csv says why" if withheld else ""
        if not sum(here) + withheld:
            note = f"class {label!r} has no image: the networks keep its place, and can't learn it"
            notes["have no image"][label] = note
        elif missing:
            where = f"no image in {' and '.join(missing)}"
            notes[f"have {where}"][label] = f"class {label!r} has {where}, of {sum(here)}{left}"
    return [
        note
        for lack, each in notes.items()
        for note in (
            each.values()
            if len(each) <= MAX_LISTED_NAMES
            else [f"{len(each)} classes {lack}: {truncate_names(list(each))}"]
        )
    ]


def _alike(withheld: pd.DataFrame, count: int) -> list[str]:
    """Recommend groups if very many images are excluded as near-duplicates."""
    alike = int(withheld["reason"].str.startswith(ALIKE).sum())
    if alike < MANY * count:
        return []
    return [
        f"{alike} of {count} images are withheld, as they look like others on another side: if they are frames"
        " of videos, or pictures of the same things, say which belong together by dataset.group in conf/dataset/"
    ]


def _enlarged(packed: PackedDataset, size: int) -> list[str]:
    """Report images that fetch reduced below `size` although their files are larger."""
    count = 0
    for piece in packed.rows.pieces("source_height", "source_width", "height", "width"):
        given, kept = piece[["source_height", "source_width"]].min(axis=1), piece[["height", "width"]].min(axis=1)
        count += int((kept < given.clip(upper=size)).sum())
    if not count:
        return []
    return [
        f"{count} of {len(packed.rows)} images were reduced to less than preprocess.size={size} and are enlarged again:"
        " raise dataset.longest_side in conf/dataset/"
    ]
