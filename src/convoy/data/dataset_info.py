"""The task: what the data tells a model about itself."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What a classifier of K classes sees and says, measured on the training images."""

    dataset: str  # name of the data set
    classes: list[str]  # K names; a label is a position in this list
    size: int  # height and width of an image, in pixels
    channels: int  # 1 grey or 3 RGB
    mean: list[float]  # of each channel, in [0, 1]
    std: list[float]  # of each channel, in (0, 1]
    longest_side: int = 4096  # pixels, to which a larger image is reduced first; this for tasks from before it was told

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, file: Path) -> "DatasetInfo":
        return cls(**json.loads(file.read_text()))


SMALL = 2**14  # bytes, of an image
EXACT = 256  # rows whose squares float32 adds up exactly: 256 * 255**2 < 2**24


class ChannelMoments:
    """The mean and the spread of each of C channels, over images that come a few at a time.

    The sums are whole numbers, so the result does not depend on the order of the images.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0  # pixels
        self.sums = np.zeros(channels, np.uint64)
        self.squares = np.zeros(channels, np.uint64)

    def add(self, pixels: np.ndarray) -> None:
        """(N, H, W, C) uint8. Whole images are added up first, or the rows of large ones, as that is done fastest."""
        channels, size = len(self.sums), math.prod(pixels.shape[1:])
        rows = pixels.reshape(-1, size if size <= SMALL else size // pixels.shape[1])
        self.count += pixels.size // channels
        for start in range(0, len(rows), EXACT):
            some = rows[start : start + EXACT].astype(np.float32)
            for total, sums in ((self.sums, some.sum(0)), (self.squares, np.einsum("rp,rp->p", some, some))):
                total += sums.astype(np.uint64).reshape(-1, channels).sum(0)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Of each channel, in units of [0, 1]. One that never varies is given the deviation of one grey level."""
        mean = self.sums / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 1.0))
        return [round(float(m) / 255, 6) for m in mean], [round(float(s) / 255, 6) for s in std]
