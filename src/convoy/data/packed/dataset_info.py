"""Description of a preprocessed data set: the facts about it that a model needs."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Inputs and classes of a classifier, with channel statistics measured on the training images."""

    dataset: str  # name of the data set
    classes: list[str]  # K names; a label is a position in this list
    size: int  # height and width of an image, in pixels
    channels: int  # 1 grey or 3 RGB
    mean: list[float]  # of each channel, in [0, 1]
    std: list[float]  # of each channel, in (0, 1]
    # pixels; larger images are first reduced to it. The default serves files written before this field existed.
    longest_side: int = 4096

    def save(self, file: Path) -> None:
        """Write the description to `file`, as JSON."""
        file.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, file: Path) -> "DatasetInfo":
        """Load a description that `save` wrote."""
        return cls(**json.loads(file.read_text()))


# Images of up to this many bytes are summed as one vector, larger ones row by row.
MAX_VECTOR_BYTES = 2**14
# The number of values whose squares float32 sums exactly: 256 * 255**2 < 2**24.
EXACT_ROWS = 256


class ChannelMoments:
    """Running mean and standard deviation of each of C channels, updated a batch of images at a time.

    The sums are integers, so the result does not depend on the order of the images.

    Args:
        channels: Number of channels C.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0  # pixels
        self.sums = np.zeros(channels, np.uint64)
        self.squares = np.zeros(channels, np.uint64)

    def add(self, pixels: np.ndarray) -> None:
        """Add a batch of images to the sums.

        Images, or the rows of large images, are first added elementwise and only then over their pixels, which is
        the fastest order.

        Args:
            pixels: (N, H, W, C) uint8.
        """
        channels, size = len(self.sums), math.prod(pixels.shape[1:])
        rows = pixels.reshape(-1, size if size <= MAX_VECTOR_BYTES else size // pixels.shape[1])
        self.count += pixels.size // channels
        for start in range(0, len(rows), EXACT_ROWS):
            block = rows[start : start + EXACT_ROWS].astype(np.float32)
            for total, sums in ((self.sums, block.sum(0)), (self.squares, np.einsum("rp,rp->p", block, block))):
                total += sums.astype(np.uint64).reshape(-1, channels).sum(0)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        """Return the mean and standard deviation of each channel, in units of [0, 1].

        The standard deviation is at least one grey level (1/255), so that constant channels can be normalised.
        """
        mean = self.sums / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 1.0))
        return [round(float(m) / 255, 6) for m in mean], [round(float(s) / 255, 6) for s in std]
