"""The decode pool: no image can crash or block it, and processes that are killed are replaced."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from convoy.data.image_io import InvalidImageError
from convoy.serving import decode_pool
from convoy.serving.decode_pool import DecodePool
from convoy.serving.decode_worker import preprocess
from convoy.serving.onnx_model import InputSpec
from serving_fixtures import draw

SPEC = InputSpec(longest_side=64, size=8, channels=3)
# Imported by each process before it decodes: some contents of files crash or block it.
BROKEN_DECODER = """
import os, time
from convoy.data import image_io
decode = image_io.decode
def fail(data, longest_side):
    if data == b"crash":
        os.abort()
    if data == b"block":
        time.sleep(60)
    return decode(data, longest_side)
image_io.decode = fail
"""


def run(work: Callable[[DecodePool], Awaitable[None]], *, workers: int = 2, timeout: float = 20) -> None:
    async def start() -> None:
        async with asyncio.timeout(60), DecodePool(workers, timeout) as pool:
            await work(pool)

    asyncio.run(start())


@pytest.fixture
def broken_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN_DECODER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[2] / 'src'}")


def describe(found: list) -> list[str]:
    return [str(each) if isinstance(each, InvalidImageError) else "decoded" for each in found]


def test_pixels_are_those_of_training(tmp_path: Path) -> None:
    files = [draw("cat", "JPEG", (100, 70)), draw("dog", "PNG", (5, 9))]
    paths = [tmp_path / "a.jpg", tmp_path / "b.png"]
    for path, file in zip(paths, files, strict=True):
        path.write_bytes(file)

    async def work(pool: DecodePool) -> None:
        for images in (files, [str(path) for path in paths]):
            for found, file in zip(await pool.decode(SPEC, images), files, strict=True):
                np.testing.assert_array_equal(found, preprocess(file, *SPEC))

    run(work)


def test_image_that_crashes_or_blocks_harms_no_other(broken_decoder: None) -> None:
    async def work(pool: DecodePool) -> None:
        found = await pool.decode(SPEC, [draw("cat"), b"crash", draw("dog"), b"block", b"no image", draw("fox")])
        crashed, blocked, invalid = "crashes its decoder", "takes more than 1 seconds to decode", "is not an image in"
        assert describe(found)[:4] == ["decoded", crashed, "decoded", blocked]
        assert describe(found)[4].startswith(invalid)
        assert describe(found)[5] == "decoded"
        assert describe(await pool.decode(SPEC, [draw("cat")] * 40)) == ["decoded"] * 40

    run(work, timeout=1)


def test_processes_killed_while_idle_are_replaced() -> None:
    async def work(pool: DecodePool) -> None:
        for worker in tuple(pool._workers):
            worker.process.kill()
            worker.process.wait()
        await asyncio.sleep(0.1)
        assert describe(await pool.decode(SPEC, [draw("cat")])) == ["decoded"]
        assert pool.crashes == 0

    run(work)


def test_images_are_not_blamed_for_processes_killed_at_start() -> None:
    async def work(pool: DecodePool) -> None:
        (worker,) = pool._workers
        worker.process.kill()
        task = asyncio.create_task(pool.decode(SPEC, [draw("cat")]))
        for _ in range(2 * decode_pool.MAX_TRIES):
            while (new := next(iter(pool._workers))) is worker:
                await asyncio.sleep(0)
            worker = new
            worker.process.kill()
        assert describe(await task) == ["decoded"]

    run(work, workers=1)


def test_pool_without_processes_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(pool: DecodePool) -> None:
        assert describe(await pool.decode(SPEC, [draw("cat")] * 2)) == ["can't be decoded, as no decoder starts"] * 2

    monkeypatch.setattr(decode_pool.sys, "executable", "/bin/false")
    run(work)


def test_cancelled_request_leaves_the_pool_as_it_was(broken_decoder: None) -> None:
    async def work(pool: DecodePool) -> None:
        task = asyncio.create_task(pool.decode(SPEC, [b"block"]))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert describe(await pool.decode(SPEC, [draw("cat")])) == ["decoded"]

    run(work, workers=1)


def test_batches_have_limits() -> None:
    sizes = [len(batch) for batch in decode_pool._split([b"x"] * 40)]
    assert sizes == [16, 16, 8]
    large = bytes(decode_pool.BATCH_BYTES // 2 + 1)
    assert [len(batch) for batch in decode_pool._split([large, large, b"x", large])] == [1, 2, 1]
    assert decode_pool._split([]) == []
