"""The batch sampler, whose order of images depends only on the seed and the epoch, and class weights."""

import numpy as np

from convoy.core.errors import ConvoyError


class BatchSampler:
    """Batch sampler whose order depends only on the seed and the epoch, not on any other random numbers.

    Each row occurs at most once in an epoch, unless `balanced` is set. An incomplete last step is dropped, because
    batch norm cannot train on a batch of one image.

    Args:
        labels: Labels (N,) int64 of all images.
        images_per_step: Images per optimizer step, over all processes and accumulated batches; limited to N and rounded
            down to a multiple of `accumulate * world_size`.
        seed: Seed of the order.
        accumulate: Batches per optimizer step.
        balanced: Whether to sample rows with replacement so that all classes are equally frequent on average.
        rank: Index of this process, in [0, world_size). It gets every `world_size`-th row of a step, starting at
            `rank`.
        world_size: Number of processes that train together.

    Raises:
        ConvoyError: If a step has too few images for a batch in each process.
    """

    def __init__(
        self,
        labels: np.ndarray,
        images_per_step: int,
        seed: int,
        *,
        accumulate: int = 1,
        balanced: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.labels = labels
        images = min(images_per_step, len(labels))
        # Images of a batch in one process.
        self.batch_size = images // (accumulate * world_size)
        if not self.batch_size:
            raise ConvoyError(
                f"{images} images per step can't be divided among {world_size} processes with "
                f"accumulate_grad_batches={accumulate}: raise batch_size, or lower accumulate_grad_batches"
            )
        self.images_per_step = self.batch_size * accumulate * world_size
        self.accumulate = accumulate
        self.seed = seed
        self.balanced = balanced
        self.rank = rank
        self.world_size = world_size

    @property
    def steps(self) -> int:
        """Number of optimizer steps in an epoch."""
        return len(self.labels) // self.images_per_step

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self.steps * self.accumulate

    def draw_epoch(self, epoch: int) -> np.ndarray:
        """Return the rows of this process for each batch of an epoch.

        Args:
            epoch: Index of the epoch, from 0.

        Returns:
            Row indices (batches, batch_size) int64.
        """
        random = np.random.default_rng([self.seed, epoch])
        if self.balanced:
            probabilities = 1 / np.bincount(self.labels)[self.labels]
            order = random.choice(len(self.labels), len(self.labels), p=probabilities / probabilities.sum())
        else:
            order = random.permutation(len(self.labels))
        steps = order[: self.steps * self.images_per_step].reshape(self.steps, self.images_per_step)
        return np.ascontiguousarray(steps[:, self.rank :: self.world_size]).reshape(-1, self.batch_size)


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
