"""The predictor, which is a trained classifier with its data set information and its calibration temperature."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from convoy import models
from convoy.core.artifact_names import CALIBRATION, RECORD, WEIGHTS
from convoy.core.config import Positive
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.data import image_io
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.evaluation.calibration import apply_temperature
from convoy.models.base import Classifier, predict

# The files that a predictor is restored from.
FILES = (RECORD, WEIGHTS, CALIBRATION)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A trained classifier that predicts calibrated class probabilities.

    Image files are preprocessed as in the pipeline, so that predictions match those of the evaluation.
    """

    architecture: str
    info: DatasetInfo
    classifier: Classifier
    temperature: float

    def fitted(self, file: bytes) -> np.ndarray:
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


@dataclasses.dataclass(frozen=True)
class _Described:
    """The fields of a training record and its calibration file that a predictor needs."""

    architecture: str
    settings: dict[str, Any]
    task: DatasetInfo
    temperature: Positive


def restore(folder: Path) -> Predictor:
    """Restore a predictor from record.json, weights.safetensors and calibration.json in `folder`.

    The files hold plain values and tensors only. Loading them never executes code.

    Raises:
        ConvoyError: If a file is missing, or was not written by training and evaluation.
    """
    found = {**_table(folder / RECORD), **_table(folder / CALIBRATION)}
    names = [field.name for field in dataclasses.fields(_Described)]
    text = json.dumps({name: found[name] for name in names if name in found})
    try:
        described = TypeAdapter(_Described).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        said = f"{'.'.join(map(str, first['loc']))}: {first['msg'][0].lower()}{first['msg'][1:]}"
        raise ConvoyError(f"{folder}: {RECORD} and {CALIBRATION} are not of a trained classifier ({said})") from None
    classifier = models.restore(described.architecture, described.settings, described.task, folder / WEIGHTS)
    return Predictor(described.architecture, described.task, classifier, described.temperature)


def _table(file: Path) -> dict[str, Any]:
    try:
        table = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConvoyError(f"{file} is missing or can't be read ({error})") from None
    if not isinstance(table, dict):
        raise ConvoyError(f"{file} holds no table")
    return table


def check(folder: Path, hashes: Mapping[str, str]) -> None:
    """Raise `ConvoyError` if a file in `folder` is missing or differs from its checksum.

    Args:
        folder: The folder of the files.
        hashes: The expected sha256 of each file, by its path in `folder`.
    """
    for file, digest in hashes.items():
        if not (folder / file).is_file():
            raise ConvoyError(f"{file} of the model is missing; nothing of the model was used")
        if sha256(folder / file) != digest:
            raise ConvoyError(f"{file} of the model is not what was registered; nothing of the model was used")
