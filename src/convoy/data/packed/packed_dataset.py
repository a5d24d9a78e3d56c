"""Packed data set: the pixels of all images in shards, and a table with a row for each image."""

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

from convoy.core.artifact_names import IMAGE_TABLE
from convoy.data.packed.pixel_shards import PIXELS_FOLDER, Shards

# Each split is further from training than the one before.
SPLITS = ("train", "val", "test")
DESCRIPTION_FILE = "dataset.json"
# Prefix of the columns of a label table that convoy itself does not use.
COLUMN_PREFIX = "column_"
# Such a column is dropped if it has more than this many different values, as numbers or comments have.
MAX_SLICE_VALUES = 50
# Rows that are in memory at a time.
CHUNK_ROWS = 2**13


@dataclasses.dataclass(frozen=True)
class ImageTable:
    """Table on disk with a row for each image, of which only the requested parts are loaded into memory."""

    file: Path  # Parquet

    def __len__(self) -> int:
        return pq.read_metadata(self.file).num_rows

    def _open(self, **options: Any) -> pq.ParquetFile:
        """Open the file without threads or read-ahead.

        For 200,000 images the peak was 138 MB of memory, compared to 218 MB with `pq.read_table`.
        """
        return pq.ParquetFile(self.file, buffer_size=1 << 16, pre_buffer=False, **options)

    def read_columns(self, *names: str) -> pd.DataFrame:
        """Load some columns of all rows, with labels, splits and groups as categories."""
        categories = [name for name in names if name in ("label", "split", "group")]
        with self._open(read_dictionary=categories) as file:
            return file.read(list(names), use_threads=False).to_pandas(use_threads=False)

    def iter_tables(self, *names: str) -> Iterator[pa.Table]:
        """Yield the rows in chunks, with the given columns in the given order, or with all columns."""
        with self._open() as file:
            for batch in file.iter_batches(CHUNK_ROWS, columns=list(names) or None, use_threads=False):
                table = pa.Table.from_batches([batch])
                yield table.select(names) if names else table

    def iter_chunks(self, *names: str) -> Iterator[pd.DataFrame]:
        """Yield the same chunks as `iter_tables`, as data frames whose index is the row number."""
        start = 0
        for table in self.iter_tables(*names):
            chunk = table.to_pandas(use_threads=False)
            yield chunk.set_axis(range(start, start := start + len(chunk)))

    def read_rows(self, rows: np.ndarray) -> pd.DataFrame:
        """Load all columns of some rows.

        Args:
            rows: Row numbers, in ascending order.

        Returns:
            The rows, with their numbers as the index.
        """
        no_rows = pq.read_schema(self.file).empty_table().to_pandas()
        return pd.concat([no_rows, *(chunk.loc[_rows_in(chunk, rows)] for chunk in self.iter_chunks())])

    def write(self, tables: Iterator[pa.Table]) -> None:
        """Write the rows of one or more tables with the same columns.

        The bytes of the file do not depend on how the rows are divided into tables.
        """
        first = next(tables)
        pending = first.schema.empty_table()
        partial = self.file.with_name(f"{self.file.name}.partial")
        with pq.ParquetWriter(partial, pending.schema) as file:
            for table in itertools.chain([first], tables):
                pending = pa.concat_tables([pending, table])
                while len(pending) > CHUNK_ROWS:
                    file.write_table(pending.slice(0, CHUNK_ROWS).combine_chunks())
                    pending = pending.slice(CHUNK_ROWS)
            file.write_table(pending.combine_chunks())
        partial.replace(self.file)

    def drop_rows(self, rows: np.ndarray) -> None:
        """Remove the rows with the given numbers, which must be in ascending order."""
        self.write(
            pa.Table.from_pandas(chunk.drop(_rows_in(chunk, rows)), preserve_index=False)
            for chunk in self.iter_chunks()
        )


def _rows_in(chunk: pd.DataFrame, rows: np.ndarray) -> np.ndarray:
    first, last = np.searchsorted(rows, [chunk.index[0], chunk.index[-1] + 1])
    return rows[first:last]


@dataclasses.dataclass(frozen=True)
class PackedDataset:
    """Data set as fetch writes it: the pixels of all images end to end, and a table with a row for each image.

    The table has these columns:

    * path, label, split and group, as in the source ("" for none)
    * sha256: checksum of the file
    * pixel_hash: hash of the shape and the pixels
    * phash: perceptual hash
    * source_height and source_width: size in the file, in pixels
    * height, width and channels: shape as stored
    * offset: offset of the first byte of the image's pixels
    * the other columns of a label table, as text, with the prefix `COLUMN_PREFIX`
    """

    name: str
    origin: str  # where the data set came from: data.dvc, or the name of a torchvision data set
    longest_side: int  # pixels; larger images were reduced to it
    classes: list[str]  # K names; some classes may have no images
    drawn: list[str]  # the splits to draw from images given for training: val, test
    table: ImageTable  # N rows
    pixels: Shards

    @functools.cached_property
    def pixel_extents(self) -> np.ndarray:
        """Height, width, channels and pixel offset of each image, as (N, 4) int64."""
        extents, start = np.empty((len(self.table), 4), np.int64), 0
        for chunk in self.table.iter_chunks("height", "width", "channels", "offset"):
            extents[start : start + len(chunk)] = chunk
            start += len(chunk)
        return extents

    def read_image(self, row: int) -> np.ndarray:
        """Read the image (H, W, 1 or 3) uint8 of a row."""
        return self.read_pixels(*self.pixel_extents[row].tolist())

    def read_pixels(self, height: int, width: int, channels: int, offset: int) -> np.ndarray:
        """Read the image with the given shape whose pixels begin at `offset`."""
        return self.pixels.read(offset, height * width * channels).reshape(height, width, channels)

    def read_image_at(self, path: str) -> np.ndarray:
        """Read the image with the given path in the source."""
        return self.read_image(int((self.table.read_columns("path")["path"] == path).to_numpy().argmax()))

    @classmethod
    def load(cls, folder: Path) -> "PackedDataset":
        """Load the data set that fetch wrote into `folder`; its table and pixels stay on disk."""
        description = json.loads((folder / DESCRIPTION_FILE).read_text())
        return cls(table=ImageTable(folder / IMAGE_TABLE), pixels=Shards.load(folder / PIXELS_FOLDER), **description)
