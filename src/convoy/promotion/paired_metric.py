"""The difference of a metric between two models on the same images, with its tests and confidence bounds.

For `accuracy` these are McNemar's exact test and Tango's interval. In `balanced_accuracy` and `macro_f1` an image of a
rare class counts more than one of a frequent class, so they have tests of their own: a paired permutation test (Good
2005), which swaps the predictions of the two models for random images, and a bootstrap within each class.
"""

import dataclasses
from collections.abc import Callable
from typing import Self

import numpy as np
import pandas as pd
from scipy import sparse

from convoy.core.config import SelectionMetric
from convoy.core.selection_metric import selection_score
from convoy.evaluation.bootstrap import RESAMPLES, bootstrap_sums, resampling_units
from convoy.promotion.statistics import gain_lower_bound, mcnemar_p_value

# With these, the Monte Carlo error of a p-value of 0.05 is 0.002.
PERMUTATIONS = 10_000
# Permutations or resamples at a time, which limits the memory use.
BLOCK_SIZE = 1_000


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """A metric of a new and of an old model on the same images, and how certain their difference is."""

    metric: SelectionMetric
    new: float  # metric of the new model, in [0, 1]
    old: float  # metric of the old model, in [0, 1]
    wins: int  # images that only the new model classifies correctly
    losses: int  # images that only the old model classifies correctly
    p_better: float  # p-value of the one-sided test that the new model is better
    p_worse: float  # p-value of the one-sided test that the new model is worse
    low: float  # lower bound of the gain
    high: float  # upper bound of the gain
    standard_error: float  # standard deviation of the gain if both models were equally good

    @property
    def gain(self) -> float:
        """Return the metric of the new model minus that of the old one."""
        return self.new - self.old

    @property
    def test(self) -> str:
        """Return the name of the test that gave the p-values."""
        return "McNemar's test" if self.metric == "accuracy" else "a paired permutation test"

    @property
    def interval(self) -> str:
        """Return the name of the interval that gave the bounds."""
        return "Tango's interval" if self.metric == "accuracy" else "a bootstrap within each class"

    def describe(self) -> str:
        """Return the evidence in a few words, such as "30 images won, 5 lost"."""
        won = f"{self.wins} images won, {self.losses} lost"
        return won if self.metric == "accuracy" else f"{self.new:.4f} against {self.old:.4f}, {won}"


@dataclasses.dataclass(frozen=True)
class PredictionPairs:
    """Images counted by their actual class and the predictions of two models.

    Images of the same kind are interchangeable in every metric, so that a resample needs one random number for each
    kind rather than for each image.
    """

    kind: np.ndarray  # (N,) kind of each image, in [0, T)
    images: np.ndarray  # (T,) number of images of each kind
    actual: sparse.csr_array  # (T, K) one-hot actual class of each kind
    new: sparse.csr_array  # (T, 2 K) one-hot class that the new model hits, and class that it predicts
    old: sparse.csr_array  # (T, 2 K) the same of the old model

    @classmethod
    def count(cls, actual: np.ndarray, new: np.ndarray, old: np.ndarray) -> Self:
        """Count the images of each kind.

        Args:
            actual: (N,) names of the actual classes.
            new: (N,) names of the classes predicted by the new model.
            old: (N,) names of the classes predicted by the old model.
        """
        codes, names = pd.factorize(np.concatenate([actual, new, old]).astype(object))
        shape = (len(names),) * 3
        kinds = np.ravel_multi_index(tuple(codes.reshape(3, -1)), shape)
        found, kind, images = np.unique(kinds, return_inverse=True, return_counts=True)
        one_hot = sparse.eye_array(len(names), format="csr")
        is_actual, *predicted = (one_hot[each] for each in np.unravel_index(found, shape))
        tables = [sparse.hstack([is_actual.multiply(table), table], format="csr") for table in predicted]
        return cls(kind, images, is_actual, *tables)

    def gains(self, metric: SelectionMetric, images: np.ndarray) -> np.ndarray:
        """Return the gain in a metric, for other numbers (..., T) of images of each kind."""
        actual = images @ self.actual
        return _score(metric, images @ self.new, actual) - _score(metric, images @ self.old, actual)

    def permuted_gains(self, metric: SelectionMetric, seed: int) -> np.ndarray:
        """Return the gains, (PERMUTATIONS,), if each image is randomly assigned one prediction or the other."""
        random, actual = np.random.default_rng(seed), self.images @ self.actual
        both, change = self.images @ (self.new + self.old), self.old - self.new
        differs = abs(change).sum(axis=1) > 0

        def permute(count: int) -> np.ndarray:
            swapped = random.binomial(self.images[differs], 0.5, (count, differs.sum()))
            new = self.images @ self.new + swapped @ change[differs]
            return _score(metric, new, actual) - _score(metric, both - new, actual)

        return _repeat(permute, PERMUTATIONS)

    def resampled_gains(self, metric: SelectionMetric, seed: int) -> np.ndarray:
        """Return bootstrap gains, (RESAMPLES,), for which the images of each class are resampled."""
        random = np.random.default_rng(seed)
        classes = [rows.nonzero()[0] for rows in self.actual.T.astype(bool).toarray() if rows.any()]

        def resample(count: int) -> np.ndarray:
            drawn = np.zeros((count, len(self.images)))
            for rows in classes:
                images = self.images[rows]
                drawn[:, rows] = random.multinomial(images.sum(), images / images.sum(), count)
            return self.gains(metric, drawn)

        return _repeat(resample, RESAMPLES)

    def gains_by_group(self, metric: SelectionMetric, groups: np.ndarray, seed: int) -> np.ndarray:
        """Return bootstrap gains, (RESAMPLES,), for which complete groups (N,) of images are resampled."""
        kinds = sparse.eye_array(len(self.images), format="csr")[self.kind]
        return self.gains(metric, bootstrap_sums(kinds, resampling_units(groups, len(self.kind)), seed))


