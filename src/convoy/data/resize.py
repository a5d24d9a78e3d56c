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

from convoy.data import image_io
from convoy.data.cache import CacheDir, fingerprint, write_cache
from convoy.data.image_io import center_crop_resize
from convoy.data.packed.dataset_info import ChannelMoments
from convoy.data.packed.packed_dataset import PackedDataset
from convoy.data.packed.pixel_shards import contiguous_ranges

# Index of the training split, and the one of images that are in no split.
TRAIN, EXCLUDED = 0, -1
# Bytes of pixels that are resized at a time.
CHUNK_BYTES = 2**24
INDEX_FILE = "index.npy"
# A resized image in the cache.
ENTRY = np.dtype(
    [
        ("pixel_hash", np.uint64),  # of the original image
        ("resized_hash", np.uint64),  # hash of the resized pixels
        ("split_id", np.int8),  # index of the split
        ("row", np.int64),  # position among the images of the split
    ]
)
Shape = tuple[int, int, int]  # height, width, channels


def fingerprint_code(*shape: int) -> str:
    """Hash everything besides the images that determines resized images: code, libraries and their shape."""
    return fingerprint([image_io, sys.modules[__name__]], ["numpy", "pillow", "xxhash"], *shape)


def write_resized(
    packed: PackedDataset, split_ids: np.ndarray, shape: Shape, files: Sequence[Path], cache_dir: CacheDir
) -> ChannelMoments:
    """Resize images to a fixed size, reusing cached results.

    Each split is written as an array (N, H, W, C) uint8. The files are written sequentially, because everything written
    to a memory map would count as memory in use.

    Args:
        packed: The data set with the images.
        split_ids: The index of each image's file in `files`, or `EXCLUDED`.
        shape: Height, width and channels of the resized images.
        files: The `.npy` file to write for each split.
        cache_dir: Cache of an earlier run. It is replaced by one for this run.

    Returns:
        The channel sums of the training images.
    """
    moments = ChannelMoments(shape[-1])
    folder = cache_dir.folder / fingerprint_code(*shape)
    index = np.empty(len(split_ids), ENTRY)
    index["pixel_hash"], index["split_id"] = packed.table.read_columns("pixel_hash")["pixel_hash"], split_ids
    with contextlib.ExitStack() as stack:
        cache = stack.enter_context(
            contextlib.closing(ResizeCache.load(folder, [cache_dir.output / file.name for file in files], shape))
        )
        outputs = [stack.enter_context(file.open("wb")) for file in files]
        for split_id, output in enumerate(outputs):
            rows = np.flatnonzero(split_ids == split_id)
            index["row"][rows] = np.arange(len(rows))
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(rows), *shape)}
            np.lib.format.write_array_header_1_0(output, header)
        start, bar = 0, stack.enter_context(tqdm(total=len(split_ids), desc="preprocess", unit=" images"))
        for resized, hashes in _iter_resized(packed, index["pixel_hash"], shape, cache):
            chunk = slice(start, start := start + len(resized))
            by_split = [resized[split_ids[chunk] == split_id] for split_id in range(len(outputs))]
            for pixels, output in zip(by_split, outputs, strict=True):
                output.write(pixels.data)
            moments.add(by_split[TRAIN])
            index["resized_hash"][chunk] = hashes
            bar.update(len(resized))
    # If all images have the right shape already, there is nothing worth caching.
    if (packed.pixel_extents[:, :3] != shape).any():
        index = index[index["split_id"] != EXCLUDED]
        index = index[index["pixel_hash"].argsort(kind="stable")]
        write_cache(folder, lambda folder: np.save(folder / INDEX_FILE, index))
    return moments


