"""Preprocessing: from a packed data set to images of one size, split for training, validation and test."""

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

from convoy.config import Fraction, schema
from convoy.data.cache import CacheDir
from convoy.data.dataset_info import DatasetInfo
from convoy.data.near_duplicates import candidate_pairs, confirm_pairs
from convoy.data.packed_dataset import COLUMN, SPLITS, TABLE, ImageTable, PackedDataset
from convoy.data.resize import EXCLUDED, write_resized
from convoy.errors import ConvoyError
from convoy.text import FEW, truncate_names

LISTED = 10_000  # pairs of near duplicates
MANY = 0.1  # of all images, withheld for their looks
ALIKE = "nearly equals"  # is how their reasons begin


@schema
class PreprocessConfig:
    """What every network is given."""

    size: Annotated[int, Field(ge=32, le=1024)]  # pixels; height and width
    channels: Literal["auto", 1, 3]  # auto: 1 where every image is grey, else 3
    test_fraction: Fraction  # of images without a split of their own, and of those for training where none is for test
    val_fraction: Fraction  # of the others of these, and of those for training where none is for val
    near_duplicate: Annotated[float, Field(gt=0, le=1)]  # correlation of thumbnails from which two images count as one


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the networks are given, and what was kept from them."""

    task: DatasetInfo
    rows: np.ndarray  # of the packed data set, in the order of the arrays
    near: pd.DataFrame  # path, label, other, other_label: images that nearly equal each other, the first `LISTED` pairs
    pairs: int  # of such images, in all
    doubtful: int  # those under two labels, which are listed first
    withheld: pd.DataFrame  # path, label, reason: images that would have shown a network what it is judged by
    alike: pd.DataFrame  # test, other: sha256 of test images, and of files on other sides that show the same or nearly
    notes: list[str]  # what is worth knowing about the split, in words


def prepare(packed: PackedDataset, params: PreprocessConfig, seed: int, folder: Path, earlier: CacheDir) -> Prepared:
    """Write `task.json`, `images.parquet` and, for each split, `<split>_pixels.npy` and `<split>_labels.npy`.

    `folder` is not the one of `packed`, whose table has the same name and is read as it is needed. What an earlier run
    left in `earlier` is not resized again; where this one has put what is left there.

    `images.parquet` has a row for each image in the order of the arrays: path, label, sha256, group, split, and the
    other columns of a table of labels.
    Raises ConvoyError where no image is left to train, validate or test with.
    """
    sides, groups = _sides(packed, params, seed)
    near = near_duplicates(packed, params.near_duplicate)
    shared = packed.rows.columns("picture")["picture"].duplicated(keep=False)
    involved = np.union1d(np.flatnonzero(shared | (groups > sides)), near)  # few of all rows
    some, near = packed.rows.at(involved), np.searchsorted(involved, near)
    alike = cross_split_duplicates(some, sides[involved], near)
    withheld = exclude_leaks(some, sides[involved], groups[involved], near)
    sides[withheld.index] = EXCLUDED
    labels = _labels(packed)
    notes = [*_notes(packed, labels, sides), *_alike(withheld, len(sides)), *_enlarged(packed, params.size)]
    one, other = labels[involved[near]].T

    for side, name in enumerate(SPLITS):
        np.save(folder / f"{name}_labels.npy", labels[sides == side].astype(np.int64))
    ImageTable(folder / TABLE).write(_tables(packed, sides))

    grey = bool((packed.places[:, 2] == 1).all())
    channels = params.channels if params.channels != "auto" else 1 if grey else 3
    files = [folder / f"{name}_pixels.npy" for name in SPLITS]
    sums = write_resized(packed, sides, (params.size, params.size, channels), files, earlier)
    mean, std = sums.mean_and_std()
    task = DatasetInfo(
        dataset=packed.name,
        classes=packed.classes,
        size=params.size,
        channels=channels,
        mean=mean,
        std=std,
        longest_side=packed.longest_side,
    )
    task.save(folder / "task.json")
    rows = np.concatenate([np.flatnonzero(sides == side) for side in range(len(SPLITS))])
    listed = _named(some, near)
    withheld, doubtful = withheld.reset_index(drop=True), int((one != other).sum())
    return Prepared(task, rows, listed, len(near), doubtful, withheld, alike, notes)


def _sides(packed: PackedDataset, params: PreprocessConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As `assign_groups`, of the split that is given or drawn."""
    places = {name: place for place, name in enumerate(SPLITS)}
    pieces = packed.rows.pieces("sha256", "group", "split")
    sides = [split_ids(piece, params, seed, packed.drawn).map(places).to_numpy(np.int8) for piece in pieces]
    return assign_groups(packed.rows.columns("group", "split"), np.concatenate(sides), packed.drawn)


def assign_groups(said: pd.DataFrame, sides: np.ndarray, drawn: Collection[str]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) and (N,), places in `SPLITS`: each row's own, and the one of its group that is the furthest from training.

    `said` are the groups and splits of the source. To the furthest side go all of a group that the source gives no
    split; a row to which it gives another stays where it is, below the furthest. In no group, both are the same.
    """
    groups = said["group"].astype("category").array
    furthest = np.zeros(len(groups.categories), np.int8)
    np.maximum.at(furthest, groups.codes, sides)
    together = np.where(said["group"] == "", sides, furthest[groups.codes])
    to_drawn = np.isin(together, [SPLITS.index(split) for split in drawn])
    free = (said["split"] == "") | ((said["split"] == "train") & to_drawn)
    return np.where(free, together, sides), together


def _labels(packed: PackedDataset) -> np.ndarray:
    """(N,): each row's place in the list of classes."""
    labels = packed.rows.columns("label")["label"].array
    return np.array([packed.classes.index(name) for name in labels.categories], np.int32)[labels.codes]


