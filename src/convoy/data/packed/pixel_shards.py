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
PIXELS, LIST = "pixels", "shards.json"
ARRIVING = "arriving"
# Average and largest size of a shard, in bytes. With small shards, most are unchanged when images are added; with large
# ones, there are few files.
MEAN, MOST = 2**24, 2**26
# Bytes that are in memory at a time.
RUN = 2**23
# Offset of an image whose pixels are not in an earlier version of the shards.
NEW = -1


class LostShard(Exception):
    """Error for pixels of an earlier run that disappear while they are being copied."""


@dataclasses.dataclass(frozen=True)
class Shards:
    """Sequence of bytes that is stored in several files, of which none stays open or in memory."""

    folder: Path
    names: list[str]  # S file names, in order
    ends: np.ndarray  # (S,) int64, bytes; the offset at which each shard ends

    @classmethod
    def load(cls, folder: Path, listed: Path | None = None) -> "Shards":
        """Load the list of the shards in a folder.

        Args:
            folder: Folder of the shards.
            listed: File with the list of shards, by default the one in `folder`.

        Raises:
            OSError: If there is no list.
            ValueError: If the list is damaged or empty.
        """
        names, sizes = zip(*json.loads((listed or folder / LIST).read_text()), strict=True)
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
        for shard in range(self._at(start), len(self.names)):
            begin, end = self._extent(shard)
            # A count of -1 would make NumPy read the rest of the file.
            here = max(min(stop, end) - start, 0)
            parts.append(np.fromfile(self.folder / self.names[shard], np.uint8, here, offset=start - begin))
            start += here
            if start >= stop:
                break
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def file_of(self, part: range) -> Path | None:
        """Return the file of the shard that contains exactly this range of bytes, None if there is none."""
        shard = self._at(part.start)
        return self.folder / self.names[shard] if self._extent(shard) == (part.start, part.stop) else None

    def _at(self, place: int) -> int:
        return int(self.ends.searchsorted(place, "right").clip(max=len(self.names) - 1))

    def _extent(self, shard: int) -> tuple[int, int]:
        return int(self.ends[shard - 1]) if shard else 0, int(self.ends[shard])


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
        self.listed: list[tuple[str, int]] = []
        self._begin()

    def _begin(self) -> None:
        self.name, self.size = xxhash.xxh3_128(), 0
        # The range of bytes of `earlier` with which this shard begins, and which is not written yet.
        self.known = range(0)
        self.file: IO[bytes] | None = None

    def write(self, pictures: np.ndarray, sizes: np.ndarray, offsets: np.ndarray, pixels: bytes) -> None:
        """Append N images.

        Args:
            pictures: (N,) uint64 pixel hashes.
            sizes: (N,) sizes of the images, in bytes.
            offsets: (N,) offsets of the images in `earlier`; `NEW` for those that are not there.
            pixels: Pixels of the `NEW` images, end to end.
        """
        new = offsets == NEW
        starts = np.where(new, np.cumsum(sizes * new) - sizes, offsets)
        # An image is the last of its shard with a probability of its size / `MEAN`; its hash is the random number.
        last = pictures / 2.0**64 < sizes / MEAN
        begin = 0
        while begin < len(sizes):
            ends = np.flatnonzero(last[begin:] | (self.size + np.cumsum(sizes[begin:]) > MOST))
            end = begin + int(ends[0]) + 1 if len(ends) else len(sizes)
            for some in contiguous_ranges(starts[begin:end], sizes[begin:end], new[begin:end]):
                here = slice(begin + some.start, begin + some.stop)
                part = range(int(starts[here.start]), int(starts[here.stop - 1] + sizes[here.stop - 1]))
                self._add(part, memoryview(pixels)[part.start : part.stop] if new[here.start] else None)
            self.name.update(np.ascontiguousarray(pictures[begin:end]).data)
            self.size += int(sizes[begin:end].sum())
            if len(ends):
                self._end()
            begin = end

    def _add(self, part: range, new: memoryview | None) -> None:
        """Append new bytes, or a range of bytes of `earlier` if `new` is None."""
        if new is not None:
            self._opened().write(new)
        elif self.file is None and (not self.known or self.known.stop == part.start):
            self.known = range((self.known or part).start, part.stop)
        else:
            self._copy(self._opened(), part)

    def close(self) -> None:
        if self.size:
            self._end()
        (self.folder / LIST).write_text(json.dumps(self.listed) + "\n")

    def _opened(self) -> IO[bytes]:
        if self.file is None:
            self.file = (self.folder / ARRIVING).open("wb")
            self._copy(self.file, self.known)
        return self.file

    def _copy(self, file: IO[bytes], part: range) -> None:
        for start in part[::RUN]:
            assert self.earlier is not None
            count = min(RUN, part.stop - start)
            try:
                read = self.earlier.read(start, count)
            # A missing file is treated like one that is too short.
            except OSError:
                read = np.empty(0, np.uint8)
            if len(read) < count:
                raise LostShard(f"{self.earlier.folder} was changed while it was gone on from: run this again")
            file.write(read.data)

    def _end(self) -> None:
        shard = self.folder / self.name.hexdigest()
        if self.file is not None or not self._linked(shard):
            with self._opened():
                pass
            (self.folder / ARRIVING).replace(shard)
        self.listed.append((shard.name, self.size))
        self._begin()

    def _linked(self, shard: Path) -> bool:
        """Hard-link the shard from `earlier`, and return whether it exists there and could be linked."""
        there = self.earlier.file_of(self.known) if self.earlier else None
        try:
            if there is None or there.name != shard.name or there.stat().st_size != self.size:
                return False
            os.link(there, shard)
        # An earlier shard of this folder has the same images.
        except FileExistsError:
            return True
        # Not every file system supports hard links.
        except OSError:
            return False
        return True


def contiguous_ranges(starts: np.ndarray, sizes: np.ndarray, kinds: np.ndarray | None = None) -> Iterator[slice]:
    """Group chunks that are of one kind and end to end into ranges of about `RUN` bytes.

    Args:
        starts: (N,) offsets of the chunks.
        sizes: (N,) sizes of the chunks.
        kinds: (N,) kinds of the chunks; by default, all are of one kind.

    Returns:
        Slices of the N chunks, in order.
    """
    blocks = np.cumsum(sizes) // RUN
    apart = (starts[1:] != starts[:-1] + sizes[:-1]) | (blocks[1:] != blocks[:-1])
    if kinds is not None:
        apart |= kinds[1:] != kinds[:-1]
    ends = [0, *(np.flatnonzero(apart) + 1).tolist(), len(starts)]
    return (slice(start, end) for start, end in itertools.pairwise(ends) if start < end)
