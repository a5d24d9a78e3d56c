"""Decoding: members of a source to pixels, side by side in processes that a broken image may crash or hold up."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from importlib.metadata import version
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
from joblib import cpu_count
from pebble import ProcessExpired, ProcessPool
from threadpoolctl import threadpool_limits

from convoy import images, likeness
from convoy.datasets.files import MAX_BYTES, TOO_LARGE
from convoy.datasets.source import Content, Member, Source
from convoy.images import BadImage, Decoded, as_image, decode, plain
from convoy.likeness import perceptual_hash, thumbnails

FIRST_BATCH = 16  # images; of the later ones there are as many as come to
BATCH_BYTES = 2**23  # of pixels and of files
PATIENCE = 60  # seconds for an image, and twice that for a batch

# what is known of an image
RECORD = np.dtype(
    [
        ("sha256", "V32"),  # of the file, or of the shape and pixels where there is none
        ("picture", np.uint64),  # a hash of the shape and the pixels
        ("phash", np.uint64),  # perceptual
        ("source_height", np.int32),  # pixels, in the file
        ("source_width", np.int32),
        ("height", np.int32),  # as kept
        ("width", np.int32),
        ("channels", np.int32),
        ("offset", np.int64),  # of its first pixel
    ]
)
RECORDS, PIXELS = "records.npy", "pixels.bin"  # what `remember` leaves


def fingerprint(longest_side: int) -> str:
    """Of all that decides what a file is decoded to."""
    code = [Path(module.__file__ or "").read_bytes() for module in (images, likeness, sys.modules[__name__])]
    libraries = [f"{package} {version(package)}" for package in ("numpy", "pillow", "simplejpeg")]
    told = b"\n".join([*code, *(library.encode() for library in libraries), str(longest_side).encode()])
    return hashlib.sha256(told).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Batch:
    """What became of images, in their order."""

    faults: list[str]  # why an image can't be used; "" where it can
    records: np.ndarray  # of those that can; their offsets are not set
    pixels: bytes  # of those that can, end to end


def decoded(source: Source, longest_side: int, earlier: Path) -> Iterator[tuple[list[Member], Batch]]:
    """The members of a source and what became of them, a batch at a time, in their order.

    Images whose bytes are known from `earlier`, which `remember` wrote, are not decoded again.
    """
    workers = cpu_count()
    judging = functools.partial(judge, longest_side=longest_side, earlier=earlier)
    pool = ProcessPool(workers, context=get_ready(), initializer=_settle)
    ahead: collections.deque[tuple[list[Member], Future]] = collections.deque()
    size = FIRST_BATCH
    try:
        while members := list(itertools.islice(source.members, size)):
            contents = [member.content for member in members]
            ahead.append((members, pool.schedule(judging, [contents], timeout=2 * PATIENCE)))
            if len(ahead) > 2 * workers + 4:
                for done, batch in _outcomes(pool, judging, *ahead.popleft()):
                    yield done, batch
                    size = _next_size(done, batch)
        while ahead:
            yield from _outcomes(pool, judging, *ahead.popleft())
    finally:
        pool.stop()
        pool.join()


def get_ready() -> BaseContext:
    """How the processes are made that decode: as copies of one that is started here and imports what they need.

    They share no lock, file or thread with this process. To call it early saves the time of the imports.
    """
    context = multiprocessing.get_context("forkserver")
    # each of them imports the main module anew, and what that brings in of ours with all that stands behind it
    context.set_forkserver_preload([name for name in sys.modules if name.startswith("convoy.")])
    forkserver.ensure_running()
    return context


def _next_size(members: list[Member], batch: Batch) -> int:
    """So many images that they come to `BATCH_BYTES`: a task costs time, and what is under way costs memory."""
    read = sum(len(member.content) for member in members if isinstance(member.content, bytes))
    return int(np.clip(BATCH_BYTES * len(members) // (len(batch.pixels) + read + 1), 4, 256))


def _settle() -> None:
    threadpool_limits(1)  # threads of these processes would only wait for each other
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes its complaints there; Pillow's errors tell enough


def _outcomes(
    pool: ProcessPool, judging: Callable, members: list[Member], whole: Future
) -> Iterator[tuple[list[Member], Batch]]:
    while members:
        try:
            batch = whole.result()
            done, members = members[: len(batch.faults)], members[len(batch.faults) :]
            yield done, batch
            if members:
                rest = [member.content for member in members]
                whole = pool.schedule(judging, [rest], timeout=2 * PATIENCE)
        except (ProcessExpired, TimeoutError):  # each by itself shows which of them it was
            for member in members:
                yield [member], _alone(pool, judging, member.content)
            return


def _alone(pool: ProcessPool, judging: Callable, content: Content) -> Batch:
    try:
        return pool.schedule(judging, [[content]], timeout=PATIENCE).result()
    except ProcessExpired:
        fault = "crashes its decoder"
    except TimeoutError:
        fault = f"takes more than {PATIENCE} seconds to decode"
    return Batch([fault], np.empty(0, RECORD), b"")


def judge(contents: list[Content], longest_side: int, earlier: Path) -> Batch:
    """Read, hash and decode images: all of them, or the first that come to four times `BATCH_BYTES`."""
    known = Earlier.load(earlier)
    faults: list[str] = []
    rows: list[tuple] = []
    pixels: list[bytes] = []
    new: list[tuple[int, np.ndarray]] = []
    count = 0  # bytes of pixels
    for content in contents:
        if count > 4 * BATCH_BYTES:
            break
        try:
            data = _read(content)
            sha256 = _digest(hashlib.sha256(), data)
            row, image = known.find(sha256)
            if image is None:
                found = _decode(data, longest_side)
                image = found.pixels
                row = (sha256, _picture(image), 0, found.height, found.width, *image.shape, 0)
                new.append((len(rows), image))
            rows.append(row)
            pixels.append(image.tobytes())
            count += image.size
            faults.append("")
        except BadImage as fault:
            faults.append(str(fault))
    records = np.array(rows, RECORD)
    if new:
        places, fresh = zip(*new, strict=True)
        records["phash"][list(places)] = perceptual_hash(thumbnails(fresh))
    return Batch(faults, records, b"".join(pixels))


def _read(content: Content) -> bytes | np.ndarray:
    if isinstance(content, BadImage):
        raise content
    if not isinstance(content, str):
        return content
    try:
        file = os.open(content, os.O_RDONLY)  # which costs half of what `open` does, and that counts for small files
        try:
            size = os.fstat(file).st_size
            if size > MAX_BYTES:
                raise BadImage(TOO_LARGE)
            return os.read(file, size)
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


def _digest(algorithm: Any, data: bytes | np.ndarray) -> bytes:
    if isinstance(data, np.ndarray):
        algorithm.update("x".join(map(str, data.shape)).encode())
        data = np.ascontiguousarray(data)
    algorithm.update(data)
    return algorithm.digest()


class Earlier:
    """What an earlier run decoded, found by the sha256 of a file."""

    def __init__(self, records: np.ndarray, pixels: int) -> None:
        self.records = records
        self.pixels = pixels  # descriptor of an open file: of a memory map all that was read would count as memory
        starts = _starts(records)
        self.order = np.argsort(starts, kind="stable")
        self.starts = starts[self.order]

    @classmethod
    @functools.cache
    def load(cls, folder: Path) -> "Earlier":
        """From a folder that `remember` wrote; nothing is known where it is missing."""
        try:
            return cls(np.load(folder / RECORDS, mmap_mode="r"), os.open(folder / PIXELS, os.O_RDONLY))
        except (OSError, ValueError):
            return cls(np.empty(0, RECORD), -1)

    def find(self, sha256: bytes) -> tuple[tuple, np.ndarray | None]:
        """The record and the pixels, (H, W, 1 or 3) uint8, of the file with this hash; (), None where it is unknown."""
        if not len(self.starts):
            return (), None
        at = np.searchsorted(self.starts, np.frombuffer(sha256, np.uint64, 1)[0])
        record: tuple = self.records[self.order[at]].item() if at < len(self.starts) else ()
        if not record or record[0] != sha256:
            return (), None
        _, picture, *_, height, width, channels, offset = record
        size = height * width * channels
        image = np.frombuffer(os.pread(self.pixels, size, offset), np.uint8)
        if len(image) != size or _picture(image := image.reshape(height, width, channels)) != picture:
            return (), None  # a disk may forget
        return record, image


def _picture(pixels: np.ndarray) -> int:
    return int.from_bytes(_digest(hashlib.sha256(), pixels)[:8], "little")


def _starts(records: np.ndarray) -> np.ndarray:
    """The first eight bytes of each sha256, as a number to sort by."""
    return np.ascontiguousarray(records["sha256"]).view(np.uint64).reshape(-1, 4)[:, 0].copy()


def remember(records: np.ndarray, pixels: Path, folder: Path) -> None:
    """Leave in `folder` what was decoded, for a later run, and nothing beside it.

    `pixels` is linked, which costs no disk; where that can't be done, nothing is left.
    """
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    with contextlib.suppress(OSError):
        os.link(pixels, folder / PIXELS)
        np.save(folder / "arriving.npy", records)
        (folder / "arriving.npy").replace(folder / RECORDS)
