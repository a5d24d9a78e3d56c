"""The predictor: a trained classifier as it answers images, with its task and its temperature."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from convoy import models
from convoy.config import Positive
from convoy.data import image_io
from convoy.data.dataset_info import DatasetInfo
from convoy.errors import ConvoyError
from convoy.evaluation.calibration import apply_temperature
from convoy.hashing import sha256
from convoy.models.base import Classifier, predict

RECORD, WEIGHTS, CALIBRATION = "record.json", "weights.safetensors", "calibration.json"
FILES = (RECORD, WEIGHTS, CALIBRATION)  # all that a predictor is made of


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Answers images with the probabilities that evaluation saw: a file comes to the same pixels."""

    architecture: str
    task: DatasetInfo
    classifier: Classifier
    temperature: float

    def fitted(self, file: bytes) -> np.ndarray:
        """(H, W, C) uint8 as the network takes it, of the bytes of an image file. Raises images.BadImage."""
        return image_io.center_crop_resize(
            image_io.decode(file, self.task.longest_side).pixels, self.task.size, self.task.channels
        )

    def probabilities(self, pixels: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """(N, K) float64, of images (N, H, W, C) uint8 as the network takes them."""
        if not len(pixels):
            return np.empty((0, len(self.task.classes)))
        return apply_temperature(predict(self.classifier, pixels, batch_size), self.temperature)


@dataclasses.dataclass(frozen=True)
class _Described:
    """What a predictor needs to know of a training, of all that its record holds, and of its evaluation."""

    architecture: str
    settings: dict[str, Any]
    task: DatasetInfo
    temperature: Positive


def restore(folder: Path) -> Predictor:
    """Of record.json, weights.safetensors and calibration.json in `folder`: plain values and numbers, nothing to run.

    Raises ConvoyError for a file that is missing, or is not what training and evaluation leave.
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
    """Raises ConvoyError where a file in `folder` is missing, or has another sha256 than `hashes` says."""
    for file, digest in hashes.items():
        if not (folder / file).is_file():
            raise ConvoyError(f"{file} of the model is missing; nothing of the model was used")
        if sha256(folder / file) != digest:
            raise ConvoyError(f"{file} of the model is not what was registered; nothing of the model was used")
