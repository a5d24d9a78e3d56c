"""The selection metrics: they are those of scikit-learn, for any shape of counts."""

import numpy as np
import pytest
from sklearn import metrics

from convoy.core.selection_metric import selection_score


@pytest.mark.parametrize("classes", [2, 5, 40])
def test_selection_metrics_equal_those_of_scikit_learn(classes: int) -> None:
    random = np.random.default_rng(classes)
    actual, predicted = random.integers(0, classes, (2, 300)) // random.integers(1, 4, 300)
    counts = [np.bincount(values, minlength=classes) for values in (actual[actual == predicted], actual, predicted)]
    assert selection_score("accuracy", *counts) == pytest.approx(metrics.accuracy_score(actual, predicted))
    assert selection_score("macro_f1", *counts) == pytest.approx(metrics.f1_score(actual, predicted, average="macro"))
    present = np.unique(actual)
    recall = metrics.recall_score(actual, predicted, labels=present, average="macro")
    assert selection_score("balanced_accuracy", *counts) == pytest.approx(recall)


def test_class_without_images_does_not_count() -> None:
    hits, actual, predicted = [3, 0], [4, 0], [4, 0]
    assert selection_score("balanced_accuracy", hits, actual, predicted) == 0.75
    assert selection_score("macro_f1", hits, actual, predicted) == 0.75
    # A class that is predicted without being there costs precision.
    assert selection_score("macro_f1", hits, actual, [3, 1]) == pytest.approx(3 / 7)


def test_many_counts_are_scored_at_once() -> None:
    hits = np.array([[1, 2], [0, 2]])
    assert selection_score("balanced_accuracy", hits, np.array([1, 4]), hits).tolist() == [0.75, 0.25]


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "macro_f1"])
def test_metric_of_no_images_is_nan(metric: str) -> None:
    assert np.isnan(selection_score(metric, *np.zeros((3, 2))))  # type: ignore[arg-type]
