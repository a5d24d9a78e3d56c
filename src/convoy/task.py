"""The task: what the data tells a model about itself."""

import dataclasses
import json
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Task:
    """What a classifier of K classes sees and says, measured on the training images."""

    dataset: str  # name of the data set
    classes: list[str]  # K names; a label is a position in this list
    size: int  # height and width of an image, in pixels
    channels: int  # 1 grey or 3 RGB
    mean: list[float]  # of each channel, in [0, 1]
    std: list[float]  # of each channel, in (0, 1]

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, file: Path) -> "Task":
        return cls(**json.loads(file.read_text()))


def measure(pixels: np.ndarray, chunk: int = 4096) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of `pixels` (N, H, W, C) uint8, in units of [0, 1].

    Sums are exact integers, so the result does not depend on the order of the images or on `chunk`.
    A channel that never varies is given the standard deviation of one grey level, 1/255.
    """
    count = pixels.size // pixels.shape[-1]
    total = np.zeros(pixels.shape[-1], np.int64)
    squares = np.zeros(pixels.shape[-1], np.int64)
    for start in range(0, len(pixels), chunk):
        part = pixels[start : start + chunk].astype(np.int64)
        total += part.sum(axis=(0, 1, 2))
        squares += (part**2).sum(axis=(0, 1, 2))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1.0))
    return [round(float(m) / 255, 6) for m in mean], [round(float(s) / 255, 6) for s in std]
