"""Decode pool: decodes the samples of a source in parallel processes, which a broken image may crash or block."""

import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing import forkserver
from multiprocessing.context import BaseContext

import numpy as np
from joblib import cpu_count
from pebble import ProcessExpired, ProcessPool

from convoy.data.cache import CacheDir
from convoy.data.decode_cache import RECORD
from convoy.data.decode_worker import BATCH_BYTES, Batch, decode_batch, init_worker
from convoy.data.image_io import MAX_PIXELS
from convoy.data.sources.base import Content, Sample, Source

# Number of images in the first and in the largest batch; other batches have about `BATCH_BYTES` of pixels.
FIRST_BATCH_IMAGES, MAX_BATCH_IMAGES = 16, 512
# Environment variable with the number of threads, which OpenBLAS and MKL read when they are loaded.
THREADS_VARIABLE = "OMP_NUM_THREADS"
# Time limit for one image; a batch gets twice as much.
IMAGE_TIMEOUT_S = 60


def decode_all(
    source: Source, longest_side: int, cache_dir: CacheDir, max_pixels: int = MAX_PIXELS, first_page: bool = False
) -> Iterator[tuple[list[Sample], Batch]]:
    """Decode all samples of a source in parallel processes.

    Args:
        source: The source of the samples.
        longest_side: Larger images are reduced to this many pixels on their longest side.
        cache_dir: Cache that `write_decode_cache` wrote. Images whose bytes it contains are not decoded again.
        max_pixels: Images with more pixels are refused.
        first_page: Whether the first page is taken of a TIFF that has several, which is refused otherwise.

    Yields:
        Batches of samples and their results, in the order of the source.
    """
    workers = cpu_count()
    decode = functools.partial(
        decode_batch, longest_side=longest_side, cache_dir=cache_dir, max_pixels=max_pixels, first_page=first_page
    )
    pending: collections.deque[tuple[list[Sample], Future]] = collections.deque()
    size = FIRST_BATCH_IMAGES
    pool = ProcessPool(workers, context=start_fork_server(), initializer=init_worker)
    try:
        while samples := _take_batch(source.samples, size):
            contents = [sample.content for sample in samples]
            pending.append((samples, pool.schedule(decode, [contents], timeout=2 * IMAGE_TIMEOUT_S)))
            if len(pending) > 2 * workers + 4:
                for decoded, batch in _collect(pool, decode, *pending.popleft()):
                    yield decoded, batch
                    size = _next_size(decoded, batch)
        while pending:
            yield from _collect(pool, decode, *pending.popleft())
    finally:
        pool.stop()
        pool.join()


def start_fork_server() -> BaseContext:
    """Start the server process from which the decode workers are forked.

    The server shares no lock, file or thread with this process. Calling this function early hides the time of the
    imports.

    Returns:
        The multiprocessing context of the workers.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # More NumPy threads per worker would only wait for each other.
    with _set_threads("1"):
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _set_threads(number: str) -> Iterator[None]:
    """Set the number of threads of processes that start while the context is active."""
    previous = os.environ.get(THREADS_VARIABLE)
    os.environ[THREADS_VARIABLE] = number
    try:
        yield
    finally:
        os.environ.pop(THREADS_VARIABLE)
        if previous is not None:
            os.environ[THREADS_VARIABLE] = previous


def _take_batch(samples: Iterator[Sample], max_count: int) -> list[Sample]:
    """Take the next samples, at most `max_count`, and stop once those in memory have `BATCH_BYTES`.

    Without this limit, large images that follow small ones would make a batch too large.
    """
    batch, size = [], 0
    for sample in itertools.islice(samples, max_count):
        batch.append(sample)
        match sample.content:
            case bytes() as file:
                size += len(file)
            case np.ndarray() as pixels:
                size += pixels.nbytes
        if size >= BATCH_BYTES:
            break
    return batch


def _next_size(samples: list[Sample], batch: Batch) -> int:
    """Return the number of images whose pixels have about `BATCH_BYTES`.

    Small batches cost time because each is a task of its own, and large ones cost memory.
    """
    return int(np.clip(BATCH_BYTES * len(samples) // (batch.sizes.sum() + 1), 4, MAX_BATCH_IMAGES))


def _collect(
    pool: ProcessPool, decode: Callable, samples: list[Sample], future: Future
) -> Iterator[tuple[list[Sample], Batch]]:
    """Yield the results of a batch, which the worker may have decoded only in part."""
    while samples:
        try:
            batch = future.result()
            decoded, samples = samples[: len(batch.faults)], samples[len(batch.faults) :]
            yield decoded, batch
            if samples:
                contents = [sample.content for sample in samples]
                future = pool.schedule(decode, [contents], timeout=2 * IMAGE_TIMEOUT_S)
        # Decoding each image by itself shows which of them is broken.
        except (ProcessExpired, TimeoutError):
            for sample in samples:
                yield [sample], _decode_single(pool, decode, sample.content)
            return


def _decode_single(pool: ProcessPool, decode: Callable, content: Content) -> Batch:
    try:
        return pool.schedule(decode, [[content]], timeout=IMAGE_TIMEOUT_S).result()
    except ProcessExpired:
        fault = "crashes its decoder"
    except TimeoutError:
        fault = f"takes more than {IMAGE_TIMEOUT_S} seconds to decode"
    return Batch([fault], np.empty(0, RECORD), b"")
