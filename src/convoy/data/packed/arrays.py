"""Image and label arrays of a split, memory-mapped from files or in memory."""

from pathlib import Path

import numpy as np


class Images:
    """Images and labels of one split.

    Args:
        pixels: (N, H, W, C) uint8; may be a memory map.
        labels: (N,) int64 class indices.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels = pixels
        self.labels = labels

    @classmethod
    def load(cls, folder: Path, split: str) -> "Images":
        """Load a split that preprocessing wrote into `folder`, with its pixels memory-mapped."""
        pixels = np.load(folder / f"{split}_pixels.npy", mmap_mode="r")
        return cls(pixels, np.load(folder / f"{split}_labels.npy"))

    def __len__(self) -> int:
        return len(self.labels)
