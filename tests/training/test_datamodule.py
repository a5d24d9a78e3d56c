"""The data module: the remaining steps of an epoch, and the batches in their order."""

from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from convoy.core.config import validate
from convoy.data.packed.arrays import Images
from convoy.recipe import RecipeConfig
from convoy.training import datamodule
from convoy.training.datamodule import MAX_VAL_BATCH_SIZE, PREFETCH_STEPS, ImageData, ImageStore
from convoy.training.sampler import BatchSampler
from model_settings import load_model_settings


def make_numbered(count: int, size: int = 8) -> Images:
    """Images whose every pixel, and whose label, is their number."""
    numbers = np.arange(count)
    pixels = np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (count, size, size, 1))
    return Images(pixels.copy(), numbers.astype(np.int64))


def make_data(train: int | Images = 100, val: int = 30, **recipe: object) -> ImageData:
    images = make_numbered(train) if isinstance(train, int) else train
    values = load_model_settings("lenet")["recipe"]
    return ImageData(
        images, make_numbered(val), validate(RecipeConfig, values | {"batch_size": 4} | recipe, "recipe"), 1
    )


@pytest.mark.parametrize("done", [0, 1, 16, 24, 25])
def test_remaining_steps_are_in_order_and_never_no_item(done: int) -> None:
    feed = make_data()
    assert feed.steps == 25
    feed.step = done
    due = list(feed.train_dataloader())
    assert [step for steps in due for step in steps] == list(range(done, 25))
    assert len(due) >= 1


def test_batch_holds_its_rows_of_the_current_epoch() -> None:
    feed = make_data()
    for epoch in (0, 1, 0):
        feed.epoch = epoch
        for step, rows in enumerate(BatchSampler(np.arange(100), 4, 1).draw_epoch(epoch)):
            pixels, labels = feed.batch(step)
            assert pixels.dtype == torch.uint8
            assert labels.tolist() == rows.tolist() == pixels[:, 0, 0, 0].tolist()


def test_validation_batch_is_no_larger_than_a_micro_batch() -> None:
    feed = make_data(val=100, batch_size=24, accumulate_grad_batches=2)
    assert [len(rows) for rows in feed.val_dataloader()] == [24, 24, 24, 24, 4]
    feed.set_rank(torch.device("cpu"), rank=1, world_size=2)
    assert [len(rows) for rows in feed.val_dataloader()] == [12, 12, 12, 12, 2]


def test_images_are_uploaded_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_numbered(100)
    monkeypatch.setattr(datamodule, "UPLOAD_BYTES", 7 * images.pixels[0].nbytes)
    assert np.array_equal(datamodule.copy_to_device(images.pixels, torch.device("cpu")).numpy(), images.pixels)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_images_are_divided_among_processes(world_size: int) -> None:
    feed = make_data(train=MAX_VAL_BATCH_SIZE, val=2 * MAX_VAL_BATCH_SIZE + 5, batch_size=MAX_VAL_BATCH_SIZE)
    seen = []
    for rank in range(world_size):
        feed.set_rank(torch.device("cpu"), rank, world_size)
        batches = list(feed.val_dataloader())
        assert all(len(rows) <= MAX_VAL_BATCH_SIZE for rows in batches)
        seen += [row for rows in batches for row in rows]
    assert sorted(seen) == list(range(2 * MAX_VAL_BATCH_SIZE + 5))


def test_batches_are_copies_of_the_stored_images() -> None:
    feed = make_data()
    pixels, _ = feed.batch(0)
    pixels.zero_()
    assert feed.train.pixels.max() == 99


def test_memory_map_is_prefetched_and_gives_equal_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_numbered(100, size=100)  # rows that begin and end within a page
    np.save(tmp_path / "train_pixels.npy", images.pixels)
    np.save(tmp_path / "train_labels.npy", images.labels)
    monkeypatch.setattr(datamodule, "MMAP_PREFETCH_BYTES", 0)
    asked: list[list[int]] = []
    prefetch = ImageStore.prefetch

    def noted(held: ImageStore, rows: np.ndarray) -> None:
        prefetch(held, rows)
        assert held.file
        asked.append(rows.tolist())

    monkeypatch.setattr(ImageStore, "prefetch", noted)
    streamed, held = make_data(Images.load(tmp_path, "train")), make_data(images)
    batches = [streamed.batch(step) for step in range(25)]
    monkeypatch.undo()
    for step, (pixels, labels) in enumerate(batches):
        assert torch.equal(pixels, held.batch(step)[0])
        assert torch.equal(labels, held.batch(step)[1])
    assert asked == [labels.tolist() for _, labels in batches[PREFETCH_STEPS:]]


def test_memory_does_not_grow_with_the_images_that_are_fed(tmp_path: Path) -> None:
    with (tmp_path / "train_pixels.npy").open("wb") as file:  # 2 GB of zeros that take no disk
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (40_000, 128, 128, 3)}
        )
        file.truncate(file.tell() + 40_000 * 128 * 128 * 3)
    np.save(tmp_path / "train_labels.npy", np.zeros(40_000, np.int64))
    feed = make_data(Images.load(tmp_path, "train"), batch_size=64)
    feed.batch(0)
    before = measure_memory()
    for step in range(feed.steps):
        feed.batch(step)
    assert measure_memory() - before < 20e6


def measure_memory() -> int:
    """Bytes of this process that are not pages of a file, which the system may take back at any time."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared
