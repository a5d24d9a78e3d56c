"""Decode pool: decodes the samples of a source in parallel processes, which a broken image may crash or block."""

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

# Number of images in the first and in the largest batch; other batches have about `BATCH_BYTES` of pixels.
FIRST_BATCH, LARGEST_BATCH = 16, 512
# Environment variable with the number of threads, which OpenBLAS and MKL read when they are loaded.
THREADS = "OMP_NUM_THREADS"
# Time limit for one image in seconds; a batch gets twice as much.
PATIENCE = 60


def decode_all(source: Source, longest_side: int, earlier: CacheDir) -> Iterator[tuple[list[Sample], Batch]]:
    """Decode all samples of a source in parallel processes.

    Args:
        source: The source of the samples.
        longest_side: Larger images are reduced to this many pixels on their longest side.
        earlier: Cache that `decode_worker.keep` wrote. Images whose bytes it contains are not decoded again.

    Yields:
        Batches of samples and their results, in the order of the source.
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
    """Start the server process from which the decode workers are forked.

    The server imports what the workers need, and shares no lock, file or thread with this process. Calling this
    function early hides the time of the imports.

    Returns:
        The multiprocessing context of the workers.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([decode_batch.__module__, ProcessPool.__module__])
    # More NumPy threads per worker would only wait for each other.
    with _threads("1"):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _threads(number: str) -> Iterator[None]:
    """Set the number of threads of processes that start while the context is active."""
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
    """Prevent processes that start in this context from importing the main module, and with it pandas and others.

    Importing what decoding needs took 0.3 s, and everything that ingesting needs 1.0 s.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _taken(members: Iterator[Sample], most: int) -> list[Sample]:
    """Take the next samples, at most `most`, and stop once those in memory have `BATCH_BYTES`.

    Without this limit, large images that follow small ones would make a batch too large.
    """
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
    """Return the number of images whose pixels have about `BATCH_BYTES`.

    Small batches cost time because each is a task of its own, and large ones cost memory.
    """
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
        # Decoding each image by itself shows which of them is broken.
        except (ProcessExpired, TimeoutError):
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
