"""Decode cache: the decoded images of an earlier run, found by the checksum or the stamp of their files."""

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from convoy.data.cache import CacheDir, write_cache
from convoy.data.packed.pixel_shards import PIXELS_FOLDER, SHARD_LIST, Shards, contiguous_ranges

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# The facts about an image that are kept for later runs.
RECORD = np.dtype(
    [
        ("sha256", "V32"),  # checksum of the file, or of the shape and pixels if there is no file
        ("file_stamp", "V16"),  # hash of the file's path, size and times; zeros if changes could go unnoticed
        ("pixel_hash", np.uint64),  # hash of the shape and the pixels
        ("phash", np.uint64),  # perceptual hash
        ("source_height", np.int32),  # pixels, in the file
        ("source_width", np.int32),  # pixels, in the file
        ("height", np.int32),  # pixels, as stored
        ("width", np.int32),  # pixels, as stored
        ("channels", np.int32),
        ("offset", np.int64),  # bytes; offset of the image's pixels
        ("frames", np.int32),  # frames or pages in the file
        ("traits", np.uint8),  # sum of `BILEVEL` and `ONE_COLOUR`
    ]
)
# What a note says about an image: its file has one bit per pixel; its pixels have one colour.
BILEVEL, ONE_COLOUR = 1, 2
# Records that are in memory at a time.
CHUNK_RECORDS = 2**13
# The files that `write_decode_cache` writes beside a list of shards.
RECORDS_FILE, INDEX_FILE = "records.bin", "index.npy"


class DecodeCache:
    """Decoded images of an earlier run, found by the checksum or the stamp of a file.

    Args:
        index: (2, M) uint64: the first eight bytes of each sha256 and file stamp, sorted, and the rows of their
            records.
        descriptor: File descriptor of the records, None if there are none.
        pixels: Shards with the pixels of the images.
    """

    def __init__(self, index: np.ndarray, descriptor: int | None, pixels: Shards | None) -> None:
        self.key_starts, self.rows = np.asarray(index)
        self.descriptor, self.pixels = descriptor, pixels

    @classmethod
    def load(cls, cache_dir: CacheDir) -> "DecodeCache":
        """Open what `write_decode_cache` wrote and the shards published with it.

        The cache is empty if either is missing.
        """
        try:
            # The processes share the memory map.
            index = np.load(cache_dir.folder / INDEX_FILE, mmap_mode="r")
            pixels = Shards.load(cache_dir.output / PIXELS_FOLDER, cache_dir.folder / SHARD_LIST)
            return cls(index, os.open(cache_dir.folder / RECORDS_FILE, os.O_RDONLY), pixels)
        # The files are missing or incomplete.
        except (OSError, ValueError, EOFError, TypeError):
            return cls(np.empty((2, 0), np.uint64), None, None)

    def __bool__(self) -> bool:
        return len(self.key_starts) > 0

    def find(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Look up images by the checksum or stamp of their files.

        Args:
            keys: The sha256 or file stamp of each image.

        Returns:
            The indices in `keys` of the images that are cached with undamaged pixels, and their records.
        """
        if self.descriptor is None or not self:
            return np.empty(0, np.int64), np.empty(0, RECORD)
        starts = np.frombuffer(b"".join([key[:8] for key in keys]), np.uint64)
        positions = np.minimum(self.key_starts.searchsorted(starts), len(self.key_starts) - 1)
        # The stamp of a file that may change unnoticed begins with zeros, and is never found.
        found = np.flatnonzero((self.key_starts[positions] == starts) & (starts != 0))
        rows = self.rows[positions[found]].astype(np.int64)
        records = np.zeros(len(rows), RECORD)
        for chunk in contiguous_ranges(rows, np.ones_like(rows)):
            os.preadv(self.descriptor, [records[chunk].view(np.uint8).data], rows[chunk.start] * RECORD.itemsize)
        recorded = zip(found.tolist(), records["sha256"].tolist(), records["file_stamp"].tolist(), strict=True)
        is_match = np.array([keys[index] in (sha256, stamp) for index, sha256, stamp in recorded], bool)
        is_match[is_match] = self._are_intact(records[is_match])
        return found[is_match], records[is_match]

    def _are_intact(self, records: np.ndarray) -> np.ndarray:
        """Check for each record whether its pixels on disk are complete and undamaged."""
        is_intact = np.zeros(len(records), bool)
        sizes = pixel_bytes(records)
        hashes_and_shapes = zip(
            *(records[name].tolist() for name in ("pixel_hash", "height", "width", "channels")), strict=True
        )
        for chunk in contiguous_ranges(records["offset"], sizes):
            pixels, start = self._read_pixels(int(records["offset"][chunk.start]), int(sizes[chunk].sum())).data, 0
            for row in range(chunk.start, chunk.stop):
                recorded_hash, *shape = next(hashes_and_shapes)
                size = math.prod(shape)
                is_intact[row] = hash_pixels(pixels[start : (start := start + size)], *shape) == recorded_hash
        return is_intact

    def _read_pixels(self, offset: int, count: int) -> np.ndarray:
        assert self.pixels is not None
        try:
            return self.pixels.read(offset, count)
        # A missing file is treated like one that is too short.
        except OSError:
            return np.empty(0, np.uint8)

    def close(self) -> None:
        """Close the file of the records."""
        if self.descriptor is not None:
            os.close(self.descriptor)


def pixel_bytes(records: np.ndarray) -> np.ndarray:
    """Return the size of each image's pixels in bytes, as (N,) int64."""
    return records["height"].astype(np.int64) * records["width"] * records["channels"]


def hash_pixels(pixels: "ReadableBuffer", height: int, width: int, channels: int) -> int:
    """Hash the shape and the pixels of an image, in a thirtieth of the time of sha256."""
    return xxhash.xxh3_64_intdigest(pixels, seed=height << 34 | width << 2 | channels)


def write_decode_cache(records: Path, pixels: Path, folder: Path) -> None:
    """Write the decode cache of a run.

    Args:
        records: File with the `RECORD` of each image. It is moved into the cache.
        pixels: Folder of the shards with the pixels of the images.
        folder: Folder of the cache to write.
    """

    def write_index(folder: Path) -> None:
        np.save(folder / INDEX_FILE, _build_index(records))
        shutil.copy(pixels / SHARD_LIST, folder)
        records.replace(folder / RECORDS_FILE)

    write_cache(folder, write_index)
    records.unlink(missing_ok=True)


def _build_index(records: Path) -> np.ndarray:
    """Return the (2, M) uint64 index: the first eight bytes of each sha256 and stamp, sorted, and their row numbers."""
    count = records.stat().st_size // RECORD.itemsize
    index = np.empty((2, 2 * count), np.uint64)
    for start in range(0, count, CHUNK_RECORDS):
        chunk = np.fromfile(records, RECORD, CHUNK_RECORDS, offset=start * RECORD.itemsize)
        for first, name in ((start, "sha256"), (count + start, "file_stamp")):
            keys = np.ascontiguousarray(chunk[name]).view(np.uint64).reshape(len(chunk), -1)
            index[0, first : first + len(chunk)] = keys[:, 0]
    order = np.argsort(index[0], kind="stable")
    index[:] = index[0, order], order
    index[1] %= max(count, 1)
    return index
