"""The comparison of two models in any metric: its tests have the error rates that they state."""

import numpy as np
import pytest
from sklearn import metrics

from convoy.core.config import SelectionMetric
from convoy.promotion import paired_metric
from convoy.promotion.paired_metric import PredictionPairs, compare_metric, score_predictions
from convoy.promotion.statistics import gain_lower_bound, mcnemar_p_value

NAMES = np.array(["frequent", "rare", "rarest"], object)
IMBALANCED = np.repeat(NAMES, [500, 60, 40])
weighted = pytest.mark.parametrize("metric", ["balanced_accuracy", "macro_f1"])


def confuse(random: np.random.Generator, actual: np.ndarray, errors: float) -> np.ndarray:
    """Predictions of which a fraction is another class."""
    codes = np.searchsorted(NAMES, actual)
    other = (codes + random.integers(1, 3, len(codes))) % 3
    return NAMES[np.where(random.random(len(codes)) < errors, other, codes)]


def test_scores_are_those_of_scikit_learn() -> None:
    predicted = confuse(np.random.default_rng(0), IMBALANCED, 0.2)
    expected = {
        "accuracy": metrics.accuracy_score(IMBALANCED, predicted),
        "balanced_accuracy": metrics.balanced_accuracy_score(IMBALANCED, predicted),
        "macro_f1": metrics.f1_score(IMBALANCED, predicted, average="macro"),
    }
    found = {metric: score_predictions(metric, IMBALANCED, predicted) for metric in expected}  # type: ignore[arg-type]
    assert found == pytest.approx(expected)


def test_accuracy_has_the_exact_test_and_interval() -> None:
    random = np.random.default_rng(0)
    new, old = confuse(random, IMBALANCED, 0.1), confuse(random, IMBALANCED, 0.12)
    found = compare_metric(IMBALANCED, new, old, "accuracy", 0.05, 0)
    assert found.p_better == mcnemar_p_value(found.wins, found.losses)
    assert found.low == gain_lower_bound(found.wins, found.losses, 600, 0.05)
    assert found.gain == pytest.approx((found.wins - found.losses) / 600)


def test_permutation_test_of_accuracy_agrees_with_the_exact_one() -> None:
    random = np.random.default_rng(1)
    new, old = confuse(random, IMBALANCED, 0.08), confuse(random, IMBALANCED, 0.12)
    exact = compare_metric(IMBALANCED, new, old, "accuracy", 0.05, 0)
    pairs = PredictionPairs.count(IMBALANCED, new, old)
    permuted = pairs.permuted_gains("accuracy", 0)
    assert (permuted >= exact.gain - 1e-12).mean() == pytest.approx(exact.p_better, abs=0.01)
    assert permuted.std() == pytest.approx(exact.standard_error, rel=0.03)
    low, high = np.quantile(pairs.resampled_gains("accuracy", 0), [0.05, 0.95])
    assert (low, high) == pytest.approx((exact.low, exact.high), abs=0.005)


@weighted
def test_equal_models_rarely_seem_better(metric: SelectionMetric, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal models, about 5% have p < 0.05."""
    random = np.random.default_rng(2)
    monkeypatch.setattr(paired_metric, "PERMUTATIONS", 500)
    monkeypatch.setattr(paired_metric, "RESAMPLES", 1)
    found = []
    for _ in range(300):
        predicted = [confuse(random, IMBALANCED, 0.1) for _ in range(2)]
        found.append(compare_metric(IMBALANCED, *predicted, metric, 0.05, 0).p_better < 0.05)
    assert 0.01 <= np.mean(found) <= 0.09


@weighted
def test_gain_in_rare_classes_is_seen_where_accuracy_falls(metric: SelectionMetric) -> None:
    random = np.random.default_rng(3)
    rare = IMBALANCED != "frequent"
    new = np.where(rare, confuse(random, IMBALANCED, 0.1), confuse(random, IMBALANCED, 0.1))
    old = np.where(rare, confuse(random, IMBALANCED, 0.5), confuse(random, IMBALANCED, 0.01))
    found = compare_metric(IMBALANCED, new, old, metric, 0.05, 0)
    if metric == "balanced_accuracy":
        assert found.p_better < 0.001
        assert 0 < found.low < found.gain < found.high
    assert compare_metric(IMBALANCED, old, new, metric, 0.05, 0).gain == pytest.approx(-found.gain)


@weighted
def test_identical_predictions_are_no_evidence(metric: SelectionMetric) -> None:
    predicted = confuse(np.random.default_rng(4), IMBALANCED, 0.1)
    found = compare_metric(IMBALANCED, predicted, predicted, metric, 0.05, 0)
    assert (found.p_better, found.p_worse) == (1, 1)
    assert (found.low, found.high, found.standard_error) == (0, 0, 0)


def test_images_of_a_group_are_resampled_together() -> None:
    random = np.random.default_rng(5)
    new, old = confuse(random, IMBALANCED, 0.05), confuse(random, IMBALANCED, 0.1)
    pairs = PredictionPairs.count(IMBALANCED, new, old)
    single = np.arange(600).astype(str).astype(object)
    by_image = pairs.gains_by_group("balanced_accuracy", single, 0)
    copies = PredictionPairs.count(*(np.tile(values, 4) for values in (IMBALANCED, new, old)))
    by_group = copies.gains_by_group("balanced_accuracy", np.tile(single, 4), 0)
    assert by_group.std() == pytest.approx(by_image.std())
