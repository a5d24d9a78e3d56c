"""The metric by which epochs, architectures and champions are compared, computed from counts of images."""

import numpy as np

from convoy.core.config import SelectionMetric


def selection_score(metric: SelectionMetric, hits: np.ndarray, actual: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Compute a metric from the counts of images of each class.

    `balanced_accuracy` and `macro_f1` are means over the classes that occur: classes with images, and for `macro_f1`
    also classes that are predicted.

    Args:
        metric: The metric.
        hits: (..., K) number of images of each class that are classified correctly.
        actual: (..., K) number of images of each class.
        predicted: (..., K) number of images predicted as each class.

    Returns:
        (...) values in [0, 1], NaN if there are no images.
    """
    hits, actual, predicted = (np.asarray(counts, float) for counts in (hits, actual, predicted))
    if metric == "accuracy":
        with np.errstate(invalid="ignore"):
            return hits.sum(axis=-1) / actual.sum(axis=-1)
    numerator, denominator = (hits, actual) if metric == "balanced_accuracy" else (2 * hits, actual + predicted)
    occurs = denominator > 0
    rates = np.divide(numerator, denominator, out=np.zeros(np.broadcast_shapes(hits.shape, occurs.shape)), where=occurs)
    with np.errstate(invalid="ignore"):
        return rates.sum(axis=-1) / occurs.sum(axis=-1)
