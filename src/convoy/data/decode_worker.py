"""Decode worker: reads, hashes and decodes images in a separate process."""

import dataclasses
import functools
import gc
import hashlib
import os
import struct
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from convoy.core.malloc import keep_memory
from convoy.data import completeness, decode_cache, image_io, near_duplicates
from convoy.data.cache import CacheDir, fingerprint
from convoy.data.decode_cache import BILEVEL, ONE_COLOUR, RECORD, DecodeCache, hash_pixels, pixel_bytes
from convoy.data.image_io import MAX_PIXELS, Decoded, InvalidImageError, as_image, decode, to_grey_or_rgb
from convoy.data.near_duplicates import compute_perceptual_hashes, make_thumbnails
from convoy.data.packed import pixel_shards
from convoy.data.packed.pixel_shards import NOT_STORED

if TYPE_CHECKING:
    from convoy.data.sources.base import Content

# Target size of a batch, in bytes of pixels and of files.
BATCH_BYTES = 2**23
# Files with more bytes are rejected and not read into memory.
MAX_FILE_BYTES = 256 << 20
TOO_LARGE = f"is larger than {MAX_FILE_BYTES >> 20} MiB"
# Stamp of an image without a file, or of a file that may change without changing its stamp.
NO_STAMP = bytes(16)
# Size, modification time, change time and inode number of a file.
FILE_STATUS = struct.Struct("<3qQ")
# Time after which another change to a file gives it another time stamp, on any file system.
SETTLED_NS = 3_000_000_000


def decoding_fingerprint(longest_side: int, max_pixels: int = MAX_PIXELS, first_page: bool = False) -> str:
    """Hash everything that determines the decoded pixels of a file: code, libraries and settings."""
    modules = [image_io, completeness, near_duplicates, pixel_shards, decode_cache, sys.modules[__name__]]
    packages = ["numpy", "pi-heif", "pillow", "simplejpeg", "xxhash"]
    return fingerprint(modules, packages, longest_side, max_pixels, first_page)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Result of decoding a batch of images, in their order."""

    faults: list[str]  # the reason why each image can't be used; "" for valid images
    records: np.ndarray  # (N,) `RECORD` of the valid images, with offsets in an earlier run's pixels or `NOT_STORED`
    pixels: bytes  # pixels of the `NOT_STORED` images, end to end

    @property
    def sizes(self) -> np.ndarray:
        """Size of each valid image's pixels in bytes, as (N,) int64."""
        return pixel_bytes(self.records)


def init_worker() -> None:
    """Set up a process that only decodes images."""
    keep_memory()
    # Imported modules stay until the process ends, so the garbage collector need not scan them.
    gc.freeze()
    # Silence stderr, where libtiff writes its warnings; Pillow's errors are sufficient.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def decode_batch(
    contents: list["Content"],
    longest_side: int,
    cache_dir: CacheDir,
    max_pixels: int = MAX_PIXELS,
    first_page: bool = False,
) -> Batch:
    """Read, hash and decode images.

    A file whose size and times are the same as when an earlier run read it is not read again.

    Args:
        contents: The images: paths, bytes of files, pixels, or errors.
        longest_side: Larger images are reduced to this many pixels on their longest side.
        cache_dir: Cache of an earlier run.
        max_pixels: Images with more pixels are refused.
        first_page: Whether the first page is taken of a TIFF that has several, which is refused otherwise.

    Returns:
        The result for all images, or only for the first ones if their new pixels exceed four times `BATCH_BYTES`.
    """
    cache = _open_cache(cache_dir)
    faults, records = [""] * len(contents), np.zeros(len(contents), RECORD)
    cached, cached_records = cache.find([_cache_key(content) for content in contents] if cache else [])
    records[cached] = cached_records
    new: dict[int, np.ndarray] = {}
    new_bytes = 0
    for index in sorted({*range(len(contents))}.difference(cached.tolist())):
        if new_bytes > 4 * BATCH_BYTES:
            del faults[index:]
            break
        try:
            data, stamp = _read(contents[index])
            sha256 = _checksum(data)
            _, found = cache.find([sha256])
            # The image is cached, but its file was moved or touched.
            if len(found):
                records[index] = found[0]
                records[index]["file_stamp"] = stamp
            else:
                decoded = _decode(data, longest_side, max_pixels, first_page)
                image = new[index] = np.ascontiguousarray(decoded.pixels)
                pixel_hash = hash_pixels(image.data, *image.shape)
                size = decoded.height, decoded.width
                traits = BILEVEL * decoded.is_bilevel + ONE_COLOUR * _has_one_colour(image)
                place = (NOT_STORED, decoded.frames, traits)
                records[index] = (sha256, stamp, pixel_hash, 0, *size, *image.shape, *place)
                new_bytes += image.size
        except InvalidImageError as fault:
            faults[index] = str(fault)
    if new:
        records["phash"][list(new)] = compute_perceptual_hashes(make_thumbnails(list(new.values())))
    valid = [index for index, fault in enumerate(faults) if not fault]
    return Batch(faults, records[valid], b"".join(image.data for image in new.values()))


