"""Decoding: members of a source to pixels, side by side in processes that a broken image may crash or hold up."""

import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

import numpy as np
from joblib import cpu_count
from pebble import ProcessExpired, ProcessPool

from convoy.data.cache import CacheDir
from convoy.data.decode_worker import BATCH_BYTES, RECORD, Batch, decode_batch, init_worker
from convoy.data.sources.base import Content, Sample, Source

FIRST_BATCH, LARGEST_BATCH = 16, 512  # images; between them, as many as come to `BATCH_BYTES`
THREADS = "OMP_NUM_THREADS"  # what tells OpenBLAS and MKL, when they are loaded
PATIENCE = 60  # seconds for an image, and twice that for a batch


def decode_all(source: Source, longest_side: int, earlier: CacheDir) -> Iterator[tuple[list[Sample], Batch]]:
    """The members of a source and what became of them, a batch at a time, in their order.

    Images whose bytes are known from `earlier`, which `keep` wrote, are not decoded again.
    """
    workers = cpu_count()
    judging = functools.partial(decode_batch, longest_side=longest_side, earlier=earlier)
    ahead: collections.deque[tuple[list[Sample], Future]] = collections.deque()
    size = FIRST_BATCH
    with _pool(workers) as pool:
        while members := _taken(source.members, size):
            contents = [member.content for member in members]
            ahead.append((members, pool.schedule(judging, [contents], timeout=2 * PATIENCE)))
            if len(ahead) > 2 * workers + 4:
                for done, batch in _outcomes(pool, judging, *ahead.popleft()):
                    yield done, batch
                    size = _next_size(done, batch)
        while ahead:
            yield from _outcomes(pool, judging, *ahead.popleft())


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPool]:
    pool = ProcessPool(workers, context=get_ready(), initializer=init_worker)
    try:
        with _without_main():
            yield pool
    finally:
        pool.stop()
        pool.join()


def get_ready() -> BaseContext:
    """How the processes are made that decode: as copies of one that is started here and imports what they need.

    They share no lock, file or thread with this process. To call it early saves the time of the imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([decode_batch.__module__, ProcessPool.__module__])
    with _threads("1"):  # those of NumPy would only wait for each other
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _threads(number: str) -> Iterator[None]:
    """In processes that start meanwhile."""
    before = os.environ.get(THREADS)
    os.environ[THREADS] = number
    try:
        yield
    finally:
        os.environ.pop(THREADS)
        if before is not None:
            os.environ[THREADS] = before


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Processes that start meanwhile do not import the main module anew, with pandas and all else that it brings in.

    To import what judging needs took 0.3 s, and all that the intake needs 1.0 s.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _taken(members: Iterator[Sample], most: int) -> list[Sample]:
    """The next of them, but no more in memory than one above `BATCH_BYTES`: small images may come before large ones."""
    taken, size = [], 0
    for member in itertools.islice(members, most):
        taken.append(member)
        match member.content:
            case bytes() as file:
                size += len(file)
            case np.ndarray() as pixels:
                size += pixels.nbytes
        if size >= BATCH_BYTES:
            break
    return taken


def _next_size(members: list[Sample], batch: Batch) -> int:
    """So many images that their pixels come to `BATCH_BYTES`: a task costs time, and what is under way memory."""
    return int(np.clip(BATCH_BYTES * len(members) // (batch.sizes.sum() + 1), 4, LARGEST_BATCH))


def _outcomes(
    pool: ProcessPool, judging: Callable, members: list[Sample], whole: Future
) -> Iterator[tuple[list[Sample], Batch]]:
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