def compare_metric(
    actual: np.ndarray, new: np.ndarray, old: np.ndarray, metric: SelectionMetric, alpha: float, seed: int
) -> PairedDifference:
    """Compare a metric of two models on the same images.

    Args:
        actual: (N,) names of the actual classes.
        new: (N,) names of the classes predicted by the new model.
        old: (N,) names of the classes predicted by the old model.
        metric: The metric.
        alpha: One minus the confidence of each of the two bounds of the gain.
        seed: The seed of the permutations and of the bootstrap.
    """
    wins = int(((new == actual) & (old != actual)).sum())
    losses = int(((old == actual) & (new != actual)).sum())
    pairs, images = PredictionPairs.count(actual, new, old), len(actual)
    counts = pairs.images @ pairs.actual
    score, old_score = (float(_score(metric, pairs.images @ table, counts)) for table in (pairs.new, pairs.old))
    if metric == "accuracy":
        p_better, p_worse = mcnemar_p_value(wins, losses), mcnemar_p_value(losses, wins)
        low, high = gain_lower_bound(wins, losses, images, alpha), -gain_lower_bound(losses, wins, images, alpha)
        error = np.sqrt(wins + losses) / images
    else:
        gain, permuted = score - old_score, pairs.permuted_gains(metric, seed)
        # Rounding errors must not make equal gains unequal. The observed gain counts as one more permutation.
        p_better, p_worse = (
            (1 + (side * permuted >= side * gain - 1e-12).sum()) / (1 + PERMUTATIONS) for side in (1, -1)
        )
        low, high = np.quantile(pairs.resampled_gains(metric, seed), [alpha, 1 - alpha])
        error = permuted.std()
    return PairedDifference(
        metric=metric,
        new=score,
        old=old_score,
        wins=wins,
        losses=losses,
        p_better=float(p_better),
        p_worse=float(p_worse),
        low=float(low),
        high=float(high),
        standard_error=float(error),
    )


def score_predictions(metric: SelectionMetric, actual: np.ndarray, predicted: np.ndarray) -> float:
    """Return a metric of one model's predictions (N,), given the actual classes (N,), both as names."""
    pairs = PredictionPairs.count(actual, predicted, actual)
    return float(_score(metric, pairs.images @ pairs.new, pairs.images @ pairs.actual))


def _score(metric: SelectionMetric, counts: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Return the metric (...) from counts (..., 2 K) of hits and predictions, and counts (..., K) of images."""
    hits, predicted = np.split(counts, 2, axis=-1)
    return selection_score(metric, hits, actual, predicted)


def _repeat(draw: Callable[[int], np.ndarray], count: int) -> np.ndarray:
    return np.concatenate([draw(min(BLOCK_SIZE, count - start)) for start in range(0, count, BLOCK_SIZE)])