@functools.cache
def _open_cache(cache_dir: CacheDir) -> DecodeCache:
    """Open the cache once per process."""
    return DecodeCache.load(cache_dir)


def _cache_key(content: "Content") -> bytes:
    """Return the key by which the cache finds an image without reading it: a file's stamp, or the sha256."""
    try:
        if isinstance(content, str):
            # `os.stat` takes a third of the time of `Path.stat`.
            return _file_stamp(content, os.stat(content))  # noqa: PTH116
    # Reading the file will report the error.
    except OSError:
        return NO_STAMP
    return NO_STAMP if isinstance(content, InvalidImageError) else _checksum(content)


def _file_stamp(path: str, status: os.stat_result) -> bytes:
    """Return a hash that changes when the file does, `NO_STAMP` if the file has changed just now."""
    modified, changed = status.st_mtime_ns, status.st_ctime_ns
    if time.time_ns() - max(modified, changed) < SETTLED_NS:
        return NO_STAMP
    packed = FILE_STATUS.pack(status.st_size, modified, changed, status.st_ino)
    return xxhash.xxh3_128_digest(packed + os.fsencode(path))


def _read(content: "Content") -> tuple[bytes | np.ndarray, bytes]:
    """Read an image, and return its bytes or pixels and the stamp of its file."""
    if isinstance(content, InvalidImageError):
        raise content
    if not isinstance(content, str):
        return content, NO_STAMP
    try:
        # `os.open` takes half of the time of `open`, which matters for small files.
        file = os.open(content, os.O_RDONLY)
        try:
            status = os.fstat(file)
            if status.st_size > MAX_FILE_BYTES:
                raise InvalidImageError(TOO_LARGE)
            return _read_bytes(file, status.st_size), _file_stamp(content, status)
        finally:
            os.close(file)
    except OSError as error:
        raise InvalidImageError(f"can't be read: {error.strerror}") from None


def _read_bytes(file: int, size: int) -> bytes:
    """Read `size` bytes of a file, or fewer if it ends early; a single read may return fewer bytes."""
    parts, left = [], size
    while left and (part := os.read(file, left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _has_one_colour(image: np.ndarray) -> bool:
    # Of nearly all images, the first row is enough.
    return bool((image[0] == image[0, 0]).all() and (image == image[0, 0]).all())


def _decode(data: bytes | np.ndarray, longest_side: int, max_pixels: int, first_page: bool) -> Decoded:
    if isinstance(data, bytes):
        return decode(data, longest_side, max_pixels, first_page)
    height, width, _ = data.shape
    is_small = max(height, width) <= longest_side
    return Decoded(data if is_small else to_grey_or_rgb(as_image(data), longest_side), height, width)


def _checksum(data: bytes | np.ndarray) -> bytes:
    """Return the sha256 of the bytes of a file, or of the shape and pixels of an image (H, W, C)."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).digest()
    height, width, channels = data.shape
    algorithm = hashlib.sha256(f"{height}x{width}x{channels}".encode())
    algorithm.update(np.ascontiguousarray(data).data)
    return algorithm.digest()
