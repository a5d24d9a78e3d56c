"""Judging: images read, hashed and decoded, in a process of its own that needs nothing else, as imports take time."""

import dataclasses
import functools
import gc
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from threadpoolctl import threadpool_limits

from convoy import images, likeness
from convoy.images import BadImage, Decoded, as_image, decode, plain
from convoy.likeness import perceptual_hash, thumbnails
from convoy.memory import keep_memory
from convoy.remembered import fingerprint, remember

if TYPE_CHECKING:
    from convoy.datasets.source import Content

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
STAMPED = slice(32, 48)  # where the stamp stands among the bytes of a record
UNSTAMPED = bytes(16)
SETTLED = 3e9  # ns after which another change to a file gives it another time, on any file system
NEW = -1  # in place of an offset
NOTHING = -1  # in place of an open file
PIECE = 2**13  # records that are in memory at a time
RECORDS, INDEX, PIXELS = "records.bin", "index.npy", "pixels.bin"  # what `keep` leaves


def way(longest_side: int) -> str:
    """What stands for all that decides what a file is decoded to."""
    libraries = ["numpy", "pillow", "simplejpeg", "xxhash"]
    return fingerprint([images, likeness, sys.modules[__name__]], libraries, longest_side)


@dataclasses.dataclass(frozen=True)
class Batch:
    """What became of images, in their order."""

    faults: list[str]  # why an image can't be used; "" where it can
    records: np.ndarray  # of those that can; their offsets are in what an earlier run left, or `NEW`
    pixels: bytes  # of those that are new, end to end

    @property
    def sizes(self) -> np.ndarray:
        """(N,): the bytes of each image's pixels."""
        return self.records["height"].astype(np.int64) * self.records["width"] * self.records["channels"]

    def pieces(self, earlier: "Earlier") -> Iterator[bytes | memoryview]:
        """The pixels of all images, end to end: those that are known lie where they were, and come in long pieces."""
        sizes, offsets = self.sizes, self.records["offset"]
        new = offsets == NEW
        starts = np.where(new, np.cumsum(sizes * new) - sizes, offsets)
        goes_on = (new[1:] == new[:-1]) & (starts[1:] == starts[:-1] + sizes[:-1])
        for run in np.split(np.arange(len(new)), np.flatnonzero(~goes_on) + 1):
            if len(run):
                start, count = int(starts[run[0]]), int(sizes[run].sum())
                yield memoryview(self.pixels)[start : start + count] if new[run[0]] else earlier.read(start, count)


def settle() -> None:
    """For a process that does nothing but judge."""
    keep_memory()
    gc.freeze()  # what was imported stays
    threadpool_limits(1)  # threads of these processes would only wait for each other
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes its complaints there; Pillow's errors tell enough


def judge(contents: list["Content"], longest_side: int, earlier: Path) -> Batch:
    """Read, hash and decode images: all of them, or the first that come to four times `BATCH_BYTES`.

    A file is not read again that has the size and the times with which an earlier run read it.
    """
    known = _known(earlier)
    faults: list[str] = []
    rows: list[tuple] = []
    new: list[tuple[int, np.ndarray]] = []
    count = 0  # bytes of pixels
    for content in contents:
        if count > 4 * BATCH_BYTES:
            break
        try:
            row, image = known.find(_stamp_of(content)) if known else ((), None)
            if image is None:
                data, stamp = _read(content)
                sha256 = _digest(data)
                row, image = known.find(sha256)
                row = (sha256, stamp, *row[2:])  # it may be in another place by now
                if image is None:
                    found = _decode(data, longest_side)
                    image = np.ascontiguousarray(found.pixels)
                    row = (sha256, stamp, _picture(image), 0, found.height, found.width, *image.shape, NEW)
                    new.append((len(rows), image))
            rows.append(row)
            count += image.size
            faults.append("")
        except BadImage as fault:
            faults.append(str(fault))
    records = np.array(rows, RECORD)
    if new:
        places, fresh = zip(*new, strict=True)
        records["phash"][list(places)] = perceptual_hash(thumbnails(fresh))
    return Batch(faults, records, b"".join(image.data for _, image in new))


def _stamp_of(content: "Content") -> bytes:
    """Of a file; `UNSTAMPED` for all else."""
    try:
        return _stamp(content, os.stat(content)) if isinstance(content, str) else UNSTAMPED  # noqa: PTH116 a third
    except OSError:  # which to read it will tell
        return UNSTAMPED


