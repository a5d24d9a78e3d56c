"""The predictor: a trained classifier with its data set information and its calibration temperature."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from convoy import models
from convoy.core.artifact_names import CALIBRATION, RECORD, WEIGHTS
from convoy.core.config import PositiveFloat
from convoy.core.errors import ConvoyError
from convoy.data import image_io
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.evaluation.calibration import apply_temperature
from convoy.models.base import Classifier, predict
from convoy.training.record import TrainingRecord

# The files that a predictor is restored from.
PREDICTOR_FILES = (RECORD, WEIGHTS, CALIBRATION)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A trained classifier that predicts calibrated class probabilities.

    Image files are preprocessed as in the pipeline, so that predictions match those of the evaluation.
    """

    architecture: str
    info: DatasetInfo
    classifier: Classifier
    temperature: float

    def preprocess(self, file: bytes) -> np.ndarray:
        """Decode an image file and resize it to the network's input.

        Args:
            file: The content of an image file.

        Returns:
            (H, W, C) uint8 pixels.

        Raises:
            InvalidImageError: If the file is not a valid image.
        """
        return image_io.center_crop_resize(
            image_io.decode(file, self.info.longest_side).pixels, self.info.size, self.info.channels
        )

    def probabilities(self, pixels: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """Predict class probabilities.

        Args:
            pixels: (N, H, W, C) uint8 images of the network's input size.
            batch_size: Number of images per forward pass.

        Returns:
            (N, K) float64 calibrated probabilities.
        """
        if not len(pixels):
            return np.empty((0, len(self.info.classes)))
        return apply_temperature(predict(self.classifier, pixels, batch_size), self.temperature)


def restore(folder: Path) -> Predictor:
    """Restore a predictor from record.json, weights.safetensors and calibration.json in `folder`.

    The files hold plain values and tensors only. Loading them never executes code.

    Raises:
        ConvoyError: If a file is missing, or was not written by training and evaluation.
    """
    record, temperature = TrainingRecord.load(folder / RECORD), _load_temperature(folder / CALIBRATION)
    classifier = models.restore(record.architecture, record.settings, record.dataset_info, folder / WEIGHTS)
    return Predictor(record.architecture, record.dataset_info, classifier, temperature)


def _load_temperature(file: Path) -> float:
    try:
        found = TypeAdapter(dict[str, Any]).validate_json(file.read_bytes())
        return TypeAdapter(PositiveFloat).validate_python(found.get("temperature"), strict=True)
    except (OSError, ValidationError) as error:
        raise ConvoyError(f"{file} is missing, or holds no temperature: evaluate the model again") from error
