"""Predictions of a model for the current test images, also if it was trained on another image size."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from convoy.data.image_io import center_crop_resize
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.data.packed.packed_dataset import PackedDataset
from convoy.evaluation.metrics import prediction_table
from convoy.inference.predictor import Predictor

CHUNK_SIZE = 256  # images in memory at a time


def predict_test_images(
    predictor: Predictor, images: pd.DataFrame, pixels: np.ndarray, info: DatasetInfo, packed: PackedDataset
) -> pd.DataFrame:
    """Predict the current test images with a model.

    Args:
        predictor: The model.
        images: The N test images, with the columns path, sha256, label and group.
        pixels: (N, H, W, C) uint8 pixels of `images`, preprocessed for `info`.
        info: The current data set.
        packed: The packed data set, from which the images are resized if the model takes another size or number of
            channels than `info`.

    Returns:
        The table of predictions, as from `prediction_table`.
    """
    wanted = predictor.info
    has_same_shape = (wanted.size, wanted.channels) == (info.size, info.channels)
    chunks = [pixels] if has_same_shape else _iter_resized(images, packed, wanted)
    return prediction_table(
        wanted.classes, images, np.concatenate([predictor.probabilities(chunk) for chunk in chunks])
    )


def _iter_resized(images: pd.DataFrame, packed: PackedDataset, info: DatasetInfo) -> Iterator[np.ndarray]:
    """Resize images to the size and channels of `info`, in chunks of shape (at most `CHUNK_SIZE`, size, size, C) uint8.

    The images are identified by their column path.
    """
    row_of = pd.Series(np.arange(len(packed.table)), index=packed.table.read_columns("path")["path"])
    rows = row_of[images["path"]].tolist()
    for start in range(0, len(rows), CHUNK_SIZE):
        yield np.stack(
            [
                center_crop_resize(packed.read_image(row), info.size, info.channels)
                for row in rows[start : start + CHUNK_SIZE]
            ]
        )
