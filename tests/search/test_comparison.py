"""The comparison of settings over seeds: what counts as better."""

import pytest

from convoy.search.comparison import compare


def test_difference_beyond_the_seeds_is_better() -> None:
    found = compare([0.70, 0.71, 0.72], [0.80, 0.81, 0.82])
    assert found.is_better
    assert found.difference.mean == pytest.approx(0.1)
    # Student's interval of three scores with a standard deviation of 0.01 is 4.303 * 0.01 / sqrt(3) on either side.
    assert found.present.high - found.present.mean == pytest.approx(0.02484, abs=1e-5)
    # Welch's has four degrees of freedom for equal variances: 2.776 * 0.01 * sqrt(2 / 3).
    assert found.difference.mean - found.difference.low == pytest.approx(0.02267, abs=1e-5)


@pytest.mark.parametrize("tuned", [[0.70, 0.71, 0.73], [0.5, 0.8, 0.95], [0.6, 0.6, 0.6]])
def test_difference_within_the_seeds_is_not_better(tuned: list[float]) -> None:
    assert not compare([0.70, 0.71, 0.72], tuned).is_better


def test_equal_scores_are_not_better() -> None:
    assert not compare([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]).is_better
    assert compare([0.9, 0.9, 0.9], [1.0, 1.0, 1.0]).is_better
