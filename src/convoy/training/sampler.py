"""The batch sampler, whose order of images depends only on the seed and the epoch, and class weights."""

import numpy as np

from convoy.core.errors import ConvoyError


class BatchSampler:
    """Batch sampler whose order depends only on the seed and the epoch, not on any other random numbers.

    Each row occurs at most once in an epoch, unless `balanced` is set. An incomplete last batch is dropped, because
    batch norm cannot train on a batch of one image.

    Args:
        labels: Labels (N,) int64 of all images.
        batch_size: Images per optimizer step, over all processes; limited to N and rounded down to a multiple of
            `world_size`.
        seed: Seed of the order.
        balanced: Whether to sample rows with replacement so that all classes are equally frequent on average.
        rank: Index of this process, in [0, world_size). It gets every `world_size`-th row of a batch, starting at
            `rank`.
        world_size: Number of processes that train together.

    Raises:
        ConvoyError: If a batch has fewer images than there are processes.
    """

    def __init__(
        self,
        labels: np.ndarray,
        batch_size: int,
        seed: int,
        *,
        balanced: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.labels = labels
        self.batch_size = min(batch_size, len(labels)) // world_size * world_size
        if not self.batch_size:
            raise ConvoyError(f"{world_size} processes can't share a batch of {min(batch_size, len(labels))} images")
        self.seed = seed
        self.balanced = balanced
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        return len(self.labels) // self.batch_size

    def draw_epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the rows of this process for each step of an epoch.

        Args:
            epoch: Index of the epoch, from 0.

        Returns:
            One array (batch_size / world_size,) int64 of row indices per step.
        """
        random = np.random.default_rng([self.seed, epoch])
        if self.balanced:
            probabilities = 1 / np.bincount(self.labels)[self.labels]
            order = random.choice(len(self.labels), len(self.labels), p=probabilities / probabilities.sum())
        else:
            order = random.permutation(len(self.labels))
        complete = order[: len(self) * self.batch_size].reshape(len(self), self.batch_size)
        return list(np.ascontiguousarray(complete[:, self.rank :: self.world_size]))


def compute_class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """Compute class weights that are inversely proportional to the class frequencies.

    Args:
        labels: Labels (N,) int64.
        classes: Number of classes K.

    Returns:
        Weights (K,) float64 whose mean over the images is 1; the weight of a class without images is 0.
    """
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    weights = np.zeros(classes)
    weights[present] = len(labels) / (present.sum() * counts[present])
    return weights
