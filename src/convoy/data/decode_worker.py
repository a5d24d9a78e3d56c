"""Decode worker: reads, hashes and decodes images in a separate process.

The module imports only what the worker needs, because imports take time.
"""

import dataclasses
import functools
import gc
import hashlib
import math
import os
import shutil
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from convoy.core.malloc import keep_memory
from convoy.data import image_io, near_duplicates
from convoy.data.cache import CacheDir, fingerprint, write_cache
from convoy.data.image_io import Decoded, InvalidImageError, as_image, decode, to_grey_or_rgb
from convoy.data.near_duplicates import perceptual_hash, thumbnails
from convoy.data.packed import pixel_shards
from convoy.data.packed.pixel_shards import LIST, NEW, PIXELS, Shards, contiguous_ranges

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from convoy.data.sources.base import Content

# Target size of a batch, in bytes of pixels and of files.
BATCH_BYTES = 2**23
# Files with more bytes are rejected and not read into memory.
MAX_BYTES = 256 << 20
TOO_LARGE = f"is larger than {MAX_BYTES >> 20} MiB"

# The facts about an image that are kept for later runs.
RECORD = np.dtype(
    [
        ("sha256", "V32"),  # checksum of the file, or of the shape and pixels if there is no file
        ("stamp", "V16"),  # hash of the file's path, size and times; zeros if changes could go unnoticed
        ("picture", np.uint64),  # hash of the shape and the pixels
        ("phash", np.uint64),  # perceptual hash
        ("source_height", np.int32),  # pixels, in the file
        ("source_width", np.int32),  # pixels, in the file
        ("height", np.int32),  # pixels, as stored
        ("width", np.int32),  # pixels, as stored
        ("channels", np.int32),
        ("offset", np.int64),  # bytes; offset of the image's pixels
    ]
)
UNSTAMPED = bytes(16)
# Size, modification time, change time and inode number of a file.
TIMES = struct.Struct("<3qQ")
# Time in ns after which another change to a file gives it another time stamp, on any file system.
SETTLED = 3_000_000_000
# File descriptor of a cache without files.
NOTHING = -1
# Records that are in memory at a time.
PIECE = 2**13
# The files that `keep` writes beside a list of shards.
RECORDS, INDEX = "records.bin", "index.npy"


def decoding_fingerprint(longest_side: int) -> str:
    """Hash everything that determines the decoded pixels of a file: code, libraries and settings."""
    libraries = ["numpy", "pillow", "simplejpeg", "xxhash"]
    return fingerprint([image_io, near_duplicates, pixel_shards, sys.modules[__name__]], libraries, longest_side)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Result of decoding a batch of images, in their order."""

    faults: list[str]  # the reason why each image can't be used; "" for valid images
    records: np.ndarray  # (N,) `RECORD` of the valid images, with offsets in an earlier run's pixels or `NEW`
    pixels: bytes  # pixels of the `NEW` images, end to end

    @property
    def sizes(self) -> np.ndarray:
        """Size of each valid image's pixels in bytes, as (N,) int64."""
        return _sizes(self.records)


def _sizes(records: np.ndarray) -> np.ndarray:
    return records["height"].astype(np.int64) * records["width"] * records["channels"]


def init_worker() -> None:
    """Set up a process that only decodes images."""
    keep_memory()
    # Imported modules stay until the process ends, so the garbage collector need not scan them.
    gc.freeze()
    # Silence stderr, where libtiff writes its warnings; Pillow's errors are sufficient.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def decode_batch(contents: list["Content"], longest_side: int, earlier: CacheDir) -> Batch:
    """Read, hash and decode images.

    A file whose size and times are the same as when an earlier run read it is not read again.

    Args:
        contents: The images: paths, bytes of files, pixels, or errors.
        longest_side: Larger images are reduced to this many pixels on their longest side.
        earlier: Cache of an earlier run.

    Returns:
        The result for all images, or only for the first ones if their new pixels exceed four times `BATCH_BYTES`.
    """
    known = _known(earlier)
    faults, records, new = [""] * len(contents), np.zeros(len(contents), RECORD), {}
    places, told = known.find([_name(content) for content in contents] if known else [])
    records[places] = told
    # Bytes of new pixels.
    count = 0
    for place in sorted({*range(len(contents))}.difference(places.tolist())):
        if count > 4 * BATCH_BYTES:
            del faults[place:]
            break
        try:
            data, stamp = _read(contents[place])
            sha256 = _digest(data)
            _, told = known.find([sha256])
            # The image is known, but its file was moved or touched.
            if len(told):
                records[place] = told[0]
                records[place]["stamp"] = stamp
            else:
                decoded = _decode(data, longest_side)
                image = new[place] = np.ascontiguousarray(decoded.pixels)
                picture = _picture(image.data, *image.shape)
                records[place] = (sha256, stamp, picture, 0, decoded.height, decoded.width, *image.shape, NEW)
                count += image.size
        except InvalidImageError as fault:
            faults[place] = str(fault)
    if new:
        records["phash"][list(new)] = perceptual_hash(thumbnails(list(new.values())))
    sound = [place for place, fault in enumerate(faults) if not fault]
    return Batch(faults, records[sound], b"".join(image.data for image in new.values()))


