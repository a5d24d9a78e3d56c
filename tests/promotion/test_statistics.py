"""Statistics of the gate: exact tests, intervals with the stated coverage, and a clustered bootstrap."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from convoy.promotion.statistics import (
    bootstrap_mean,
    detectable_gain,
    gain_lower_bound,
    is_better,
    mcnemar_p_value,
)
from gate_fixtures import counts


@given(st.integers(0, 300), st.integers(0, 300))
def test_p_value_is_that_of_the_exact_binomial_test(wins: int, losses: int) -> None:
    expected = binomtest(wins, wins + losses, alternative="greater").pvalue if wins + losses else 1
    assert float(mcnemar_p_value(wins, losses)) == pytest.approx(expected)
    by_hand = sum(math.comb(wins + losses, k) for k in range(wins, wins + losses + 1)) / 2 ** (wins + losses)
    assert float(mcnemar_p_value(wins, losses)) == pytest.approx(by_hand)


# The interval


def test_interval_is_tangos() -> None:
    # the roots of the quartic equation by Yang, Sun and Hardin (2012) for the same interval
    assert float(gain_lower_bound(40, 20, 160, 0.025)) == pytest.approx(0.03086453, abs=1e-7)
    assert -float(gain_lower_bound(20, 40, 160, 0.025)) == pytest.approx(0.21806424, abs=1e-7)
    assert float(gain_lower_bound(1, 0, 44, 0.025)) == pytest.approx(-0.05939323, abs=1e-7)


@given(counts, counts, st.integers(1, 1000), st.floats(0.001, 0.4))
def test_interval_holds_the_difference_and_stays_in_range(wins: int, losses: int, more: int, alpha: float) -> None:
    images = wins + losses + more
    low, high = (
        float(gain_lower_bound(wins, losses, images, alpha)),
        -float(gain_lower_bound(losses, wins, images, alpha)),
    )
    assert -1 <= low <= (wins - losses) / images <= high <= 1
    assert float(gain_lower_bound(wins + 1, losses, images, alpha)) > low


def test_interval_exists_if_all_or_no_predictions_differ() -> None:
    assert -0.01 < float(gain_lower_bound(0, 0, 500, 0.05)) < 0
    assert 0.98 < float(gain_lower_bound(500, 0, 500, 0.05)) < 1
    assert float(gain_lower_bound(0, 500, 500, 0.05)) == -1


@pytest.mark.parametrize("difference", [-0.02, 0.0, 0.02])
def test_lower_bound_exceeds_the_truth_at_most_at_rate_alpha(difference: float) -> None:
    shares = [0.03 + difference / 2, 0.03 - difference / 2, 0.94]
    won, lost, _ = np.random.default_rng(0).multinomial(1000, shares, 20_000).T
    assert (gain_lower_bound(won, lost, 1000, 0.05) > difference).mean() == pytest.approx(0.05, abs=0.01)


def test_detectable_gain_is_detected_with_80_percent_power() -> None:
    gain = detectable_gain(np.sqrt(0.05 / 2000), 0.05)
    won, lost, _ = np.random.default_rng(0).multinomial(2000, [0.025 + gain / 2, 0.025 - gain / 2, 0.95], 20_000).T
    assert is_better(won, lost, 0.05).mean() == pytest.approx(0.8, abs=0.05)


def test_bootstrap_finds_the_spread_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(1, 2, 400)
    low, high = bootstrap_mean(values, None, 0.05, seed=0)
    assert (low, high) == pytest.approx((values.mean() - 0.1645, values.mean() + 0.1645), abs=0.02)
    assert (low, high) == bootstrap_mean(values, None, 0.05, seed=0)
    assert bootstrap_mean(values, None, 0.05, seed=1) != (low, high)


# The bootstrap


def test_images_of_a_group_count_as_one_in_the_bootstrap() -> None:
    values = np.repeat(np.random.default_rng(0).normal(0, 1, 40), 10)
    by_image, by_group = bootstrap_mean(values, None, 0.05, 0), bootstrap_mean(values, np.arange(400) // 10, 0.05, 0)
    assert by_group[1] - by_group[0] > 2 * (by_image[1] - by_image[0])
    unequal = np.minimum(np.arange(400), 9)
    assert bootstrap_mean(np.ones(400), unequal, 0.05, 0) == (1, 1)
