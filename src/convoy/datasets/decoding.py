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
from pathlib import Path
from typing import Any

import numpy as np
from joblib import cpu_count
from pebble import ProcessExpired, ProcessPool
from PIL import Image
from threadpoolctl import threadpool_limits

from convoy import images, likeness
from convoy.datasets.source import Content, Member, Source
from convoy.images import BadImage, Decoded, decode, plain
from convoy.likeness import perceptual_hash, thumbnails

MAX_BYTES = 2**28  # of a file; no photograph is larger
BATCH_BYTES = 2**25  # of pixels that a batch may come to
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
RECORDS, PIXELS = "records.npy", "pixels.bin"


def fingerprint(longest_side: int) -> str:
    """Of all that decides what a file is decoded to."""
    code = [Path(module.__file__ or "").read_bytes() for module in (images, likeness, sys.modules[__name__])]
    libraries = [f"{package} {version(package)}" for package in ("numpy", "pillow", "simplejpeg")]
    told = b"\n".join([*code, *(library.encode() for library in libraries), str(longest_side).encode()])
    return hashlib.sha256(told).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Batch:
    """What became of some images, in their order."""

    faults: list[str]  # why an image can't be used; "" where it can
    records: np.ndarray  # of those that can; their offsets are not set
    pixels: bytes  # of those that can, end to end


def decoded(source: Source, longest_side: int, earlier: Path) -> Iterator[tuple[list[Member], Batch]]:
    """The members of a source and what became of them, a batch at a time, in their order.

    Images whose bytes are known from `earlier`, which `remember` wrote, are not decoded again.
    """
    size = int(np.clip(BATCH_BYTES // (3 * longest_side**2), 16, 256))
    workers = cpu_count()
    judging = functools.partial(judge, longest_side=longest_side, earlier=earlier)
    context = multiprocessing.get_context("forkserver")  # its processes share no lock, file or thread with this one
    context.set_forkserver_preload([__name__])
    pool = ProcessPool(workers, context=context, initializer=_settle)
    ahead: collections.deque[tuple[list[Member], Future]] = collections.deque()
    try:
        while members := list(itertools.islice(source.members, size)):
            contents = [member.content for member in members]
            ahead.append((members, pool.schedule(judging, [contents], timeout=2 * PATIENCE)))
            if len(ahead) > workers + 1:
                yield _outcome(pool, judging, *ahead.popleft())
        while ahead:
            yield _outcome(pool, judging, *ahead.popleft())
    finally:
        pool.stop()
        pool.join()


def _settle() -> None:
    threadpool_limits(1)  # threads of these processes would only wait for each other
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes its complaints there; Pillow's errors tell enough


def _outcome(pool: ProcessPool, judging: Callable, members: list[Member], whole: Future) -> tuple[list[Member], Batch]:
    try:
        return members, whole.result()
    except (ProcessExpired, TimeoutError):  # each by itself shows which of them it was
        alone = [_alone(pool, judging, member.content) for member in members]
        faults = [fault for batch in alone for fault in batch.faults]
        records = np.concatenate([batch.records for batch in alone])
        return members, Batch(faults, records, b"".join(batch.pixels for batch in alone))


def _alone(pool: ProcessPool, judging: Callable, content: Content) -> Batch:
    try:
        return pool.schedule(judging, [[content]], timeout=PATIENCE).result()
    except ProcessExpired:
        fault = "crashes its decoder"
    except TimeoutError:
        fault = f"takes more than {PATIENCE} seconds to decode"
    return Batch([fault], np.empty(0, RECORD), b"")


def judge(contents: list[Content], longest_side: int, earlier: Path) -> Batch:
    """Read, hash and decode images."""
    known = Earlier.load(earlier)
    faults: list[str] = []
    rows: list[tuple] = []
    pixels: list[bytes] = []
    new: list[tuple[int, np.ndarray]] = []
    for content in contents:
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
        with open(content, "rb", buffering=0) as file:  # noqa: PTH123 - a Path costs as much as the reading
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise BadImage(f"is larger than {MAX_BYTES >> 20} MB")
            return file.readall()
    except OSError as error:
        raise BadImage(f"can't be read: {error.strerror}") from None


def _decode(data: bytes | np.ndarray, longest_side: int) -> Decoded:
    if isinstance(data, bytes):
        return decode(data, longest_side)
    height, width, channels = data.shape
    image = Image.fromarray(data[:, :, 0] if channels == 1 else data)
    return Decoded(plain(image, longest_side), height, width)


def _digest(algorithm: Any, data: bytes | np.ndarray) -> bytes:
    if isinstance(data, np.ndarray):
        algorithm.update("x".join(map(str, data.shape)).encode())
        data = np.ascontiguousarray(data)
    algorithm.update(data)
    return algorithm.digest()


class Earlier:
    """What an earlier run decoded, found by the sha256 of a file."""

    def __init__(self, records: np.ndarray, pixels: np.ndarray) -> None:
        self.records = records
        self.pixels = pixels
        self.starts = _starts(records)
        self.order = np.argsort(self.starts, kind="stable")
        self.starts = self.starts[self.order]

    @classmethod
    @functools.cache
    def load(cls, folder: Path) -> "Earlier":
        """From a folder that `remember` wrote; nothing is known where it is missing."""
        if not (folder / RECORDS).exists():
            return cls(np.empty(0, RECORD), np.empty(0, np.uint8))
        return cls(np.load(folder / RECORDS, mmap_mode="r"), np.memmap(folder / PIXELS, np.uint8, mode="r"))

    def find(self, sha256: bytes) -> tuple[tuple, np.ndarray | None]:
        """The record and the pixels, (H, W, 1 or 3) uint8, of the file with this hash; (), None where it is unknown."""
        if not len(self.starts):
            return (), None
        at = np.searchsorted(self.starts, np.frombuffer(sha256, np.uint64, 1)[0])
        record: tuple = self.records[self.order[at]].item() if at < len(self.starts) else ()
        if not record or record[0] != sha256:
            return (), None
        _, picture, *_, height, width, channels, offset = record
        image = self.pixels[offset : offset + height * width * channels].reshape(height, width, channels)
        return (record, image) if _picture(image) == picture else ((), None)  # a disk may forget


def _picture(pixels: np.ndarray) -> int:
    return int.from_bytes(_digest(hashlib.blake2b(digest_size=8), pixels), "little")


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
