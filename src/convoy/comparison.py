"""The comparison: what a model answers to today's test images, whatever size of images it was trained with."""

import numpy as np
import pandas as pd

from convoy.datasets.packed import Packed
from convoy.evaluation import predictions
from convoy.images import fit
from convoy.predictor import Predictor
from convoy.task import Task


def answers(predictor: Predictor, images: pd.DataFrame, pixels: np.ndarray, task: Task, packed: Packed) -> pd.DataFrame:
    """The predictions of a model for `images`, with the columns path, sha256, label and group, as they were prepared.

    `pixels` (N, H, W, C) uint8 are those of `task`; for a model of images of another size they are taken from `packed`.
    """
    own = predictor.task
    if (own.size, own.channels) != (task.size, task.channels):
        pixels = fitted(images, packed, own)
    return predictions(own.classes, images, predictor.probabilities(pixels))


def fitted(images: pd.DataFrame, packed: Packed, task: Task) -> np.ndarray:
    """The pixels (N, size, size, C) uint8 of `images`, by their column path, in the size and channels of `task`."""
    row_of = pd.Series(np.arange(len(packed.table)), index=packed.table["path"].to_numpy())
    pixels = np.empty((len(images), task.size, task.size, task.channels), np.uint8)
    for number, row in enumerate(row_of[images["path"]]):
        pixels[number] = fit(packed.image(row), task.size, task.channels)
    return pixels
