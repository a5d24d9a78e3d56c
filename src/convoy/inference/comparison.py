"""The comparison: what a model answers to today's test images, whatever size of images it was trained with."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from convoy.data.dataset_info import DatasetInfo
from convoy.data.image_io import center_crop_resize
from convoy.data.packed_dataset import PackedDataset
from convoy.evaluation.metrics import prediction_table
from convoy.inference.predictor import Predictor

PIECE = 256  # images that are in memory at a time


def predict_test_images(
    predictor: Predictor, images: pd.DataFrame, pixels: np.ndarray, task: DatasetInfo, packed: PackedDataset
) -> pd.DataFrame:
    """The predictions of a model for `images`, with the columns path, sha256, label and group, as they were prepared.

    `pixels` (N, H, W, C) uint8 are those of `task`; for a model of images of another size they are taken from `packed`.
    """
    own = predictor.task
    pieces = [pixels] if (own.size, own.channels) == (task.size, task.channels) else _fitted_anew(images, packed, own)
    return prediction_table(own.classes, images, np.concatenate([predictor.probabilities(piece) for piece in pieces]))


def _fitted_anew(images: pd.DataFrame, packed: PackedDataset, task: DatasetInfo) -> Iterator[np.ndarray]:
    """(at most `PIECE`, size, size, C) uint8: `images`, by their column path, in the size and channels of `task`."""
    row_of = pd.Series(np.arange(len(packed.rows)), index=packed.rows.columns("path")["path"])
    rows = row_of[images["path"]].tolist()
    for start in range(0, len(rows), PIECE):
        yield np.stack(
            [center_crop_resize(packed.image(row), task.size, task.channels) for row in rows[start : start + PIECE]]
        )
