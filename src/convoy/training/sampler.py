"""Batches: which images an optimizer step sees, in an order that follows from the seed and the epoch alone."""

import numpy as np

from convoy.errors import ConvoyError


class Batches:
    """The rows of each optimizer step: a function of (seed, epoch), whatever else has drawn random numbers.

    Every row comes at most once in an epoch; with `balanced`, rows are drawn anew, each class as often as any other.
    The last batch is left out where it is not full: batch norm can't train on a batch of one. Of `ranks` processes
    that train together, each takes every `ranks`-th row of a batch, from its `rank` on.
    """

    def __init__(
        self, labels: np.ndarray, batch_size: int, seed: int, *, balanced: bool = False, rank: int = 0, ranks: int = 1
    ) -> None:
        self.labels = labels
        self.batch_size = min(batch_size, len(labels)) // ranks * ranks
        if not self.batch_size:
            raise ConvoyError(f"{ranks} processes can't share a batch of {min(batch_size, len(labels))} images")
        self.seed = seed
        self.balanced = balanced
        self.rank = rank
        self.ranks = ranks

    def __len__(self) -> int:
        """Steps in an epoch."""
        return len(self.labels) // self.batch_size

    def epoch(self, number: int) -> list[np.ndarray]:
        """The rows of each step of epoch `number`, from 0: (batch_size / ranks,) int64 each."""
        random = np.random.default_rng([self.seed, number])
        if self.balanced:
            shares = 1 / np.bincount(self.labels)[self.labels]
            order = random.choice(len(self.labels), len(self.labels), p=shares / shares.sum())
        else:
            order = random.permutation(len(self.labels))
        whole = order[: len(self) * self.batch_size].reshape(len(self), self.batch_size)
        return list(np.ascontiguousarray(whole[:, self.rank :: self.ranks]))


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """A weight for each class (K,), 1 on average over the images, inversely as frequent as the class; 0 if absent."""
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    weights = np.zeros(classes)
    weights[present] = len(labels) / (present.sum() * counts[present])
    return weights
