"""The packed data set: the pixels of all its images, and a table that says which is which."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from convoy.data.pixel_shards import PIXELS, Shards

SPLITS = ("train", "val", "test")  # each further from training than the one before
TABLE, DESCRIPTION = "images.parquet", "dataset.json"
COLUMN = "column_"  # before the name of a column of a table of labels that convoy itself makes no use of
FEW = 50  # different values of such a column; what has more, as a number or a comment has, is left out
PIECE = 2**13  # rows that are in memory at a time


@dataclasses.dataclass(frozen=True)
class ImageTable:
    """A table on the disk with a row for each image, of which only what is asked for comes into memory."""

    file: Path  # Parquet

    def __len__(self) -> int:
        return pq.read_metadata(self.file).num_rows

    def _opened(self, **options: Any) -> pq.ParquetFile:
        """Without threads and read ahead: 138 MB at the peak for 200,000 images, where `pq.read_table` came to 218."""
        return pq.ParquetFile(self.file, buffer_size=1 << 16, pre_buffer=False, **options)

    def columns(self, *names: str) -> pd.DataFrame:
        """Of all rows. What few values make up, labels, splits and groups, as categories."""
        few = [name for name in names if name in ("label", "split", "group")]
        with self._opened(read_dictionary=few) as file:
            return file.read(list(names), use_threads=False).to_pandas(use_threads=False)

    def tables(self, *names: str) -> Iterator[pa.Table]:
        """These columns, or all, in this order, of some rows at a time."""
        with self._opened() as file:
            for batch in file.iter_batches(PIECE, columns=list(names) or None, use_threads=False):
                table = pa.Table.from_batches([batch])
                yield table.select(names) if names else table

    def pieces(self, *names: str) -> Iterator[pd.DataFrame]:
        """As `tables`, each row under its number."""
        start = 0
        for table in self.tables(*names):
            piece = table.to_pandas(use_threads=False)
            yield piece.set_axis(range(start, start := start + len(piece)))

    def at(self, rows: np.ndarray) -> pd.DataFrame:
        """The whole of some rows, whose numbers are in order, under these numbers."""
        nothing = pq.read_schema(self.file).empty_table().to_pandas()
        return pd.concat([nothing, *(piece.loc[_within(piece, rows)] for piece in self.pieces())])

    def write(self, tables: Iterator[pa.Table]) -> None:
        """The rows of one table or more of the same columns. The bytes do not depend on how they come."""
        first = next(tables)
        waiting = first.schema.empty_table()
        arriving = self.file.with_name(f"{self.file.name}.arriving")
        with pq.ParquetWriter(arriving, waiting.schema) as file:
            for table in itertools.chain([first], tables):
                waiting = pa.concat_tables([waiting, table])
                while len(waiting) > PIECE:
                    file.write_table(waiting.slice(0, PIECE).combine_chunks())
                    waiting = waiting.slice(PIECE)
            file.write_table(waiting.combine_chunks())
        arriving.replace(self.file)

    def drop(self, rows: np.ndarray) -> None:
        """Take out the rows of these numbers, which are in order."""
        self.write(
            pa.Table.from_pandas(piece.drop(_within(piece, rows)), preserve_index=False) for piece in self.pieces()
        )


def _within(piece: pd.DataFrame, rows: np.ndarray) -> np.ndarray:
    first, last = np.searchsorted(rows, [piece.index[0], piece.index[-1] + 1])
    return rows[first:last]


@dataclasses.dataclass(frozen=True)
class PackedDataset:
    """A data set as fetch leaves it: the pixels of all images end to end, and a table with a row for each image.

    Columns: path, label, split and group as the source has them ("" for none); sha256 of the file; picture, a hash of
    the shape and the pixels; phash, the perceptual hash; source_height and source_width in the file; height, width and
    channels as kept, and the offset of the first of the image's pixels. Then the other columns of a table of labels,
    as text, each under its name with `COLUMN` before it.
    """

    name: str
    origin: str  # where it came from: data.dvc, or the name of a set in torchvision
    longest_side: int  # pixels; larger images were reduced to it
    classes: list[str]  # K names; there may be no image of some
    drawn: list[str]  # the splits to draw from images given for training: val, test
    rows: ImageTable  # N of them
    pixels: Shards

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """All of the rows, which takes some hundred bytes of memory for each."""
        return pd.read_parquet(self.rows.file)

    @functools.cached_property
    def places(self) -> np.ndarray:
        """(N, 4): the height, width and channels of each image, and the offset of the first of its pixels."""
        places, start = np.empty((len(self.rows), 4), np.int64), 0
        for piece in self.rows.pieces("height", "width", "channels", "offset"):
            places[start : start + len(piece)] = piece
            start += len(piece)
        return places

    def image(self, row: int) -> np.ndarray:
        """(H, W, 1 or 3) uint8"""
        return self.at(*self.places[row].tolist())

    def at(self, height: int, width: int, channels: int, offset: int) -> np.ndarray:
        """The image of this shape that begins at `offset`."""
        return self.pixels.read(offset, height * width * channels).reshape(height, width, channels)

    def named(self, path: str) -> np.ndarray:
        """The image that was found at a path."""
        return self.image(int((self.rows.columns("path")["path"] == path).to_numpy().argmax()))

    @classmethod
    def load(cls, folder: Path) -> "PackedDataset":
        described = json.loads((folder / DESCRIPTION).read_text())
        return cls(rows=ImageTable(folder / TABLE), pixels=Shards.load(folder / PIXELS), **described)
