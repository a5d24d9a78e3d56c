"""Probable label errors: planted ones are found, and hardly any label that is right is doubted."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from convoy.reporting.label_errors import find_label_errors


def test_most_of_30_planted_wrong_labels_are_found() -> None:
    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels / 16
    held_out = np.arange(len(labels)) % 3 == 0  # 599 images
    model = LogisticRegression(max_iter=200).fit(pixels[~held_out], labels[~held_out])
    actual = labels[held_out]
    planted = np.random.default_rng(0).choice(len(actual), 30, replace=False)
    given = actual.copy()
    given[planted] = (given[planted] + 1 + planted % 9) % 10
    found = find_label_errors(given, model.predict_proba(pixels[held_out]))
    first = found.head(30)
    assert len(set(planted) & set(found["row"])) >= 15
    assert len(set(planted) & set(first["row"])) >= 24, "the most probable come first"
    suggested = dict(zip(found["row"], found["suggested"], strict=True))
    hits = [actual[row] == suggested[row] for row in planted if row in suggested]
    assert np.mean(hits) > 0.9


def test_labels_that_fit_the_probabilities_are_not_doubted() -> None:
    labels = np.array([0, 1, 2, 0])
    assert find_label_errors(labels, np.eye(3)[labels] * 0.8 + 0.2 / 3).empty
    # No image has class 1 or 2, so nothing says how confident a prediction of them must be.
    assert find_label_errors(np.zeros(3, int), np.full((3, 3), 1 / 3)).empty


def test_less_probable_class_is_not_suggested() -> None:
    # 0.3 is confident for class 1, whose only image has 0.2, and 0.7 is not for class 0.
    probabilities = np.array([[0.7, 0.3], [1.0, 0.0], [0.8, 0.2]])
    assert find_label_errors(np.array([0, 0, 1]), probabilities).empty
