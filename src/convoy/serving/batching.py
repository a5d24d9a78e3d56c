"""Dynamic batching: images of requests that wait at the same time are predicted together."""

import asyncio
import collections
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from convoy.serving.onnx_model import ServedModel

# The most images of a call of ONNX runtime.
MAX_BATCH = 32
# A model that takes less time for an image runs in the event loop, as changing to another thread takes 0.1 ms.
INLINE_S = 0.0005

Waiting = tuple[ServedModel, np.ndarray, asyncio.Future[np.ndarray]]


class Batcher:
    """Predicts images, those that wait together in one call.

    No image waits for others to come: a call takes what has come while the call before it ran.
    """

    def __init__(self) -> None:
        self._waiting: collections.deque[Waiting] = collections.deque()
        self._runner: asyncio.Task | None = None
        # One thread, as ONNX runtime has threads of its own.
        self._executor = ThreadPoolExecutor(1, "predict")
        self._seconds_per_image: dict[int, float] = {}

    async def predict(self, model: ServedModel, images: Sequence[np.ndarray]) -> np.ndarray:
        """Predict the probabilities (N, K) of preprocessed images (H, W, C) uint8."""
        if not images:
            return np.empty((0, len(model.classes)), np.float32)
        loop = asyncio.get_running_loop()
        futures = []
        for start in range(0, len(images), MAX_BATCH):
            future: asyncio.Future[np.ndarray] = loop.create_future()
            self._waiting.append((model, np.stack(images[start : start + MAX_BATCH]), future))
            futures.append(future)
        if self._runner is None or self._runner.done():
            self._runner = loop.create_task(self._run())
        return np.concatenate([await future for future in futures]) if len(futures) > 1 else await futures[0]

    async def _run(self) -> None:
        """Predict until no image waits."""
        while self._waiting:
            batch = self._take()
            model = batch[0][0]
            pixels = np.concatenate([images for _, images, _ in batch]) if len(batch) > 1 else batch[0][1]
            try:
                found = await self._predict(model, pixels)
            # The errors of onnxruntime have no common base class.
            except Exception as error:
                for _, _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            start = 0
            for _, images, future in batch:
                if not future.done():
                    future.set_result(found[start : start + len(images)])
                start += len(images)

    async def _predict(self, model: ServedModel, pixels: np.ndarray) -> np.ndarray:
        began = time.perf_counter()
        if self._seconds_per_image.get(id(model), 1) * len(pixels) < INLINE_S:
            found = model.probabilities(pixels)
        else:
            found = await asyncio.get_running_loop().run_in_executor(self._executor, model.probabilities, pixels)
        took = (time.perf_counter() - began) / len(pixels)
        # The mean of late calls, where one slow call counts little.
        before = self._seconds_per_image.get(id(model), took)
        self._seconds_per_image = {id(model): 0.8 * before + 0.2 * took}
        return found

    def _take(self) -> list[Waiting]:
        """Take the images that wait for the same model, in their order and at most `MAX_BATCH`."""
        batch = [self._waiting.popleft()]
        count = len(batch[0][1])
        while self._waiting and self._waiting[0][0] is batch[0][0]:
            count += len(self._waiting[0][1])
            if count > MAX_BATCH:
                break
            batch.append(self._waiting.popleft())
        return batch

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown(wait=False)
