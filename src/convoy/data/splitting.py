"""The rules that decide which images train, validate and test, without leaks between these splits."""

import hashlib
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd

from convoy.data.packed.packed_dataset import SPLITS

# The start of the reason of every image that is excluded as a near-duplicate.
NEAR_DUPLICATE_REASON = "is a near-duplicate of"


def draw_splits(
    table: pd.DataFrame, test_fraction: float, val_fraction: float, seed: int, drawn: Collection[str]
) -> pd.Series:
    """Assign each row to train, val or test.

    A split that the source gives is kept. Otherwise the split follows from a hash of the seed and the name of the
    image's group, or the checksum of its file if it has no group. So new images never move an old one.

    Args:
        table: Columns sha256, group and split; "" means no group and no given split.
        test_fraction: Fraction of the images to draw for test.
        val_fraction: Fraction of the remaining images to draw for validation.
        seed: Seed of the random splits.
        drawn: Splits that are drawn from images given for training, too.

    Returns:
        The name of the split of each row, with the index of `table`.
    """
    keys = zip(table["sha256"].tolist(), table["group"].tolist(), strict=True)
    position = _hash_uniformly([f"{seed}:group:{group}" if group else f"{seed}:{sha256}" for sha256, group in keys])
    is_training = (table["split"] == "train").to_numpy()
    test = np.where(is_training & ("test" not in drawn), 0.0, test_fraction)
    val = np.where(is_training & ("val" not in drawn), 0.0, val_fraction)
    splits = pd.Series("train", index=table.index)
    splits[position < test + (1 - test) * val] = "val"
    splits[position < test] = "test"
    return splits.where(is_training | (table["split"] == ""), table["split"])


def _hash_uniformly(texts: list[str]) -> np.ndarray:
    """Hash N texts to (N,) float64 numbers, uniform in [0, 1)."""
    starts = b"".join([hashlib.sha256(text.encode()).digest()[:8] for text in texts])
    return np.frombuffer(starts, ">u8") / 2.0**64


def assign_groups(given: pd.DataFrame, split_ids: np.ndarray, drawn: Collection[str]) -> tuple[np.ndarray, np.ndarray]:
    """Move the rows of a group to one split, the furthest from training that any of its rows is in.

    Only rows whose split is drawn are moved. A row to which the source gives another split keeps it.

    Args:
        given: Columns group and split (N rows) as the source gives them; "" means none.
        split_ids: (N,) indices into `SPLITS`, the split of each row by itself.
        drawn: Splits that are drawn from images given for training, too.

    Returns:
        Two (N,) arrays of indices into `SPLITS`: the split of each row, and the split of its group that is the furthest
        from training. For rows without a group both are the same.
    """
    groups = given["group"].astype("category").array
    furthest = np.zeros(len(groups.categories), np.int8)
    np.maximum.at(furthest, groups.codes, split_ids)
    group_split_ids = np.where(given["group"] == "", split_ids, furthest[groups.codes])
    is_drawn = np.isin(group_split_ids, [SPLITS.index(split) for split in drawn])
    is_free = (given["split"] == "") | ((given["split"] == "train") & is_drawn)
    return np.where(is_free, group_split_ids, split_ids), group_split_ids


