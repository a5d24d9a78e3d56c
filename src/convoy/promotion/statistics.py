"""Statistical tests and intervals for two models that were evaluated on the same images.

A win is an image that only the challenger classifies correctly, a loss one that only the champion does. Wins and losses
may be integers or arrays of any shape.
"""

import numpy as np
from scipy import sparse

# `scipy.stats` would have the same functions, but takes a second to import.
from scipy.special import bdtrc, ndtri

from convoy.evaluation.bootstrap import bootstrap_sums, resampling_units

# Power at which `detectable_gain` reports the smallest gain.
POWER = 0.8


def mcnemar_p_value(wins: np.ndarray | int, losses: np.ndarray | int) -> np.ndarray:
    """Return the p-value of McNemar's exact one-sided test (1947) that the challenger is better.

    Args:
        wins: Number of wins.
        losses: Number of losses.

    Returns:
        The probability of at least this many wins if both models were equally good.
    """
    return bdtrc(np.asarray(wins) - 1, np.asarray(wins) + losses, 0.5)


def gain_lower_bound(
    wins: np.ndarray | int, losses: np.ndarray | int, images: np.ndarray | int, alpha: float
) -> np.ndarray:
    """Return a lower confidence bound of the challenger's gain in accuracy, by Tango's score interval (1998).

    The interval is also valid for few discordant pairs, or none. The upper bound is
    `-gain_lower_bound(losses, wins, images, alpha)`.

    Args:
        wins: Number of wins.
        losses: Number of losses.
        images: Number of all test images.
        alpha: One minus the confidence of this one-sided bound.

    Returns:
        The bound, in [-1, 1].
    """
    wins, losses, images = np.broadcast_arrays(*(np.asarray(n, float) for n in (wins, losses, images)))
    limit = ndtri(1 - alpha)
    low, high = np.full(wins.shape, -1.0), (wins - losses) / images
    # If all images are wins or all are losses, the score is 0 / 0 = NaN. The comparison is then false, so `high` moves.
    with np.errstate(invalid="ignore", divide="ignore"):
        for _ in range(50):
            middle = (low + high) / 2
            b = (2 * images - wins + losses) * middle - wins - losses
            spread = middle * (1 - middle)
            # Maximum likelihood estimate of the fraction of losses, given a gain of `middle`.
            lost = (np.sqrt(b**2 + 8 * images * losses * spread) - b) / (4 * images)
            score = (wins - losses - images * middle) / np.sqrt(images * (2 * lost + spread))
            low, high = np.where(score > limit, middle, low), np.where(score > limit, high, middle)
    return low


def is_better(wins: np.ndarray | int, losses: np.ndarray | int, alpha: float) -> np.ndarray:
    """Return whether the challenger is significantly better."""
    return mcnemar_p_value(wins, losses) < alpha


def is_non_inferior(
    wins: np.ndarray | int, losses: np.ndarray | int, images: np.ndarray | int, alpha: float, margin: float
) -> np.ndarray:
    """Return whether the challenger is non-inferior.

    The lower bound of its gain in accuracy must be above `-margin`, and it must have at least as many wins as losses.
    """
    return (gain_lower_bound(wins, losses, images, alpha) > -margin) & (np.asarray(wins) >= losses)


def detectable_gain(standard_error: float, alpha: float) -> float:
    """Return the smallest gain that a one-sided test would detect with a probability of `POWER`.

    At `alpha=0.05` it is about 2.5 standard errors. The standard error of a gain in accuracy is
    `sqrt(disagreement / images)`, with the fraction of images that only one of the two models classifies correctly.

    Args:
        standard_error: Standard error of the gain of two equally good models.
        alpha: Significance level of the test.
    """
    return float((ndtri(1 - alpha) + ndtri(POWER)) * standard_error)


def bootstrap_mean(values: np.ndarray, groups: np.ndarray | None, alpha: float, seed: int) -> tuple[float, float]:
    """Return bootstrap bounds of a mean (percentile method, Efron and Tibshirani 1993).

    Args:
        values: (N,) value of each image.
        groups: (N,) group names of the images. If given, complete groups are resampled instead of single images.
        alpha: One minus the confidence of each of the two bounds.
        seed: Seed of the resampling.

    Returns:
        The lower and the upper bound.
    """
    columns = sparse.csr_array(np.stack([values, np.ones(len(values))], axis=1))
    sums, sizes = bootstrap_sums(columns, resampling_units(groups, len(values)), seed).T
    low, high = np.quantile(sums / sizes, [alpha, 1 - alpha])
    return float(low), float(high)