def _name(content: "Content") -> bytes:
    """Return the key by which the cache finds an image without reading it: a file's stamp, or the sha256."""
    try:
        if isinstance(content, str):
            # `os.stat` takes a third of the time of `Path.stat`.
            return _stamp(content, os.stat(content))  # noqa: PTH116
    # Reading the file will report the error.
    except OSError:
        return UNSTAMPED
    return UNSTAMPED if isinstance(content, InvalidImageError) else _digest(content)


def _stamp(path: str, told: os.stat_result) -> bytes:
    """Return a hash that changes when the file does, `UNSTAMPED` if the file has changed just now."""
    modified, changed = told.st_mtime_ns, told.st_ctime_ns
    if time.time_ns() - max(modified, changed) < SETTLED:
        return UNSTAMPED
    return xxhash.xxh3_128_digest(TIMES.pack(told.st_size, modified, changed, told.st_ino) + os.fsencode(path))


def _read(content: "Content") -> tuple[bytes | np.ndarray, bytes]:
    """Read an image, and return its bytes or pixels and the stamp of its file."""
    if isinstance(content, InvalidImageError):
        raise content
    if not isinstance(content, str):
        return content, UNSTAMPED
    try:
        # `os.open` takes half of the time of `open`, which matters for small files.
        file = os.open(content, os.O_RDONLY)
        try:
            told = os.fstat(file)
            if told.st_size > MAX_BYTES:
                raise InvalidImageError(TOO_LARGE)
            return _read_whole(file, told.st_size), _stamp(content, told)
        finally:
            os.close(file)
    except OSError as error:
        raise InvalidImageError(f"can't be read: {error.strerror}") from None


