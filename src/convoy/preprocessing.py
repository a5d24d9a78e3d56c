"""Preprocessing: from a packed data set to images of one size, split for training, validation and test."""

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import Field
from tqdm import tqdm

from convoy.config import ConvoyError, Fraction, schema
from convoy.datasets import Packed
from convoy.images import fit
from convoy.task import Task, measure

SPLITS = ("train", "val", "test")


@schema
class Preprocess:
    """What every network is given."""

    size: Annotated[int, Field(ge=32, le=1024)]  # pixels; height and width
    channels: Literal["auto", 1, 3]  # auto: 1 where every image is grey, else 3
    test_fraction: Fraction  # of all images, where the source has no test split of its own
    val_fraction: Fraction  # of the images that are left to train with, where the source has no val split of its own


def prepare(packed: Packed, params: Preprocess, seed: int, folder: Path) -> Task:
    """Write `task.json`, `images.parquet` and, for each split, `<split>_pixels.npy` and `<split>_labels.npy`.

    `images.parquet` has a row for each image in the order of the arrays: path, label, split, sha256.
    Raises ConvoyError where a class has too few images to train, validate and test.
    """
    splits = split(packed.table, params, seed)
    _check_counts(packed, splits)
    grey = bool((packed.table["channels"] == 1).all())
    channels = params.channels if params.channels != "auto" else 1 if grey else 3

    shape = (params.size, params.size, channels)
    arrays = {
        name: np.lib.format.open_memmap(
            folder / f"{name}_pixels.npy", "w+", np.uint8, (int((splits == name).sum()), *shape)
        )
        for name in SPLITS
    }
    filled = dict.fromkeys(SPLITS, 0)
    images = tqdm(packed.images(), "preprocess", len(packed.table), unit=" images", mininterval=1)
    for name, pixels in zip(splits, images, strict=True):
        arrays[name][filled[name]] = fit(pixels, params.size, channels)
        filled[name] += 1

    labels = packed.table["label"].map({name: label for label, name in enumerate(packed.classes)}).astype("int64")
    for name, array in arrays.items():
        array.flush()
        np.save(folder / f"{name}_labels.npy", labels[splits == name].to_numpy())
    table = packed.table[["path", "label", "sha256"]].assign(split=splits)
    table = pd.concat([table[table["split"] == name] for name in SPLITS], ignore_index=True)
    table.to_parquet(folder / "images.parquet", index=False)

    mean, std = measure(arrays["train"])
    task = Task(dataset=packed.name, classes=packed.classes, size=params.size, channels=channels, mean=mean, std=std)
    task.save(folder / "task.json")
    return task


def split(table: pd.DataFrame, params: Preprocess, seed: int) -> pd.Series:
    """train, val or test for each row. A split that the source gives stands; else it follows from what the image shows.

    So new images never move an old one, and two copies of an image are always on the same side.
    """
    given = set(table["split"]) - {""}
    test = 0.0 if "test" in given else params.test_fraction
    val = 0.0 if "val" in given else params.val_fraction
    free = table["split"].isin(["", "train"]) if given else pd.Series(True, index=table.index)

    key = table["sha256"].map(lambda digest: _uniform(f"{seed}:{digest}"))
    drawn = pd.Series("train", index=table.index)
    drawn[key < test + (1 - test) * val] = "val"
    drawn[key < test] = "test"
    return drawn.where(free, table["split"])


def _uniform(text: str) -> float:
    """A number in [0, 1) that follows from the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _check_counts(packed: Packed, splits: pd.Series) -> None:
    counts = pd.crosstab(packed.table["label"], splits).reindex(index=packed.classes, columns=SPLITS, fill_value=0)
    few = counts.index[counts.sum(axis=1) < len(SPLITS)]
    if len(few):
        have = ", ".join(f"{name!r} has {counts.loc[name].sum()}" for name in few)
        raise ConvoyError(f"every class needs 3 images or more, one each to train, validate and test: {have}")
    for name in SPLITS:
        missing = list(counts.index[counts[name] == 0])
        if missing:
            raise ConvoyError(
                f"no {name} image of {', '.join(map(repr, missing))}: such small classes need more images"
                " (or a larger preprocess.test_fraction and preprocess.val_fraction)"
            )