def _tables(packed: PackedDataset, sides: np.ndarray) -> Iterator[pa.Table]:
    """The rows of `images.parquet`, some at a time."""
    more = [name for name in pq.read_schema(packed.rows.file).names if name.startswith(COLUMN)]
    said = ["path", "label", "sha256", "group", "split"]
    for side, name in enumerate(SPLITS):
        start = 0
        for table in packed.rows.tables(*said, *more):
            here = table.filter(sides[start : (start := start + len(table))] == side)
            yield here.set_column(said.index("split"), "split", pa.array([name] * len(here), pa.large_string()))


def _named(table: pd.DataFrame, near: np.ndarray) -> pd.DataFrame:
    """path, label, other and other_label of each pair; those under two labels first, and at most `LISTED`."""
    labels = pd.factorize(table["label"])[0]
    one, other = near[np.argsort(labels[near[:, 0]] == labels[near[:, 1]], kind="stable")][:LISTED].T
    names = ["path", "label"]
    others = table[names].iloc[other].set_axis(["other", "other_label"], axis=1)
    return pd.concat([table[names].iloc[one].reset_index(drop=True), others.reset_index(drop=True)], axis=1)


def split_ids(table: pd.DataFrame, params: PreprocessConfig, seed: int, drawn: Collection[str]) -> pd.Series:
    """train, val or test for each row. A split that the source gives stands; else it follows from the image's file.

    From the name of its group, where it has one. So new images never move an old one. `drawn` are the splits that are
    drawn from images given for training, too.
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
    """(N,) numbers in [0, 1) that follow from the texts."""
    starts = b"".join([hashlib.sha256(text.encode()).digest()[:8] for text in texts])
    return np.frombuffer(starts, ">u8") / 2.0**64


def digests_of(rows: ImageTable, splits: Collection[str]) -> np.ndarray:
    """(N,) S32: the sha256 of each image on these sides, in their order; a text would take 113 bytes for each."""
    found = bytearray()
    for piece in rows.pieces("sha256", "split"):
        found += bytes.fromhex("".join(piece["sha256"][piece["split"].isin(splits)]))
    return np.sort(np.frombuffer(found, "S32"))


def tested_in(folder: Path) -> np.ndarray:
    """As `digests_of`, the test images that `prepare` wrote into a folder; none where it is gone or damaged."""
    try:
        return digests_of(ImageTable(folder / TABLE), ["test"])
    except (OSError, pa.ArrowException):
        return np.empty(0, "S32")


def near_duplicates(packed: PackedDataset, least: float) -> np.ndarray:
    """(P, 2): the pairs of rows that nearly equal each other, the same picture in another file among them.

    Those whose perceptual hashes are near are looked at: the thumbnails of near duplicates correlate by `least`.
    """
    starts = (int(digest[:16], 16) for piece in packed.rows.pieces("sha256") for digest in piece["sha256"].tolist())
    order = np.fromiter(starts, np.uint64, len(packed.rows)).argsort(kind="stable")  # so that names decide nothing
    pairs = order[candidate_pairs(packed.rows.columns("phash")["phash"].to_numpy()[order])]
    return pairs[confirm_pairs(packed.image, pairs, least)]


def exclude_leaks(table: pd.DataFrame, sides: np.ndarray, together: np.ndarray, near: np.ndarray) -> pd.DataFrame:
    """path, label and reason of the images that must not be used on their side, by their index.

    `sides` (N,) are places in `SPLITS`, and so are `together`, those of their groups that are the furthest from
    training: where the source gives one group several, only those images of it are used. Of two near duplicates, rows
    in `near` (P, 2), on different sides the one that is nearer to training is left out. To move it instead would mean
    that new images move old ones: no rule that looks at the images alone can keep both where they are. Of two files
    with the same picture one is enough.
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
    across = across[np.unique(lower[across], return_index=True)[1]]  # one of those that it is like is enough
    for row, like in zip(lower[across], upper[across], strict=True):
        reasons.setdefault(table.index[row], f"{ALIKE} the {SPLITS[sides[like]]} image {table['path'].iat[like]}")
    rows = sorted(reasons)
    reason = pd.Series([reasons[row] for row in rows], index=rows, dtype="str")
    return table.loc[rows, ["path", "label"]].assign(reason=reason)


def cross_split_duplicates(table: pd.DataFrame, sides: np.ndarray, near: np.ndarray) -> pd.DataFrame:
    """test and other, categories of sha256: each test image, and each file on another side that nearly equals it or
    has the same picture.

    Of such a file an earlier model may have learned what this image shows.
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
    np.add.at(counts, (labels, sides), 1)  # NOWHERE is the last
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
    notes: dict[str, dict[str, str]] = collections.defaultdict(dict)  # what is missing -> class -> the note on it
    for label, (*here, withheld) in zip(packed.classes, counts.tolist(), strict=True):
        missing = [name for name, images in zip(SPLITS, here, strict=True) if not images]
        left = f", and {withheld} withheld: withheld.csv says why" if withheld else ""
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
            each.values() if len(each) <= FEW else [f"{len(each)} classes {lack}: {truncate_names(list(each))}"]
        )
    ]


def _alike(withheld: pd.DataFrame, count: int) -> list[str]:
    """What is said where very many images are withheld for their looks."""
    alike = int(withheld["reason"].str.startswith(ALIKE).sum())
    if alike < MANY * count:
        return []
    return [
        f"{alike} of {count} images are withheld, as they look like others on another side: if they are frames"
        " of videos, or pictures of the same things, say which belong together by dataset.group in conf/dataset/"
    ]


def _enlarged(packed: PackedDataset, size: int) -> list[str]:
    """What is said of images of which fetch kept less than is asked for, though there was more."""
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
