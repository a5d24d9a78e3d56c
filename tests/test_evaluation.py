"""Evaluation: figures that a reader can check by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from convoy.evaluation import per_class, predictions, scores

LABELS = np.array([0, 0, 0, 1])
PROBABILITIES = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])


def test_the_scores_are_what_a_hand_counts() -> None:
    figures = scores(LABELS, PROBABILITIES)
    assert figures["accuracy"] == pytest.approx(3 / 4)
    assert figures["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert figures["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert figures["log_loss"] == pytest.approx(-sum(map(math.log, (0.9, 0.8, 0.4, 0.7))) / 4)


def test_a_class_that_is_never_predicted_counts_as_zero() -> None:
    always_first = np.array([[0.9, 0.1]] * 4)
    assert scores(LABELS, always_first)["macro_f1"] == pytest.approx((6 / 7 + 0) / 2)
    assert list(per_class(["cat", "dog"], LABELS, always_first)["f1"]) == pytest.approx([6 / 7, 0])


def test_each_class_has_its_images_precision_recall_and_f1() -> None:
    table = per_class(["cat", "dog"], LABELS, PROBABILITIES)
    assert list(table["class"]) == ["cat", "dog"]
    assert list(table["images"]) == [3, 1]
    assert list(table["precision"]) == pytest.approx([1, 1 / 2])
    assert list(table["recall"]) == pytest.approx([2 / 3, 1])


def test_the_predictions_of_each_image_stand_beside_its_hash_and_its_actual_class() -> None:
    images = pd.DataFrame({"sha256": ["a", "b", "c", "d"], "label": ["cat", "cat", "cat", "dog"]}, index=[7, 8, 9, 10])
    table = predictions(["cat", "dog"], images, PROBABILITIES)
    assert list(table.columns) == ["sha256", "actual", "predicted", "probability_cat", "probability_dog"]
    assert list(table["sha256"]) == ["a", "b", "c", "d"]
    assert list(table["predicted"]) == ["cat", "cat", "dog", "dog"]
    assert (table[["probability_cat", "probability_dog"]].to_numpy() == PROBABILITIES).all()
