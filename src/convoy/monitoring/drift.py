"""Two-sample test of drift: whether new images come from the distribution of the reference images.

The test compares embeddings by their energy distance (Székely & Rizzo 2013) and permutes which images are new, so that
it holds for any distribution and any number of images. It takes images as independent of each other: many frames of
one film, or many images of one patient, are not.
"""

import dataclasses

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import permutation_test

from convoy.core.errors import ConvoyError

PERMUTATIONS = 1_999
# More images are reduced to a random sample of this size. Beyond it, differences that matter to nobody become
# significant, and the distances of all pairs take more than 32 MB.
MAX_IMAGES = 1_000
MIN_IMAGES = 20
# An image is as unusual as its distance to this one of the nearest reference images.
NEIGHBOUR = 5


@dataclasses.dataclass(frozen=True)
class Drift:
    """The result of the test."""

    p_value: float  # probability of such a distance, or a larger one, if there is no drift
    effect: float  # 0: the same distribution; 1: each image is nearer to all of its own sample than to any other
    unusualness: np.ndarray  # (M,) distance of each new image to the reference, 1 being usual within the reference

    def describe(self, alpha: float) -> str:
        """Describe the result beside the probability of a false alarm."""
        sign = "at most" if self.p_value <= alpha else "above"
        return f"p = {self.p_value:.4g}, {sign} alpha = {alpha:g}; effect {self.effect:.3f}"


def sample_rows(count: int, seed: int) -> np.ndarray:
    """Return which of `count` images take part in the test, in ascending order."""
    if count <= MAX_IMAGES:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, MAX_IMAGES, replace=False))


def detect_drift(reference: np.ndarray, new: np.ndarray, seed: int) -> Drift:
    """Test whether the embeddings of new images have the distribution of those of reference images.

    Args:
        reference: (N, D) embeddings of reference images.
        new: (M, D) embeddings of new images.
        seed: Seed of the permutations.

    Raises:
        ConvoyError: If there are fewer than `MIN_IMAGES` of either.
    """
    for name, images in (("new", new), ("reference", reference)):
        if len(images) < MIN_IMAGES:
            raise ConvoyError(f"{len(images)} {name} images are too few for a test: it needs {MIN_IMAGES} or more")
    pooled = np.concatenate([new, reference]).astype(np.float64)
    distances = cdist(pooled, pooled)

    def energy(new_rows: np.ndarray, other_rows: np.ndarray, axis: int) -> np.ndarray:
        # Twice the mean distance between the samples, less the mean distance within each, is a quadratic form.
        weights = np.full((*new_rows.shape[:-1], len(pooled)), -1 / other_rows.shape[axis])
        np.put_along_axis(weights, new_rows, 1 / new_rows.shape[axis], axis=-1)
        return -((weights @ distances) * weights).sum(axis=-1)

    rows = np.split(np.arange(len(pooled)), [len(new)])
    found = permutation_test(
        rows, energy, vectorized=True, n_resamples=PERMUTATIONS, batch=500, alternative="greater", rng=seed
    )
    # Two samples of one distribution differ by chance: the effect is what exceeds it.
    excess = found.statistic - found.null_distribution.mean()
    between = distances[: len(new), len(new) :]
    effect = excess / (2 * between.mean()) if between.any() else 0.0
    return Drift(float(found.pvalue), max(0.0, float(effect)), measure_unusualness(distances, len(new)))


def measure_unusualness(distances: np.ndarray, new: int) -> np.ndarray:
    """Return how far each new image is from the reference, as a multiple of what is usual within the reference.

    Args:
        distances: (M + N, M + N) distances of all pairs, of which the new images come first.
        new: M, the number of new images.
    """
    nearest = np.sort(distances[:, new:], axis=1)
    # The nearest reference image of a reference image is itself.
    usual = np.median(nearest[new:, NEIGHBOUR])
    return nearest[:new, NEIGHBOUR - 1] / max(usual, 1e-12)
