"""Arrays: images and labels of a split, mapped from files or in memory."""

from pathlib import Path

import numpy as np


class Images:
    """One split: pixels (N, H, W, C) uint8, which may be a memory map, and labels (N,) int64."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels = pixels
        self.labels = labels

    @classmethod
    def load(cls, folder: Path, split: str) -> "Images":
        """The split that preprocessing wrote into `folder`; its pixels stay on disk until they are asked for."""
        pixels = np.load(folder / f"{split}_pixels.npy", mmap_mode="r")
        return cls(pixels, np.load(folder / f"{split}_labels.npy"))

    def __len__(self) -> int:
        return len(self.labels)
