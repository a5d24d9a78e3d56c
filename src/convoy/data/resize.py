"""Resizing of a packed data set to one size, which reuses the resized images of an earlier run."""

import collections
import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import xxhash
from joblib import cpu_count
from tqdm import tqdm

from convoy.data import image_io as images
from convoy.data.cache import CacheDir, fingerprint, write_cache
from convoy.data.image_io import center_crop_resize
from convoy.data.packed.dataset_info import ChannelMoments
from convoy.data.packed.packed_dataset import PackedDataset
from convoy.data.packed.pixel_shards import contiguous_ranges

# Indices of splits; images that are in no split have `EXCLUDED`.
TRAIN, EXCLUDED = 0, -1
# Bytes of pixels that are resized at a time.
CHUNK = 2**24
INDEX = "index.npy"
# A resized image in the cache.
ENTRY = np.dtype(
    [
        ("picture", np.uint64),  # pixel hash of the original image
        ("check", np.uint64),  # hash of the resized pixels
        ("side", np.int8),  # index of the split
        ("row", np.int64),  # position among the images of the split
    ]
)
Shape = tuple[int, int, int]  # height, width, channels


def write_resized(
    packed: PackedDataset, sides: np.ndarray, shape: Shape, files: Sequence[Path], earlier: CacheDir
) -> ChannelMoments:
    """Resize images to a fixed size, reusing cached results.

    Each split is written as an array (N, H, W, C) uint8. The files are written sequentially, because everything written
    to a memory map would count as memory in use.

    Args:
        packed: The data set with the images.
        sides: The index of each image's file in `files`, or `EXCLUDED`.
        shape: Height, width and channels of the resized images.
        files: The `.npy` file to write for each split.
        earlier: Cache of an earlier run. It is replaced by one for this run.

    Returns:
        The channel sums of the training images.
    """
    sums = ChannelMoments(shape[-1])
    folder = earlier.folder / fingerprint([images, sys.modules[__name__]], ["numpy", "pillow", "xxhash"], *shape)
    index = np.empty(len(sides), ENTRY)
    index["picture"], index["side"] = packed.rows.columns("picture")["picture"], sides
    with contextlib.ExitStack() as stack:
        known = stack.enter_context(
            contextlib.closing(ResizeCache.load(folder, [earlier.output / file.name for file in files], shape))
        )
        opened = [stack.enter_context(file.open("wb")) for file in files]
        for side, file in enumerate(opened):
            rows = np.flatnonzero(sides == side)
            index["row"][rows] = np.arange(len(rows))
            described = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), *shape)}
            np.lib.format.write_array_header_1_0(file, described)
        start, bar = 0, stack.enter_context(tqdm(total=len(sides), desc="preprocess", unit=" images"))
        for fitted, checks in _fitted(packed, index["picture"], shape, known):
            here = slice(start, start := start + len(fitted))
            parts = [fitted[sides[here] == side] for side in range(len(opened))]
            for part, file in zip(parts, opened, strict=True):
                file.write(part.data)
            sums.add(parts[TRAIN])
            index["check"][here] = checks
            bar.update(len(fitted))
    # If all images have the right shape already, there is nothing worth caching.
    if (packed.places[:, :3] != shape).any():
        index = index[index["side"] != EXCLUDED]
        index = index[index["picture"].argsort(kind="stable")]
        write_cache(folder, lambda folder: np.save(folder / INDEX, index))
    return sums


