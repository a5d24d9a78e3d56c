"""Dynamic batching: each request gets the predictions of its own images, whatever happens to the others."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import ClassVar

import numpy as np
import pytest

from convoy.serving.batching import MAX_BATCH, Batcher


class Echo:
    """A model whose only probability is the value of the image; it waits until it may answer."""

    classes: ClassVar[list[str]] = ["value"]

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.sizes: list[int] = []

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        assert self.may_answer.wait(10)
        self.sizes.append(len(pixels))
        if (pixels == 255).any():
            raise RuntimeError("out of memory")
        return pixels[:, 0, 0].astype(np.float32)


def make_images(*values: int) -> list[np.ndarray]:
    return [np.full((1, 1, 1), value, np.uint8) for value in values]


def run(work: Callable[[Batcher, Echo, "asyncio.Task"], Awaitable[None]]) -> None:
    """Run work while the first request is being predicted, so that others wait."""

    async def start() -> None:
        batcher, model = Batcher(), Echo()
        first = asyncio.create_task(batcher.predict(model, make_images(1)))  # type: ignore[arg-type]
        while not batcher._runner or batcher._waiting:
            await asyncio.sleep(0)
        try:
            await work(batcher, model, first)
        finally:
            model.may_answer.set()
            batcher.close()

    asyncio.run(start())


def ask(batcher: Batcher, model: Echo, *values: int) -> "asyncio.Task":
    return asyncio.create_task(batcher.predict(model, make_images(*values)))  # type: ignore[arg-type]


def test_cancelled_request_leaves_the_others_their_answers() -> None:
    async def work(batcher: Batcher, model: Echo, first: asyncio.Task) -> None:
        cancelled, kept = ask(batcher, model, 2, 3), ask(batcher, model, 4)
        await asyncio.sleep(0)
        cancelled.cancel()
        model.may_answer.set()
        assert (await first).tolist() == [[1]]
        assert (await kept).tolist() == [[4]]
        assert model.sizes == [1, 3]

    run(work)


def test_large_request_is_answered_in_its_order_in_parts() -> None:
    values = list(range(2, MAX_BATCH + 12))

    async def work(batcher: Batcher, model: Echo, first: asyncio.Task) -> None:
        large, small = ask(batcher, model, *values), ask(batcher, model, 100)
        model.may_answer.set()
        assert (await large)[:, 0].tolist() == values
        assert (await small).tolist() == [[100]]
        assert max(model.sizes) == MAX_BATCH

    run(work)


def test_error_of_a_batch_ends_its_requests_and_no_others() -> None:
    async def work(batcher: Batcher, model: Echo, first: asyncio.Task) -> None:
        failed = ask(batcher, model, 255)
        model.may_answer.set()
        assert (await first).tolist() == [[1]]
        with pytest.raises(RuntimeError, match="out of memory"):
            await failed
        assert (await ask(batcher, model, 5)).tolist() == [[5]]

    run(work)