def _stamp(path: str, told: os.stat_result) -> bytes:
    """What changes as soon as the file does; `UNSTAMPED` where it may just be changing."""
    if time.time_ns() - max(told.st_mtime_ns, told.st_ctime_ns) < SETTLED:
        return UNSTAMPED
    parts = (path, told.st_size, told.st_mtime_ns, told.st_ctime_ns, told.st_ino)
    return xxhash.xxh3_128_digest(repr(parts).encode())


def _read(content: "Content") -> tuple[bytes | np.ndarray, bytes]:
    """An image as it came, and the stamp of its file."""
    if isinstance(content, BadImage):
        raise content
    if not isinstance(content, str):
        return content, UNSTAMPED
    try:
        file = os.open(content, os.O_RDONLY)  # which costs half of what `open` does, and that counts for small files
        try:
            told = os.fstat(file)
            if told.st_size > MAX_BYTES:
                raise BadImage(TOO_LARGE)
            return os.read(file, told.st_size), _stamp(content, told)
        finally:
            os.close(file)
    except OSError as error:
        raise BadImage(f"can't be read: {error.strerror}") from None


def _decode(data: bytes | np.ndarray, longest_side: int) -> Decoded:
    if isinstance(data, bytes):
        return decode(data, longest_side)
    height, width, _ = data.shape
    small = max(height, width) <= longest_side
    return Decoded(data if small else plain(as_image(data), longest_side), height, width)


def _digest(data: bytes | np.ndarray) -> bytes:
    """sha256, of an image (H, W, C) with its shape."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).digest()
    height, width, channels = data.shape
    algorithm = hashlib.sha256(f"{height}x{width}x{channels}".encode())
    algorithm.update(np.ascontiguousarray(data).data)
    return algorithm.digest()


class Earlier:
    """What an earlier run decoded, found by the sha256 or the stamp of a file."""

    def __init__(self, index: np.ndarray, records: int, pixels: int) -> None:
        self.starts, self.rows = np.asarray(index)  # (2, names)
        # descriptors of open files: of a memory map all that was read would count as memory
        self.records, self.pixels = records, pixels

    @classmethod
    def load(cls, folder: Path) -> "Earlier":
        """From a folder that `keep` wrote; nothing is known where it is missing."""
        try:
            index = np.load(folder / INDEX, mmap_mode="r")  # which the processes share
            return cls(index, *(os.open(folder / name, os.O_RDONLY) for name in (RECORDS, PIXELS)))
        except (OSError, ValueError):
            return cls(np.empty((2, 0), np.uint64), NOTHING, NOTHING)

    def __bool__(self) -> bool:
        return len(self.starts) > 0

    def find(self, name: bytes) -> tuple[tuple, np.ndarray | None]:
        """The record and the pixels, (H, W, 1 or 3) uint8, of the file with this sha256 or stamp; else (), None."""
        if not self or name == UNSTAMPED:
            return (), None
        at = self.starts.searchsorted(np.frombuffer(name, np.uint64, 1)[0])
        if at == len(self.starts):
            return (), None
        told = os.pread(self.records, RECORD.itemsize, int(self.rows[at]) * RECORD.itemsize)
        if len(told) < RECORD.itemsize or not (told.startswith(name) or told[STAMPED] == name):
            return (), None
        record: tuple = np.frombuffer(told, RECORD)[0].item()
        _, _, picture, *_, height, width, channels, offset = record
        size = height * width * channels
        image = np.frombuffer(self.read(offset, size), np.uint8)
        if len(image) != size or _picture(image := image.reshape(height, width, channels)) != picture:
            return (), None  # a disk may forget
        return record, image

    def read(self, offset: int, count: int) -> bytes:
        """So many bytes of the pixels."""
        return os.pread(self.pixels, count, offset)

    def close(self) -> None:
        for file in (self.records, self.pixels):
            if file != NOTHING:
                os.close(file)


@functools.cache
def _known(folder: Path) -> Earlier:
    """For as long as the process lives."""
    return Earlier.load(folder)


def _picture(pixels: np.ndarray) -> int:
    """A hash of the shape and the pixels, in a thirtieth of the time of sha256."""
    height, width, channels = pixels.shape
    return xxhash.xxh3_64_intdigest(pixels.data, seed=height << 34 | width << 2 | channels)


def keep(records: Path, pixels: Path, folder: Path) -> None:
    """Leave in `folder` what was decoded, for a later run: `records` is taken from where it is."""
    made = {RECORDS: records, PIXELS: pixels}
    remember(folder, made, lambda folder: np.save(folder / INDEX, _index(records)))
    records.unlink()


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
