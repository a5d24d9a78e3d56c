"""The lists of images that are worth a look."""

import numpy as np

from convoy.reporting.evaluated_images import Images, list_mistakes


def test_every_mistake_is_listed_the_most_confident_first() -> None:
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7]])
    images = Images(np.zeros((4, 8, 8, 1), np.uint8), list("abcd"), np.array([0, 0, 0, 1]), probabilities)
    assert list_mistakes(["cat", "dog"], images).to_dict("records") == [
        {"path": "c", "label": "cat", "predicted": "dog", "probability": 0.8},
        {"path": "b", "label": "cat", "predicted": "dog", "probability": 0.6},
    ]