class ResizeCache:
    """Resized images of an earlier run, found by the pixel hash of the original image.

    Args:
        index: (N,) `ENTRY`, sorted by pixel hash.
        files: Open files of the splits, each positioned at its first pixel.
        shape: Height, width and channels of the resized images.
    """

    def __init__(self, index: np.ndarray, files: Sequence[IO[bytes]], shape: Shape) -> None:
        self.index, self.files, self.shape = index, files, shape
        self.pictures = np.ascontiguousarray(index["picture"])
        self.starts = [file.tell() for file in files]

    @classmethod
    def load(cls, folder: Path, files: Sequence[Path], shape: Shape) -> "ResizeCache":
        """Open the index in a folder and the files that `write_resized` wrote; the cache is empty if one is missing."""
        with contextlib.ExitStack() as stack:
            try:
                opened = [stack.enter_context(file.open("rb", buffering=0)) for file in files]
                for file in opened:
                    np.lib.format.read_magic(file)
                    np.lib.format.read_array_header_1_0(file)
                known = cls(np.load(folder / INDEX), opened, shape)
            # The files are missing or incomplete.
            except (OSError, ValueError, EOFError):
                return cls(np.empty(0, ENTRY), [], shape)
            stack.pop_all()
            return known

    def close(self) -> None:
        for file in self.files:
            file.close()

    def find(self, pictures: np.ndarray) -> list[tuple[np.ndarray, int] | None]:
        """Look up images by their pixel hashes.

        Args:
            pictures: (N,) uint64 pixel hashes.

        Returns:
            For each hash the resized image (H, W, C) uint8 and its hash, or None if it is not cached or is damaged.
        """
        if not len(self.index):
            return [None] * len(pictures)
        entries = self.index[np.minimum(self.pictures.searchsorted(pictures), len(self.index) - 1)]
        return [
            self._read(entry) if entry["picture"] == picture else None
            for entry, picture in zip(entries, pictures, strict=True)
        ]

    def _read(self, entry: np.void) -> tuple[np.ndarray, int] | None:
        size = math.prod(self.shape)
        side, row = int(entry["side"]), int(entry["row"])
        read = os.pread(self.files[side].fileno(), size, self.starts[side] + row * size)
        check = xxhash.xxh3_64_intdigest(read)
        sound = len(read) == size and check == entry["check"]
        return (np.frombuffer(read, np.uint8).reshape(self.shape), check) if sound else None


def _fitted(
    packed: PackedDataset, pictures: np.ndarray, shape: Shape, known: ResizeCache
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield chunks of all images in order, as resized pixels (N, H, W, C) uint8 and their (N,) uint64 hashes."""
    at = packed.places
    sizes = at[:, 0] * at[:, 1] * at[:, 2]
    step = int(np.clip(CHUNK // max(math.prod(shape), sizes.max()), 1, 256))
    # Only the chunks in this queue are in memory.
    ahead: collections.deque[Future] = collections.deque()
    workers = cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(at), step):
            here = slice(start, start + step)
            ahead.append(pool.submit(_fit, packed, at[here], pictures[here], shape, known))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _fit(
    packed: PackedDataset, at: np.ndarray, pictures: np.ndarray, shape: Shape, known: ResizeCache
) -> tuple[np.ndarray, np.ndarray]:
    """Read or resize a chunk of images.

    Args:
        packed: The data set with the images.
        at: (N, 4) height, width, channels and offset of each image.
        pictures: (N,) uint64 pixel hashes.
        shape: Height, width and channels of the resized images.
        known: Cache of resized images.

    Returns:
        Pixels (N, H, W, C) uint8 and their hashes (N,) uint64. The hashes are 0 if no image had to be resized.
    """
    sizes = at[:, 0] * at[:, 1] * at[:, 2]
    # If no image has to be resized and there are no gaps between them, one read is enough.
    if (at[:, :3] == shape).all() and (at[1:, 3] == at[:-1, 3] + sizes[:-1]).all():
        pixels = packed.pixels.read(int(at[0, 3]), int(sizes.sum()))
        return pixels.reshape(-1, *shape), np.zeros(len(at), np.uint64)
    found = known.find(pictures)
    unknown = np.array([row for row, there in enumerate(found) if there is None], np.int64)
    for some in contiguous_ranges(at[unknown, 3], sizes[unknown]):
        rows = unknown[some]
        pixels, start = packed.pixels.read(int(at[rows[0], 3]), int(sizes[rows].sum())), 0
        for row in rows.tolist():
            image = pixels[start : (start := start + int(sizes[row]))].reshape(at[row, :3])
            fitted = center_crop_resize(image, shape[0], shape[2])
            found[row] = fitted, xxhash.xxh3_64_intdigest(fitted.data)
    images, checks = zip(*found, strict=True)  # type: ignore[arg-type]
    return np.stack(images), np.array(checks, np.uint64)
