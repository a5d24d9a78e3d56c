"""The description of a packed data set: its channel statistics are exact, and it is saved unchanged."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoy.data.packed.dataset_info import ChannelMoments, DatasetInfo


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3])),
    seed=st.integers(0, 1000),
    chunk=st.integers(1, 10),
)
def test_mean_and_std_equal_those_of_numpy(shape: tuple[int, ...], seed: int, chunk: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    mean, std = sum_channels(pixels, chunk).mean_and_std()
    assert mean == pytest.approx((pixels / 255).mean(axis=(0, 1, 2)).tolist(), abs=1e-6)
    assert std == pytest.approx(np.maximum((pixels / 255).std(axis=(0, 1, 2)), 1 / 255).tolist(), abs=1e-6)
    assert sum_channels(pixels[::-1], len(pixels)).mean_and_std() == (mean, std)


def sum_channels(pixels: np.ndarray, chunk: int) -> ChannelMoments:
    sums = ChannelMoments(pixels.shape[-1])
    for start in range(0, len(pixels), chunk):
        sums.add(pixels[start : start + chunk])
        sums.add(pixels[:0])  # as of a part that has no training image
    return sums


@given(value=st.integers(0, 255))
def test_channel_that_never_varies_can_still_be_divided_by(value: int) -> None:
    pixels = np.full((3, 4, 4, 1), value, np.uint8)
    assert sum_channels(pixels, 3).mean_and_std() == ([round(value / 255, 6)], [round(1 / 255, 6)])


def test_saved_dataset_info_is_read_back_equal(tmp_path: Path) -> None:
    info = DatasetInfo("pets", ["NA", "007", "é"], 32, 3, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    info.save(tmp_path / "task.json")
    assert DatasetInfo.load(tmp_path / "task.json") == info


def test_sums_over_many_images_are_exact_integers() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9000, 2, 2, 3), np.uint8)
    sums, exact = sum_channels(pixels, 5000), pixels.astype(np.int64)
    assert sums.sums.tolist() == exact.sum(axis=(0, 1, 2)).tolist()
    assert sums.squares.tolist() == (exact**2).sum(axis=(0, 1, 2)).tolist()