def exclude_leaks(
    table: pd.DataFrame, split_ids: np.ndarray, group_split_ids: np.ndarray, pairs: np.ndarray
) -> pd.DataFrame:
    """Find the images that must be excluded because they would leak between splits.

    Three kinds of images are excluded:

    * images of a group to which the source gives several splits, except those in its split furthest from training;
    * the image nearer to training of two near-duplicates in different splits. Moving it to the other split instead
      would mean that new images move old ones: no rule that sees only the images can keep both where they are;
    * all but one of the files with identical pixels.

    Args:
        table: N rows with the columns path, label, sha256, group and pixel_hash.
        split_ids: (N,) indices into `SPLITS`, the split of each row.
        group_split_ids: (N,) indices into `SPLITS`, the split of each row's group that is the furthest from training.
        pairs: (P, 2) row positions of near-duplicates.

    Returns:
        path, label and reason of each excluded image, with its index in `table`.
    """
    is_separated = split_ids < group_split_ids
    reasons: dict[Any, str] = {
        row: f"is in the group {group!r}, which has {SPLITS[split]} images"
        for row, group, split in zip(
            table.index[is_separated], table["group"][is_separated], group_split_ids[is_separated], strict=True
        )
    }
    rest = table.assign(rank=-split_ids)[~is_separated]
    repeated = rest[rest["pixel_hash"].duplicated(keep=False)].sort_values(["rank", "sha256"])
    kept_path = repeated.drop_duplicates("pixel_hash").set_index("pixel_hash")["path"]
    same = repeated.loc[repeated["pixel_hash"].duplicated(), "pixel_hash"].map(kept_path)
    reasons |= {row: f"has the same pixels as {path}" for row, path in same.items()}

    left, right = pairs[~is_separated[pairs].any(axis=1)].T
    is_swapped = split_ids[left] > split_ids[right]
    nearer, further = np.where(is_swapped, right, left), np.where(is_swapped, left, right)
    leaks = np.flatnonzero(split_ids[nearer] < split_ids[further])
    # One near-duplicate is enough as the reason for an image.
    leaks = leaks[np.unique(nearer[leaks], return_index=True)[1]]
    for row, other in zip(nearer[leaks], further[leaks], strict=True):
        reason = f"{NEAR_DUPLICATE_REASON} the {SPLITS[split_ids[other]]} image {table['path'].iat[other]}"
        reasons.setdefault(table.index[row], reason)
    rows = sorted(reasons)
    return table.loc[rows, ["path", "label"]].assign(
        reason=pd.Series([reasons[row] for row in rows], index=rows, dtype="str")
    )


def find_cross_split_duplicates(table: pd.DataFrame, split_ids: np.ndarray, pairs: np.ndarray) -> pd.DataFrame:
    """Find the test images that have a duplicate or near-duplicate in another split.

    An earlier model may have been trained on such a duplicate, and so know the test image.

    Args:
        table: N rows with the columns sha256 and pixel_hash.
        split_ids: (N,) indices into `SPLITS`, the split of each row.
        pairs: (P, 2) row positions of near-duplicates.

    Returns:
        Categorical columns test and other: the sha256 of a test image, and of its duplicate in another split.
    """
    is_test = split_ids == SPLITS.index("test")
    rows = pd.DataFrame({"row": np.arange(len(table)), "pixel_hash": table["pixel_hash"].to_numpy()})
    same = rows[is_test].merge(rows[~is_test], on="pixel_hash")[["row_x", "row_y"]].to_numpy()
    test, other = np.concatenate([same, pairs, pairs[:, ::-1]]).T
    is_across = is_test[test] & ~is_test[other]
    codes, checksums = pd.factorize(table["sha256"])
    duplicates = {"test": codes[test[is_across]], "other": codes[other[is_across]]}
    return pd.DataFrame({name: pd.Categorical.from_codes(column, checksums) for name, column in duplicates.items()})


def describe_groups(table: pd.DataFrame) -> str:
    """Describe how many groups each split has, and whether a group is in two splits; "" if there are no groups.

    Args:
        table: Columns group ("" for none) and split of all prepared images.
    """
    pairs = table.loc[table["group"] != "", ["group", "split"]].drop_duplicates()
    if pairs.empty:
        return ""
    counts = ", ".join(f"{(pairs['split'] == split).sum():,} {split}" for split in SPLITS)
    shared = pairs.loc[pairs["group"].duplicated(), "group"].nunique()
    ungrouped = int((table["group"] == "").sum())
    rest = f"; {ungrouped:,} images are in no group" if ungrouped else ""
    return f"{pairs['group'].nunique():,} groups: {counts}; {shared or 'none'} of them in two splits{rest}"
