"""Pixel shards: the pixels of all images, end to end, in files that stay the same as long as their images do."""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

# The folder of the shards, and the file in it with the name and size in bytes of each shard, in order.
PIXELS_FOLDER, SHARD_LIST = "pixels", "shards.json"
# A shard has this name until it is complete.
PARTIAL_SHARD = "partial"
# Average and largest size of a shard. With small shards, most are unchanged when images are added; with large ones,
# there are few files.
MEAN_SHARD_BYTES, MAX_SHARD_BYTES = 2**24, 2**26
# Bytes that are in memory at a time.
CHUNK_BYTES = 2**23
# Offset of an image whose pixels are not in an earlier version of the shards.
NOT_STORED = -1


class MissingShardError(Exception):
    """Error for pixels of an earlier run that disappear while they are being copied."""


@dataclasses.dataclass(frozen=True)
class Shards:
    """Sequence of bytes that is stored in several files, of which none stays open or in memory."""

    folder: Path
    names: list[str]  # S file names, in order
    ends: np.ndarray  # (S,) int64, bytes; the offset at which each shard ends

    @classmethod
    def load(cls, folder: Path, list_file: Path | None = None) -> "Shards":
        """Load the list of the shards in a folder.

        Args:
            folder: Folder of the shards.
            list_file: File with the list of shards, by default the one in `folder`.

        Raises:
            OSError: If there is no list.
            ValueError: If the list is damaged or empty.
        """
        names, sizes = zip(*json.loads((list_file or folder / SHARD_LIST).read_text()), strict=True)
        return cls(folder, list(names), np.cumsum(sizes, dtype=np.int64))

    def read(self, start: int, count: int) -> np.ndarray:
        """Read bytes from the shards.

        The files are not memory-mapped, because everything read from a memory map would count as memory in use.

        Args:
            start: Offset of the first byte.
            count: Number of bytes.

        Returns:
            (count,) uint8, or fewer if a file is shorter than it should be.

        Raises:
            OSError: If a file is missing.
        """
        stop, parts = start + count, []
        for shard in range(self._find_shard(start), len(self.names)):
            shard_range = self._shard_range(shard)
            # A count of -1 would make NumPy read the rest of the file.
            part_count = max(min(stop, shard_range.stop) - start, 0)
            file = self.folder / self.names[shard]
            parts.append(np.fromfile(file, np.uint8, part_count, offset=start - shard_range.start))
            start += part_count
            if start >= stop:
                break
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def find_file(self, byte_range: range) -> Path | None:
        """Return the file of the shard that contains exactly this range of bytes, None if there is none."""
        shard = self._find_shard(byte_range.start)
        return self.folder / self.names[shard] if self._shard_range(shard) == byte_range else None

    def _find_shard(self, offset: int) -> int:
        return int(self.ends.searchsorted(offset, "right").clip(max=len(self.names) - 1))

    def _shard_range(self, shard: int) -> range:
        return range(int(self.ends[shard - 1]) if shard else 0, int(self.ends[shard]))


