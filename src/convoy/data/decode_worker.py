"""Judging: images read, hashed and decoded, in a process of its own that needs nothing else, as imports take time."""

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

from convoy.data import image_io, near_duplicates, pixel_shards
from convoy.data.cache import CacheDir, fingerprint, write_cache
from convoy.data.image_io import Decoded, InvalidImageError, as_image, decode, to_grey_or_rgb
from convoy.data.malloc import keep_memory
from convoy.data.near_duplicates import perceptual_hash, thumbnails
from convoy.data.pixel_shards import LIST, NEW, PIXELS, Shards, contiguous_ranges

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from convoy.data.sources.base import Content

BATCH_BYTES = 2**23  # of pixels and of files
MAX_BYTES = 256 << 20  # of one file: what is larger is not taken into memory
TOO_LARGE = f"is larger than {MAX_BYTES >> 20} MiB"

# what is known of an image
RECORD = np.dtype(
    [
        ("sha256", "V32"),  # of the file, or of the shape and pixels where there is none
        ("stamp", "V16"),  # a hash of the file's path, size and times; zeros where it may change unseen
        ("picture", np.uint64),  # a hash of the shape and the pixels
        ("phash", np.uint64),  # perceptual
        ("source_height", np.int32),  # pixels, in the file
        ("source_width", np.int32),
        ("height", np.int32),  # as kept
        ("width", np.int32),
        ("channels", np.int32),
        ("offset", np.int64),  # of the first of its pixels
    ]
)
UNSTAMPED = bytes(16)
TIMES = struct.Struct("<3qQ")  # and size and number of a file
SETTLED = 3_000_000_000  # ns after which another change to a file gives it another time, on any file system
NOTHING = -1  # in place of an open file
PIECE = 2**13  # records that are in memory at a time
RECORDS, INDEX = "records.bin", "index.npy"  # what `keep` leaves beside a list of shards


def decoding_fingerprint(longest_side: int) -> str:
    """What stands for all that decides what a file is decoded to."""
    libraries = ["numpy", "pillow", "simplejpeg", "xxhash"]
    return fingerprint([image_io, near_duplicates, pixel_shards, sys.modules[__name__]], libraries, longest_side)


@dataclasses.dataclass(frozen=True)
class Batch:
    """What became of images, in their order."""

    faults: list[str]  # why an image can't be used; "" where it can
    records: np.ndarray  # of those that can; their offsets are in what an earlier run left, or `NEW`
    pixels: bytes  # of those that are new, end to end

    @property
    def sizes(self) -> np.ndarray:
        """(N,): the bytes of each image's pixels."""
        return _sizes(self.records)


def _sizes(records: np.ndarray) -> np.ndarray:
    return records["height"].astype(np.int64) * records["width"] * records["channels"]


def init_worker() -> None:
    """In a process that does nothing but judge."""
    keep_memory()
    gc.freeze()  # what was imported stays
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes its complaints there; Pillow's errors tell enough


def decode_batch(contents: list["Content"], longest_side: int, earlier: CacheDir) -> Batch:
    """Read, hash and decode images: all of them, or the first whose new pixels come to four times `BATCH_BYTES`.

    A file is not read again that has the size and the times with which an earlier run read it.
    """
    known = _known(earlier)
    faults, records, new = [""] * len(contents), np.zeros(len(contents), RECORD), {}
    places, told = known.find([_name(content) for content in contents] if known else [])
    records[places] = told
    count = 0  # bytes of pixels
    for place in sorted({*range(len(contents))}.difference(places.tolist())):
        if count > 4 * BATCH_BYTES:
            del faults[place:]
            break
        try:
            data, stamp = _read(contents[place])
            sha256 = _digest(data)
            _, told = known.find([sha256])
            if len(told):  # it is in another place by now
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
    """By which an earlier run may know an image without its being read: the stamp of a file, the sha256 of all else."""
    try:
        if isinstance(content, str):
            return _stamp(content, os.stat(content))  # noqa: PTH116 a third
    except OSError:  # which to read it will tell
        return UNSTAMPED
    return UNSTAMPED if isinstance(content, InvalidImageError) else _digest(content)


