"""The data module: batches in their order, and the position at which a training resumes."""

import itertools
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from convoy.core.config import validate
from convoy.data.packed.arrays import Images
from convoy.recipe import RecipeConfig
from convoy.training import image_store
from convoy.training.datamodule import PREFETCH_BATCHES, ImageDataModule, TrainLoader, ValLoader
from convoy.training.image_store import ImageStore
from convoy.training.sampler import BatchSampler
from model_settings import load_model_settings


def make_numbered(count: int, size: int = 8) -> Images:
    """Images whose every pixel, and whose label, is their number."""
    numbers = np.arange(count)
    pixels = np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (count, size, size, 1))
    return Images(pixels.copy(), numbers.astype(np.int64))


def make_data(train: int | Images = 100, val: int = 30, **recipe: object) -> ImageDataModule:
    images = make_numbered(train) if isinstance(train, int) else train
    values = load_model_settings("lenet")["recipe"]
    made = ImageDataModule(
        images, make_numbered(val), validate(RecipeConfig, values | {"batch_size": 4} | recipe, "recipe"), 1
    )
    made.setup()
    return made


def make_augment(**changes: object) -> dict[str, object]:
    return load_model_settings("lenet")["recipe"]["augment"] | changes


def take(loader: TrainLoader | ValLoader, count: int) -> list[list[int]]:
    """The labels of the next batches, as Lightning takes them."""
    return [labels.tolist() for _, labels in itertools.islice(iter(loader), count)]


def test_batch_holds_the_rows_of_its_epoch() -> None:
    loader = make_data().train_dataloader()
    sampler = BatchSampler(np.arange(100), 4, 1)
    for epoch in (0, 1, 2):
        assert take(loader, 25) == sampler.draw_epoch(epoch).tolist()
    pixels, labels = next(iter(loader))
    assert pixels.dtype == torch.uint8
    assert labels.tolist() == pixels[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("done", [0, 1, 24, 25, 26, 50])
def test_loading_continues_at_a_saved_position(done: int) -> None:
    loader, undisturbed = make_data(), make_data()
    expected = [batch for _ in range(3) for batch in take(undisturbed.train_dataloader(), 25)]
    for left in (25, done - 25):
        take(loader.train_dataloader(), min(done, 25) if left == 25 else max(0, left))
    resumed = make_data()
    resumed.load_state_dict(loader.state_dict())
    rest = take(resumed.train_dataloader(), 25 - done % 25 if done % 25 else 25)
    assert rest == expected[done : done + len(rest)]
    assert rest


def test_alternating_flips_show_both_sides_in_two_epochs() -> None:
    pixels = np.arange(100 * 8, dtype=np.uint8).reshape(100, 1, 8, 1)
    data = make_data(Images(pixels, np.arange(100)), augment=make_augment(hflip="alternate"))
    sides: list[dict[int, bool]] = []
    for _ in range(3):
        seen = {}
        for images, labels in itertools.islice(iter(data.train_dataloader()), 25):
            for image, label in zip(images.numpy(), labels.tolist(), strict=True):
                assert image.tolist() in (pixels[label].tolist(), pixels[label][:, ::-1].tolist())
                seen[label] = image.tolist() != pixels[label].tolist()
        sides.append(seen)
    assert 30 < sum(sides[0].values()) < 70
    assert sides[1] == {label: not flipped for label, flipped in sides[0].items()}
    assert sides[2] == sides[0]


def test_validation_batch_is_twice_as_large_as_a_training_batch() -> None:
    loader = make_data(val=100, batch_size=24, accumulate_grad_batches=2).val_dataloader()
    assert [len(batch) for batch in take(loader, 9)] == [24, 24, 24, 24, 4]
    assert len(loader) == 5


def test_images_are_uploaded_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_numbered(100)
    monkeypatch.setattr(image_store, "UPLOAD_BYTES", 7 * images.pixels[0].nbytes)
    assert np.array_equal(image_store.copy_to_device(images.pixels, torch.device("cpu")).numpy(), images.pixels)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [2, 1029])
def test_validation_images_are_divided_among_processes(world_size: int, count: int) -> None:
    store = ImageStore(make_numbered(count), torch.device("cpu"))
    loaders = [ValLoader(store, 512, rank, world_size) for rank in range(world_size)]
    batches = [batch for loader in loaders for batch in take(loader, len(loader))]
    assert all(len(loader) for loader in loaders)  # all have to validate
    assert all(len(batch) <= 512 for batch in batches)
    assert sorted(row for batch in batches for row in batch) == list(range(count))


def test_batches_are_copies_of_the_stored_images() -> None:
    data = make_data()
    pixels, _ = next(iter(data.train_dataloader()))
    pixels.zero_()
    assert data.train.pixels.max() == 99


def test_memory_map_is_prefetched_and_gives_equal_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_numbered(100, size=100)  # rows that begin and end within a page
    np.save(tmp_path / "train_pixels.npy", images.pixels)
    np.save(tmp_path / "train_labels.npy", images.labels)
    monkeypatch.setattr(image_store, "MMAP_PREFETCH_BYTES", 0)
    asked: list[list[int]] = []
    prefetch = ImageStore.prefetch

    def noted(held: ImageStore, rows: np.ndarray) -> None:
        prefetch(held, rows)
        assert held.file
        asked.append(rows.tolist())

    monkeypatch.setattr(ImageStore, "prefetch", noted)
    streamed, held = make_data(Images.load(tmp_path, "train")), make_data(images)
    batches = list(streamed.train_dataloader())
    monkeypatch.undo()
    for streamed_batch, held_batch in zip(batches, held.train_dataloader(), strict=True):
        assert all(map(torch.equal, streamed_batch, held_batch))
    assert asked == [labels.tolist() for _, labels in batches[PREFETCH_BATCHES:]]


def test_memory_does_not_grow_with_the_images_that_are_fed(tmp_path: Path) -> None:
    with (tmp_path / "train_pixels.npy").open("wb") as file:  # 2 GB of zeros that take no disk
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (40_000, 128, 128, 3)}
        )
        file.truncate(file.tell() + 40_000 * 128 * 128 * 3)
    np.save(tmp_path / "train_labels.npy", np.zeros(40_000, np.int64))
    feed = make_data(Images.load(tmp_path, "train"), batch_size=64)
    batches = iter(feed.train_dataloader())
    next(batches)
    before = measure_memory()
    for _ in batches:
        pass
    assert measure_memory() - before < 20e6


def measure_memory() -> int:
    """Bytes of this process that are not pages of a file, which the system may take back at any time."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared
