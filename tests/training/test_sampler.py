"""The sampler: its order depends on seed and epoch alone, divided evenly among processes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convoy.core.errors import ConvoyError
from convoy.data.packed.arrays import Images
from convoy.training.sampler import BatchSampler, compute_class_weights

sizes = given(count=st.integers(1, 200), batch_size=st.integers(1, 80), seed=st.integers(0, 2**40))


def make_labels(count: int, classes: int = 3) -> np.ndarray:
    return np.arange(count) % classes


def list_batches(batches: BatchSampler, number: int) -> list[list[int]]:
    return [rows.tolist() for rows in batches.draw_epoch(number)]


@sizes
def test_batches_are_complete_and_repeat_no_image(count: int, batch_size: int, seed: int) -> None:
    batches = BatchSampler(make_labels(count), batch_size, seed)
    seen = list_batches(batches, 3)
    assert len(seen) == len(batches) >= 1
    assert {len(batch) for batch in seen} == {min(batch_size, count)}
    rows = [row for batch in seen for row in batch]
    assert len(set(rows)) == len(rows) > count - batch_size
    assert set(rows) <= set(range(count))


@sizes
@settings(max_examples=20)
def test_order_depends_on_seed_and_epoch_alone(count: int, batch_size: int, seed: int) -> None:
    expected = list_batches(BatchSampler(make_labels(count), batch_size, seed), 5)
    batches = BatchSampler(make_labels(count), batch_size, seed)
    batches.draw_epoch(4)
    np.random.default_rng().random()
    assert list_batches(batches, 5) == expected


def test_epochs_and_seeds_differ_in_their_order() -> None:
    orders = [list_batches(BatchSampler(make_labels(100), 10, seed), number) for seed in (1, 2) for number in (0, 1)]
    assert all(orders.count(order) == 1 for order in orders)


def test_every_image_is_seen_over_several_epochs() -> None:
    batches = BatchSampler(make_labels(19), 10, 1)
    assert {row for number in range(10) for batch in list_batches(batches, number) for row in batch} == set(range(19))


@given(world_size=st.integers(1, 4), count=st.integers(4, 100), batch_size=st.integers(4, 40))
def test_batches_are_divided_evenly_among_processes(world_size: int, count: int, batch_size: int) -> None:
    parts = [
        BatchSampler(make_labels(count), batch_size, 1, rank=rank, world_size=world_size).draw_epoch(2)
        for rank in range(world_size)
    ]
    size = min(batch_size, count) // world_size * world_size
    alone = BatchSampler(make_labels(count), size, 1).draw_epoch(2)
    for step, together in enumerate(alone):
        assert {len(part[step]) for part in parts} == {size // world_size}
        assert sorted(np.concatenate([part[step] for part in parts])) == sorted(together)


def test_more_processes_than_images_in_a_batch_are_refused() -> None:
    with pytest.raises(ConvoyError, match="3 images per step can't be divided among 4 processes"):
        BatchSampler(make_labels(9), 3, 1, world_size=4)


@given(accumulate=st.integers(1, 4), count=st.integers(4, 100), images=st.integers(4, 40))
def test_accumulated_batches_are_equal_parts_of_a_step(accumulate: int, count: int, images: int) -> None:
    sampler = BatchSampler(make_labels(count), images, 1, accumulate=accumulate)
    batches = sampler.draw_epoch(2)
    assert batches.shape == (len(sampler), sampler.batch_size)
    assert len(sampler) == sampler.steps * accumulate
    whole = BatchSampler(make_labels(count), sampler.images_per_step, 1).draw_epoch(2)
    assert batches.reshape(whole.shape).tolist() == whole.tolist()


@pytest.mark.parametrize("world_size", [1, 2])
def test_balanced_batches_draw_classes_equally_often(world_size: int) -> None:
    rare = np.repeat([0, 1, 2], [9000, 900, 100])
    parts = [
        BatchSampler(rare, 100, 1, balanced=True, rank=rank, world_size=world_size).draw_epoch(0)
        for rank in range(world_size)
    ]
    seen = np.bincount(rare[np.concatenate([rows for part in parts for rows in part])])
    assert seen.sum() == 10_000
    assert seen == pytest.approx([3333] * 3, rel=0.1)


def test_class_weights_average_one_and_balance_the_classes() -> None:
    rare = np.repeat([0, 1, 3], [90, 9, 1])
    weights = compute_class_weights(rare, 4)
    assert weights[rare].mean() == pytest.approx(1)
    totals = np.bincount(rare, weights[rare], minlength=4)
    assert totals[[0, 1, 3]] == pytest.approx([100 / 3] * 3)
    assert weights[2] == 0  # there is none to weigh


def test_split_is_read_from_disk_only_when_requested(tmp_path: Path) -> None:
    np.save(tmp_path / "val_pixels.npy", np.full((3, 8, 8, 1), 7, np.uint8))
    np.save(tmp_path / "val_labels.npy", np.arange(3))
    images = Images.load(tmp_path, "val")
    assert isinstance(images.pixels, np.memmap)
    assert len(images) == 3
    assert (np.take(images.pixels, [2, 0], axis=0) == 7).all()
