"""Shards: the pixels of all images, end to end, in files that stay as they are where their images do."""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import xxhash

PIXELS, LIST = "pixels", "shards.json"  # the folder, and in it the name and the bytes of each shard, in their order
ARRIVING = "arriving"
# bytes of a shard, on average: of few images, most shards are untouched as others come; of many, there are few files
MEAN, MOST = 2**24, 2**26
RUN = 2**23  # bytes that are in memory at a time
NEW = -1  # in place of an offset


class LostShard(Exception):
    """What was there a moment ago is not there any more."""


@dataclasses.dataclass(frozen=True)
class Shards:
    """One long row of bytes, which lies in several files. Nothing stays open, and nothing is in memory."""

    folder: Path
    names: list[str]
    ends: np.ndarray  # (S,) int64: where each of them ends in the row

    @classmethod
    def load(cls, folder: Path, listed: Path | None = None) -> "Shards":
        """Those in a folder, by its own list or another. Raises OSError and ValueError where there is none."""
        names, sizes = zip(*json.loads((listed or folder / LIST).read_text()), strict=True)
        return cls(folder, list(names), np.cumsum(sizes, dtype=np.int64))

    def read(self, start: int, count: int) -> np.ndarray:
        """(count,) uint8, from `start` on; fewer where the disk has lost some. Raises OSError where a file is gone.

        Not as a memory map, of which all that was read would count as memory in use.
        """
        stop, parts = start + count, []
        for shard in range(self._at(start), len(self.names)):
            begin, end = self._extent(shard)
            here = max(min(stop, end) - start, 0)  # to NumPy -1 would mean all that there is
            parts.append(np.fromfile(self.folder / self.names[shard], np.uint8, here, offset=start - begin))
            start += here
            if start >= stop:
                break
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def file_of(self, part: range) -> Path | None:
        """The shard that is this part of the row, neither more nor less."""
        shard = self._at(part.start)
        return self.folder / self.names[shard] if self._extent(shard) == (part.start, part.stop) else None

    def _at(self, place: int) -> int:
        return int(self.ends.searchsorted(place, "right").clip(max=len(self.names) - 1))

    def _extent(self, shard: int) -> tuple[int, int]:
        return int(self.ends[shard - 1]) if shard else 0, int(self.ends[shard])


class ShardWriter:
    """Writes shards into a new folder.

    Which images come into one follows from the images themselves, and its name from those that are in it. So images
    that are added, changed or taken away leave most shards as they were: they are linked from `earlier`.
    """

    def __init__(self, folder: Path, earlier: Shards | None) -> None:
        folder.mkdir()
        self.folder, self.earlier = folder, earlier
        self.listed: list[tuple[str, int]] = []
        self._begin()

    def _begin(self) -> None:
        self.name, self.size = xxhash.xxh3_128(), 0
        self.known = range(0)  # of `earlier`: with what this shard begins, as long as that is not written
        self.file: IO[bytes] | None = None

    def write(self, pictures: np.ndarray, sizes: np.ndarray, offsets: np.ndarray, pixels: bytes) -> None:
        """Add N images: their hashes, their bytes, where they lie in `earlier`, and the `pixels` that are `NEW`."""
        new = offsets == NEW
        starts = np.where(new, np.cumsum(sizes * new) - sizes, offsets)
        last = pictures / 2.0**64 < sizes / MEAN  # of its shard: a hash is a number drawn for each image
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
        """Bytes that are new, or this part of `earlier`."""
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
            except OSError:  # it is gone
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
        """Whether it was there, and could be linked."""
        there = self.earlier.file_of(self.known) if self.earlier else None
        try:
            if there is None or there.name != shard.name or there.stat().st_size != self.size:
                return False
            os.link(there, shard)
        except FileExistsError:  # the same images once more
            return True
        except OSError:  # not every file system can
            return False
        return True


def contiguous_ranges(starts: np.ndarray, sizes: np.ndarray, kinds: np.ndarray | None = None) -> Iterator[slice]:
    """Of pieces, those of one kind that lie end to end, about `RUN` bytes together."""
    blocks = np.cumsum(sizes) // RUN
    apart = (starts[1:] != starts[:-1] + sizes[:-1]) | (blocks[1:] != blocks[:-1])
    if kinds is not None:
        apart |= kinds[1:] != kinds[:-1]
    ends = [0, *(np.flatnonzero(apart) + 1).tolist(), len(starts)]
    return (slice(start, end) for start, end in itertools.pairwise(ends) if start < end)