class ShardWriter:
    """Writer of shards into a new folder.

    The images themselves determine where a shard ends, and the images in a shard determine its name. So most shards
    stay the same when images are added, changed or removed: these are hard-linked from `earlier`.

    Args:
        folder: Folder to create.
        earlier: Shards of an earlier run, None if there are none.
    """

    def __init__(self, folder: Path, earlier: Shards | None) -> None:
        folder.mkdir()
        self.folder, self.earlier = folder, earlier
        self.names_and_sizes: list[tuple[str, int]] = []
        self._start_shard()

    def _start_shard(self) -> None:
        self.name_hash, self.size = xxhash.xxh3_128(), 0
        # The range of bytes of `earlier` with which this shard begins, and which is not written yet.
        self.reused = range(0)
        self.file: IO[bytes] | None = None

    def write(self, pixel_hashes: np.ndarray, sizes: np.ndarray, offsets: np.ndarray, pixels: bytes) -> None:
        """Append N images.

        Args:
            pixel_hashes: (N,) uint64.
            sizes: (N,) sizes of the images, in bytes.
            offsets: (N,) offsets of the images in `earlier`; `NOT_STORED` for those that are not there.
            pixels: Pixels of the `NOT_STORED` images, end to end.
        """
        is_new = offsets == NOT_STORED
        starts = np.where(is_new, np.cumsum(sizes * is_new) - sizes, offsets)
        # An image is the last of its shard with a probability of its size / mean size; its hash is the random number.
        is_last = pixel_hashes / 2.0**64 < sizes / MEAN_SHARD_BYTES
        begin = 0
        while begin < len(sizes):
            ends = np.flatnonzero(is_last[begin:] | (self.size + np.cumsum(sizes[begin:]) > MAX_SHARD_BYTES))
            end = begin + int(ends[0]) + 1 if len(ends) else len(sizes)
            for images in contiguous_ranges(starts[begin:end], sizes[begin:end], is_new[begin:end]):
                first, last = begin + images.start, begin + images.stop - 1
                byte_range = range(int(starts[first]), int(starts[last] + sizes[last]))
                if is_new[first]:
                    self._open_file().write(memoryview(pixels)[byte_range.start : byte_range.stop])
                else:
                    self._append_earlier(byte_range)
            self.name_hash.update(np.ascontiguousarray(pixel_hashes[begin:end]).data)
            self.size += int(sizes[begin:end].sum())
            if len(ends):
                self._finish_shard()
            begin = end

    def _append_earlier(self, byte_range: range) -> None:
        """Append a range of bytes of `earlier`."""
        if self.file is None and (not self.reused or self.reused.stop == byte_range.start):
            self.reused = range((self.reused or byte_range).start, byte_range.stop)
        else:
            self._copy(self._open_file(), byte_range)

    def close(self) -> None:
        """Finish the last shard, and write the list of shards."""
        if self.size:
            self._finish_shard()
        (self.folder / SHARD_LIST).write_text(json.dumps(self.names_and_sizes) + "\n")

    def _open_file(self) -> IO[bytes]:
        if self.file is None:
            self.file = (self.folder / PARTIAL_SHARD).open("wb")
            self._copy(self.file, self.reused)
        return self.file

    def _copy(self, file: IO[bytes], byte_range: range) -> None:
        for start in byte_range[::CHUNK_BYTES]:
            assert self.earlier is not None
            count = min(CHUNK_BYTES, byte_range.stop - start)
            try:
                chunk = self.earlier.read(start, count)
            # A missing file is treated like one that is too short.
            except OSError:
                chunk = np.empty(0, np.uint8)
            if len(chunk) < count:
                raise MissingShardError(f"{self.earlier.folder} was changed while it was read: run this again")
            file.write(chunk.data)

    def _finish_shard(self) -> None:
        shard = self.folder / self.name_hash.hexdigest()
        if self.file is not None or not self._link(shard):
            with self._open_file():
                pass
            (self.folder / PARTIAL_SHARD).replace(shard)
        self.names_and_sizes.append((shard.name, self.size))
        self._start_shard()

    def _link(self, shard: Path) -> bool:
        """Hard-link the shard from `earlier`, and return whether it exists there and could be linked."""
        earlier = self.earlier.find_file(self.reused) if self.earlier else None
        try:
            if earlier is None or earlier.name != shard.name or earlier.stat().st_size != self.size:
                return False
            os.link(earlier, shard)
        # An earlier shard of this folder has the same images.
        except FileExistsError:
            return True
        # Not every file system supports hard links.
        except OSError:
            return False
        return True


def contiguous_ranges(starts: np.ndarray, sizes: np.ndarray, kinds: np.ndarray | None = None) -> Iterator[slice]:
    """Group chunks that are of one kind and end to end into ranges of about `CHUNK_BYTES`.

    Args:
        starts: (N,) offsets of the chunks.
        sizes: (N,) sizes of the chunks.
        kinds: (N,) kinds of the chunks; by default, all are of one kind.

    Returns:
        Slices of the N chunks, in order.
    """
    blocks = np.cumsum(sizes) // CHUNK_BYTES
    is_gap = (starts[1:] != starts[:-1] + sizes[:-1]) | (blocks[1:] != blocks[:-1])
    if kinds is not None:
        is_gap |= kinds[1:] != kinds[:-1]
    ends = [0, *(np.flatnonzero(is_gap) + 1).tolist(), len(starts)]
    return (slice(start, end) for start, end in itertools.pairwise(ends) if start < end)
