"""Decode pool: processes that decode images for a server, so that no image can crash or block the server itself."""

import asyncio
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convoy.data.image_io import InvalidImageError
from convoy.serving import decode_worker
from convoy.serving.onnx_model import InputSpec

# Limits of a batch: more of both would let one request wait for another one's batch.
BATCH_IMAGES, BATCH_BYTES = 16, 4 << 20
# Time limit for one image; a batch gets twice as much.
IMAGE_TIMEOUT_S = 20
# Time limit for a process to start on a busy machine.
START_TIMEOUT_S = 120
# An image crashes its decoder if so many processes have ended over it: something else may have killed the first.
MAX_TRIES = 3
# No process starts if so many in a row have ended before they were ready.
MAX_STARTS = 10
# Numeric libraries in a worker have one thread, as there are as many workers as processors.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

# The content of an image file, or its path.
Image = bytes | str
Decoded = np.ndarray | InvalidImageError


def count_processors() -> int:
    """Return how many processors this process may use, also in a container; joblib takes 0.3 s to import."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count, math.ceil(int(quota) / int(period))))
    # There is no such file, or its quota is "max".
    except (OSError, ValueError):
        return count


class WorkerCrashed(Exception):
    """The process has ended or answers something else than it should."""


class Worker(asyncio.Protocol):
    """A process, and the connection to it.

    A protocol takes a third of the processor time of the event loop's functions for sockets.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            # Large messages then take fewer turns.
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            self.process = subprocess.Popen(
                [sys.executable, "-m", decode_worker.__name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # libtiff writes its warnings there; Pillow's errors are sufficient.
                stderr=subprocess.DEVNULL,
                env=os.environ | ENVIRONMENT,
            )
        self._socket = ours
        self._transport: asyncio.WriteTransport | None = None
        self._received = bytearray()
        self._answer: asyncio.Future[bytearray] | None = None

    async def start(self) -> None:
        """Wait until the process is ready, if it is new.

        Raises:
            TimeoutError: If it takes longer than `START_TIMEOUT_S`.
            WorkerCrashed: If the process ends.
        """
        if self._transport is None:
            # It sends an empty message when it is ready.
            ready = self._expect_answer()
            await asyncio.get_running_loop().create_connection(lambda: self, sock=self._socket)
            await self._wait(ready, START_TIMEOUT_S)

    async def ask(self, spec: InputSpec, images: Sequence[Image], timeout: float) -> list[Decoded]:
        """Let the process decode a batch, once it is ready.

        Raises:
            TimeoutError: If it takes longer than `timeout` seconds.
            WorkerCrashed: If the process ends.
        """
        assert self._transport
        answer = self._expect_answer()
        self._transport.write(decode_worker.pack_request(spec, images))
        return _unpack(await self._wait(answer, timeout), spec, len(images))

    def _expect_answer(self) -> asyncio.Future[bytearray]:
        self._received.clear()
        self._answer = asyncio.get_running_loop().create_future()
        return self._answer

    async def _wait(self, answer: asyncio.Future[bytearray], timeout: float) -> bytearray:
        # `asyncio.timeout` takes more time than the rest of this function.
        timer = asyncio.get_running_loop().call_later(timeout, self._fail, TimeoutError())
        try:
            return await answer
        finally:
            timer.cancel()

    @property
    def is_lost(self) -> bool:
        """Return whether the connection to the process is lost."""
        return self._transport is not None and self._transport.is_closing()

    def stop(self) -> None:
        """End the process at once."""
        if self._transport:
            self._transport.abort()
        else:
            self._socket.close()
        self.process.kill()
        self.process.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Add to an answer, and hand it over once it is complete."""
        self._received += data
        if len(self._received) >= decode_worker.LENGTHS.size:
            head, body = decode_worker.LENGTHS.unpack_from(self._received)
            if len(self._received) >= decode_worker.LENGTHS.size + head + body and self._answer:
                if not self._answer.done():
                    self._answer.set_result(self._received)
                self._received = bytearray()

    def connection_lost(self, _error: Exception | None) -> None:
        """Fail the batch that the process was decoding."""
        self._fail(WorkerCrashed())

    def _fail(self, error: Exception) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(error)


class DecodePool:
    """Decodes images in several processes.

    Args:
        workers: The number of processes.
        timeout: The time limit for one image, in seconds.
    """

    def __init__(self, workers: int, timeout: float = IMAGE_TIMEOUT_S) -> None:
        self.size = workers
        self.timeout = timeout
        self.crashes = 0
        self._workers: set[Worker] = set()
        self._idle: asyncio.Queue[Worker] = asyncio.Queue()

    async def __aenter__(self) -> "DecodePool":
        for _ in range(self.size):
            self._add_worker()
        # The first answers should not wait for the processes to start.
        await asyncio.gather(*(self._decode_batch(InputSpec(8, 4, 3), [b""]) for _ in range(self.size)))
        return self

    async def __aexit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def _add_worker(self) -> None:
        worker = Worker()
        self._workers.add(worker)
        self._idle.put_nowait(worker)

    async def decode(self, spec: InputSpec, images: Sequence[Image]) -> list[Decoded]:
        """Decode images, in as many processes as there are.

        Args:
            spec: What the network expects.
            images: Contents of files, or paths; not both.

        Returns:
            For each image its pixels (H, W, C) uint8, or an error with the reason why it can't be used.
        """
        batches = _split(images)
        if len(batches) == 1:
            return await self._decode_batch(spec, batches[0])
        # A request has no more batches under way than there are processes, so that others get their turn.
        limit = asyncio.Semaphore(self.size)

        async def decode_next(batch: Sequence[Image]) -> list[Decoded]:
            async with limit:
                return await self._decode_batch(spec, batch)

        return [image for batch in await asyncio.gather(*map(decode_next, batches)) for image in batch]

    async def _decode_batch(self, spec: InputSpec, images: Sequence[Image], tries: int = 1) -> list[Decoded]:
        worker = await self._get_ready_worker()
        if worker is None:
            return [InvalidImageError("can't be decoded, as no decoder starts")] * len(images)
        is_late = False
        try:
            decoded = await worker.ask(spec, images, self.timeout * (2 if len(images) > 1 else 1))
        except (WorkerCrashed, TimeoutError) as error:
            self._replace(worker)
            self.crashes += 1
            is_late = isinstance(error, TimeoutError)
        # The request was cancelled in the middle of the batch.
        except BaseException:
            self._replace(worker)
            raise
        else:
            self._idle.put_nowait(worker)
            return decoded
        if len(images) == 1 and is_late:
            return [InvalidImageError(f"takes more than {self.timeout:g} seconds to decode")]
        if len(images) == 1 and tries == MAX_TRIES:
            return [InvalidImageError("crashes its decoder")]
        # Decoding each image by itself shows which of them is broken.
        return [(await self._decode_batch(spec, [image], tries + 1))[0] for image in images]

    async def _get_ready_worker(self) -> Worker | None:
        """Wait for a process that is ready, and replace those that something has killed while they had no image."""
        for _ in range(MAX_STARTS):
            worker = await self._idle.get()
            while worker.is_lost:
                self._replace(worker)
                worker = await self._idle.get()
            try:
                await worker.start()
                return worker
            except (WorkerCrashed, TimeoutError):
                self._replace(worker)
            # The request was cancelled.
            except BaseException:
                self._replace(worker)
                raise
        return None

    def _replace(self, worker: Worker) -> None:
        self._workers.discard(worker)
        worker.stop()
        self._add_worker()


def _split(images: Sequence[Image]) -> list[list[Image]]:
    """Split images into batches."""
    batches: list[list[Image]] = [[]]
    size = 0
    for image in images:
        if batches[-1] and (len(batches[-1]) == BATCH_IMAGES or size + len(image) > BATCH_BYTES):
            batches.append([])
            size = 0
        batches[-1].append(image)
        size += len(image)
    return batches if batches[0] else []


def _unpack(answer: bytearray, spec: InputSpec, count: int) -> list[Decoded]:
    """Unpack the answer to a batch of `count` images."""
    start = decode_worker.LENGTHS.size
    head_size, body_size = decode_worker.LENGTHS.unpack_from(answer)
    errors = json.loads(answer[start : start + head_size])
    valid = errors.count("")
    if len(errors) != count or body_size != valid * math.prod(spec.shape):
        raise WorkerCrashed
    pixels = np.frombuffer(answer, np.uint8, body_size, start + head_size).reshape(valid, *spec.shape)
    rows = iter(pixels)
    return [InvalidImageError(error) if error else next(rows) for error in errors]
