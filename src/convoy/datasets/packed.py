"""The packed data set: all its images in one file, and a table that says which is which."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd

PIXELS, TABLE, DESCRIPTION = "pixels.bin", "images.parquet", "dataset.json"
COLUMN = "column_"  # before the name of a column of a table of labels that convoy itself makes no use of
FEW = 50  # different values of such a column; what has more, as a number or a comment has, is left out


@dataclasses.dataclass(frozen=True)
class Packed:
    """A data set as fetch leaves it: the pixels of all images end to end, and a table with a row for each image.

    Columns: path, label, split and group as the source has them ("" for none); sha256 of the file; picture, a hash of
    the shape and the pixels; phash, the perceptual hash; source_height and source_width in the file; height, width and
    channels as kept, and the offset of the first of the image's pixels. Then the other columns of a table of labels,
    as text, each under its name with `COLUMN` before it.
    """

    name: str
    origin: str  # where it came from: data.dvc, or the name of a set in torchvision
    classes: list[str]  # K names; there may be no image of some
    table: pd.DataFrame  # N rows
    pixels: np.ndarray  # one long memory-mapped row of uint8

    def image(self, row: int) -> np.ndarray:
        """(H, W, 1 or 3) uint8"""
        return self.at(*self.table[["height", "width", "channels", "offset"]].iloc[row].tolist())

    def at(self, height: int, width: int, channels: int, offset: int) -> np.ndarray:
        """The image of this shape that begins at `offset`."""
        return self.pixels[offset : offset + height * width * channels].reshape(height, width, channels)

    def named(self, path: str) -> np.ndarray:
        """The image that was found at a path."""
        return self.image(int((self.table["path"] == path).to_numpy().argmax()))

    @classmethod
    def load(cls, folder: Path, table: pd.DataFrame | None = None) -> "Packed":
        """From `folder`; who has the table already can spare the reading."""
        described = json.loads((folder / DESCRIPTION).read_text())
        pixels = np.memmap(folder / PIXELS, np.uint8, mode="r")
        return cls(table=pd.read_parquet(folder / TABLE) if table is None else table, pixels=pixels, **described)