class ResizeCache:
    """Resized images of an earlier run, found by the pixel hash of the original image.

    Args:
        index: (N,) `ENTRY`, sorted by pixel hash.
        files: Open files of the splits, each positioned at its first pixel.
        shape: Height, width and channels of the resized images.
    """

    def __init__(self, index: np.ndarray, files: Sequence[IO[bytes]], shape: Shape) -> None:
        self.index, self.files, self.shape = index, files, shape
        self.pixel_hashes = np.ascontiguousarray(index["pixel_hash"])
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
                cache = cls(np.load(folder / INDEX_FILE), opened, shape)
            # The files are missing or incomplete.
            except (OSError, ValueError, EOFError):
                return cls(np.empty(0, ENTRY), [], shape)
            stack.pop_all()
            return cache

    def close(self) -> None:
        """Close the files of the splits."""
        for file in self.files:
            file.close()

    def find(self, pixel_hashes: np.ndarray) -> list[tuple[np.ndarray, int] | None]:
        """Look up images by their pixel hashes.

        Args:
            pixel_hashes: (N,) uint64, of the original images.

        Returns:
            For each hash the resized image (H, W, C) uint8 and its hash, or None if it is not cached or is damaged.
        """
        if not len(self.index):
            return [None] * len(pixel_hashes)
        entries = self.index[np.minimum(self.pixel_hashes.searchsorted(pixel_hashes), len(self.index) - 1)]
        return [
            self._read(entry) if entry["pixel_hash"] == pixel_hash else None
            for entry, pixel_hash in zip(entries, pixel_hashes, strict=True)
        ]

    def _read(self, entry: np.void) -> tuple[np.ndarray, int] | None:
        size = math.prod(self.shape)
        split_id, row = int(entry["split_id"]), int(entry["row"])
        data = os.pread(self.files[split_id].fileno(), size, self.starts[split_id] + row * size)
        resized_hash = xxhash.xxh3_64_intdigest(data)
        is_intact = len(data) == size and resized_hash == entry["resized_hash"]
        return (np.frombuffer(data, np.uint8).reshape(self.shape), resized_hash) if is_intact else None


def _iter_resized(
    packed: PackedDataset, pixel_hashes: np.ndarray, shape: Shape, cache: ResizeCache
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield chunks of all images in order, as resized pixels (N, H, W, C) uint8 and their (N,) uint64 hashes."""
    extents = packed.pixel_extents
    sizes = extents[:, 0] * extents[:, 1] * extents[:, 2]
    step = int(np.clip(CHUNK_BYTES // max(math.prod(shape), sizes.max()), 1, 256))
    # Only the chunks in this queue are in memory.
    pending: collections.deque[Future] = collections.deque()
    workers = cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(extents), step):
            chunk = slice(start, start + step)
            pending.append(pool.submit(_resize_chunk, packed, extents[chunk], pixel_hashes[chunk], shape, cache))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _resize_chunk(
    packed: PackedDataset, extents: np.ndarray, pixel_hashes: np.ndarray, shape: Shape, cache: ResizeCache
) -> tuple[np.ndarray, np.ndarray]:
    """Read or resize a chunk of images.

    Args:
        packed: The data set with the images.
        extents: (N, 4) height, width, channels and offset of each image.
        pixel_hashes: (N,) uint64.
        shape: Height, width and channels of the resized images.
        cache: Cache of resized images.

    Returns:
        Pixels (N, H, W, C) uint8 and their hashes (N,) uint64. The hashes are 0 if no image had to be resized.
    """
    sizes, offsets = extents[:, 0] * extents[:, 1] * extents[:, 2], extents[:, 3]
    # If no image has to be resized and there are no gaps between them, one read is enough.
    if (extents[:, :3] == shape).all() and (offsets[1:] == offsets[:-1] + sizes[:-1]).all():
        pixels = packed.pixels.read(int(offsets[0]), int(sizes.sum()))
        return pixels.reshape(-1, *shape), np.zeros(len(extents), np.uint64)
    results = cache.find(pixel_hashes)
    missing = np.array([row for row, result in enumerate(results) if result is None], np.int64)
    for contiguous in contiguous_ranges(offsets[missing], sizes[missing]):
        rows = missing[contiguous]
        pixels, start = packed.pixels.read(int(offsets[rows[0]]), int(sizes[rows].sum())), 0
        for row in rows.tolist():
            image = pixels[start : (start := start + int(sizes[row]))].reshape(extents[row, :3])
            resized = center_crop_resize(image, shape[0], shape[2])
            results[row] = resized, xxhash.xxh3_64_intdigest(resized.data)
    images, hashes = zip(*results, strict=True)  # type: ignore[arg-type]
    return np.stack(images), np.array(hashes, np.uint64)