def _stamp(path: str, told: os.stat_result) -> bytes:
    """What changes as soon as the file does; `UNSTAMPED` where it may just be changing."""
    modified, changed = told.st_mtime_ns, told.st_ctime_ns
    if time.time_ns() - max(modified, changed) < SETTLED:
        return UNSTAMPED
    return xxhash.xxh3_128_digest(TIMES.pack(told.st_size, modified, changed, told.st_ino) + os.fsencode(path))


def _read(content: "Content") -> tuple[bytes | np.ndarray, bytes]:
    """An image as it came, and the stamp of its file."""
    if isinstance(content, InvalidImageError):
        raise content
    if not isinstance(content, str):
        return content, UNSTAMPED
    try:
        file = os.open(content, os.O_RDONLY)  # which costs half of what `open` does, and that counts for small files
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
    """A file's bytes, or as many as there are: one read may give fewer."""
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
    """sha256, of an image (H, W, C) with its shape."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).digest()
    height, width, channels = data.shape
    algorithm = hashlib.sha256(f"{height}x{width}x{channels}".encode())
    algorithm.update(np.ascontiguousarray(data).data)
    return algorithm.digest()


class DecodeCache:
    """What an earlier run decoded, found by the sha256 or the stamp of a file."""

    def __init__(self, index: np.ndarray, descriptor: int, pixels: Shards | None) -> None:
        self.starts, self.rows = np.asarray(index)  # (2, names)
        self.descriptor, self.pixels = descriptor, pixels  # of the records' file, and what they tell of

    @classmethod
    def load(cls, earlier: CacheDir) -> "DecodeCache":
        """What `keep` wrote, and the shards that were published then; nothing is known where it is missing."""
        try:
            index = np.load(earlier.folder / INDEX, mmap_mode="r")  # which the processes share
            pixels = Shards.load(earlier.output / PIXELS, earlier.folder / LIST)
            return cls(index, os.open(earlier.folder / RECORDS, os.O_RDONLY), pixels)
        except (OSError, ValueError, EOFError, TypeError):  # gone, or never whole
            return cls(np.empty((2, 0), np.uint64), NOTHING, None)

    def __bool__(self) -> bool:
        return len(self.starts) > 0

    def find(self, names: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Which of the files with these sha256s or stamps are there, pixels and all, and their records."""
        if not self:
            return np.empty(0, np.int64), np.empty(0, RECORD)
        starts = np.frombuffer(b"".join([name[:8] for name in names]), np.uint64)
        at = np.minimum(self.starts.searchsorted(starts), len(self.starts) - 1)
        places = np.flatnonzero((self.starts[at] == starts) & (starts != 0))  # which those of `UNSTAMPED` are
        rows = self.rows[at[places]].astype(np.int64)
        records = np.zeros(len(rows), RECORD)
        for some in contiguous_ranges(rows, np.ones_like(rows)):
            os.preadv(self.descriptor, [records[some].view(np.uint8).data], rows[some.start] * RECORD.itemsize)
        stated = zip(places.tolist(), records["sha256"].tolist(), records["stamp"].tolist(), strict=True)
        same = np.array([names[place] in (sha256, stamp) for place, sha256, stamp in stated], bool)
        same[same] = self._whole(records[same])
        return places[same], records[same]

    def _whole(self, records: np.ndarray) -> np.ndarray:
        """(N,): whether the pixels are still those that they were: a disk may forget."""
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
        except OSError:  # it is gone
            return np.empty(0, np.uint8)

    def close(self) -> None:
        if self.descriptor != NOTHING:
            os.close(self.descriptor)


@functools.cache
def _known(earlier: CacheDir) -> DecodeCache:
    """For as long as the process lives."""
    return DecodeCache.load(earlier)


def _picture(pixels: "ReadableBuffer", height: int, width: int, channels: int) -> int:
    """A hash of the shape and the pixels, in a thirtieth of the time of sha256."""
    return xxhash.xxh3_64_intdigest(pixels, seed=height << 34 | width << 2 | channels)


def keep(records: Path, pixels: Path, folder: Path) -> None:
    """Leave in `folder` what is known of the images in the shards in `pixels`. `records` is taken from where it is."""

    def describe(folder: Path) -> None:
        np.save(folder / INDEX, _index(records))
        shutil.copy(pixels / LIST, folder)
        records.replace(folder / RECORDS)

    write_cache(folder, describe)
    records.unlink(missing_ok=True)


def _index(records: Path) -> np.ndarray:
    """(2, names) uint64: the first eight bytes of each sha256 and stamp, in order, and the rows that have them."""
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