def _read_whole(file: int, size: int) -> bytes:
    """Read `size` bytes of a file, or fewer if it ends early; a single read may return fewer bytes."""
    parts, left = [], size
    while left and (part := os.read(file, left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _decode(data: bytes | np.ndarray, longest_side: int) -> Decoded:
    if isinstance(data, bytes):
        return decode(data, longest_side)
    height, width, _ = data.shape
    small = max(height, width) <= longest_side
    return Decoded(data if small else to_grey_or_rgb(as_image(data), longest_side), height, width)


def _digest(data: bytes | np.ndarray) -> bytes:
    """Return the sha256 of the bytes of a file, or of the shape and pixels of an image (H, W, C)."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).digest()
    height, width, channels = data.shape
    algorithm = hashlib.sha256(f"{height}x{width}x{channels}".encode())
    algorithm.update(np.ascontiguousarray(data).data)
    return algorithm.digest()


class DecodeCache:
    """Decoded images of an earlier run, found by the sha256 or the stamp of a file.

    Args:
        index: (2, M) uint64: the first eight bytes of each sha256 and stamp, sorted, and the rows of their records.
        descriptor: File descriptor of the records, `NOTHING` if there are none.
        pixels: Shards with the pixels of the images.
    """

    def __init__(self, index: np.ndarray, descriptor: int, pixels: Shards | None) -> None:
        self.starts, self.rows = np.asarray(index)
        self.descriptor, self.pixels = descriptor, pixels

    @classmethod
    def load(cls, earlier: CacheDir) -> "DecodeCache":
        """Open what `keep` wrote and the shards published with it; the cache is empty if either is missing."""
        try:
            # The processes share the memory map.
            index = np.load(earlier.folder / INDEX, mmap_mode="r")
            pixels = Shards.load(earlier.output / PIXELS, earlier.folder / LIST)
            return cls(index, os.open(earlier.folder / RECORDS, os.O_RDONLY), pixels)
        # The files are missing or incomplete.
        except (OSError, ValueError, EOFError, TypeError):
            return cls(np.empty((2, 0), np.uint64), NOTHING, None)

    def __bool__(self) -> bool:
        return len(self.starts) > 0

    def find(self, names: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Look up images by the sha256 or stamp of their files.

        Args:
            names: The sha256 or stamp of each image.

        Returns:
            The indices in `names` of the images that are cached with undamaged pixels, and their records.
        """
        if not self:
            return np.empty(0, np.int64), np.empty(0, RECORD)
        starts = np.frombuffer(b"".join([name[:8] for name in names]), np.uint64)
        at = np.minimum(self.starts.searchsorted(starts), len(self.starts) - 1)
        # `UNSTAMPED` begins with zeros, and is never found.
        places = np.flatnonzero((self.starts[at] == starts) & (starts != 0))
        rows = self.rows[at[places]].astype(np.int64)
        records = np.zeros(len(rows), RECORD)
        for some in contiguous_ranges(rows, np.ones_like(rows)):
            os.preadv(self.descriptor, [records[some].view(np.uint8).data], rows[some.start] * RECORD.itemsize)
        stated = zip(places.tolist(), records["sha256"].tolist(), records["stamp"].tolist(), strict=True)
        same = np.array([names[place] in (sha256, stamp) for place, sha256, stamp in stated], bool)
        same[same] = self._whole(records[same])
        return places[same], records[same]

    def _whole(self, records: np.ndarray) -> np.ndarray:
        """Check for each record whether its pixels on disk are complete and undamaged."""
        whole = np.zeros(len(records), bool)
        sizes = _sizes(records)
        shapes = zip(*(records[name].tolist() for name in ("picture", "height", "width", "channels")), strict=True)
        for some in contiguous_ranges(records["offset"], sizes):
            read, start = self._read(int(records["offset"][some.start]), int(sizes[some].sum())).data, 0
            for row in range(some.start, some.stop):
                picture, *shape = next(shapes)
                size = math.prod(shape)
                whole[row] = _picture(read[start : (start := start + size)], *shape) == picture
        return whole

    def _read(self, offset: int, count: int) -> np.ndarray:
        assert self.pixels is not None
        try:
            return self.pixels.read(offset, count)
        # A missing file is treated like one that is too short.
        except OSError:
            return np.empty(0, np.uint8)

    def close(self) -> None:
        if self.descriptor != NOTHING:
            os.close(self.descriptor)


@functools.cache
def _known(earlier: CacheDir) -> DecodeCache:
    """Open the cache once per process."""
    return DecodeCache.load(earlier)


def _picture(pixels: "ReadableBuffer", height: int, width: int, channels: int) -> int:
    """Hash the shape and the pixels of an image, in a thirtieth of the time of sha256."""
    return xxhash.xxh3_64_intdigest(pixels, seed=height << 34 | width << 2 | channels)


def keep(records: Path, pixels: Path, folder: Path) -> None:
    """Write the decode cache of a run.

    Args:
        records: File with the `RECORD` of each image. It is moved into the cache.
        pixels: Folder of the shards with the pixels of the images.
        folder: Folder of the cache to write.
    """

    def describe(folder: Path) -> None:
        np.save(folder / INDEX, _index(records))
        shutil.copy(pixels / LIST, folder)
        records.replace(folder / RECORDS)

    write_cache(folder, describe)
    records.unlink(missing_ok=True)


def _index(records: Path) -> np.ndarray:
    """Return the (2, M) uint64 index: the first eight bytes of each sha256 and stamp, sorted, and their row numbers."""
    count = records.stat().st_size // RECORD.itemsize
    index = np.empty((2, 2 * count), np.uint64)
    for start in range(0, count, PIECE):
        some = np.fromfile(records, RECORD, PIECE, offset=start * RECORD.itemsize)
        for first, name in ((start, "sha256"), (count + start, "stamp")):
            names = np.ascontiguousarray(some[name]).view(np.uint64).reshape(len(some), -1)
            index[0, first : first + len(some)] = names[:, 0]
    order = np.argsort(index[0], kind="stable")
    index[:] = index[0, order], order
    index[1] %= max(count, 1)
    return index
