"""Bootstrap resampling of images, or of groups of images, and confidence intervals from it."""

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import ndtri

# Probability that an interval does not contain the true value.
ALPHA = 0.05
QUANTILES = (ALPHA / 2, 1 - ALPHA / 2)
RESAMPLES = 2000
# Random numbers drawn at a time, chosen so that they stay in the processor's cache.
BLOCK_SIZE = 2**18


def bootstrap_sums(columns: sparse.csr_array, units: sparse.csr_array | None, seed: int = 0) -> np.ndarray:
    """Return bootstrap sums of columns over resampled images, or over resampled groups of images.

    Args:
        columns: (N, M) values of each image.
        units: (U, N) membership of images in groups, as from `resampling_units`. `None` resamples single images.
        seed: Seed of the resampling.

    Returns:
        (RESAMPLES, M) sums, each over as many draws as there are images or groups.
    """
    per_unit = (columns if units is None else units @ columns).T.tocsr()
    count = per_unit.shape[1]
    random = np.random.default_rng(seed)
    sums = np.empty((RESAMPLES, per_unit.shape[0]))
    step = max(1, BLOCK_SIZE // count)
    for start in range(0, RESAMPLES, step):
        rounds = min(step, RESAMPLES - start)
        drawn = random.integers(0, count, (rounds, count)) * rounds + np.arange(rounds)[:, None]
        # How often each unit is drawn in each resample.
        times = np.bincount(drawn.ravel(), minlength=count * rounds).reshape(count, rounds)
        sums[start : start + rounds] = (per_unit @ times.astype(float)).T
    return sums


def resampling_units(groups: np.ndarray | pd.Series | None, count: int) -> sparse.csr_array | None:
    """Return a (U, N) matrix that assigns each image to its group, or `None` if every image is its own group.

    Args:
        groups: (N,) group names; an image with an empty name becomes a group of its own.
        count: Number of images N.
    """
    if groups is None:
        return None
    names = np.asarray(groups, object)
    codes = pd.factorize(names)[0]
    is_single = names == ""
    codes[is_single] = count + np.arange(is_single.sum())
    codes = np.unique(codes, return_inverse=True)[1]
    units = codes.max(initial=-1) + 1
    return sparse.csr_array((np.ones(count), (codes, np.arange(count))), (units, count)) if units < count else None


def effective_counts(values: sparse.csr_array, units: sparse.csr_array | None) -> np.ndarray:
    """Return the effective number of images if all images of a group carried the same information (Kish 1965)."""
    sums = values if units is None else units @ values
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.asarray(sums.sum(axis=0)) ** 2 / np.asarray(sums.power(2).sum(axis=0)))


def confidence_interval(
    value: np.ndarray, resampled: np.ndarray, count: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper bounds of values (...), from R resamples (R, ...) of each.

    If the bounds are equal, for example because every image is correct, the resamples carry no information. The
    interval is then Wilson's (1927) for a proportion in `count` images.
    """
    resampled = np.where(np.isnan(resampled).all(axis=0), 0.0, resampled)
    low, high = np.nanquantile(resampled, QUANTILES, axis=0)
    square = ndtri(QUANTILES[1]) ** 2
    middle = (count * value + square / 2) / (count + square)
    margin = np.sqrt(square * (count * value * (1 - value) + square / 4)) / (count + square)
    flat = low == high
    low = np.where(flat, np.maximum(middle - margin, 0), low)
    high = np.where(flat, np.minimum(middle + margin, 1), high)
    return np.minimum(low, value), np.maximum(high, value)
