"""The Lightning data module, whose loaders yield whole batches and resume at any of them."""

from collections.abc import Iterator

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from convoy.data.packed.arrays import Images
from convoy.recipe import RecipeConfig
from convoy.training.augmentation import flip
from convoy.training.image_store import ImageStore
from convoy.training.sampler import BatchSampler

# Largest validation batch. Without gradients, twice as many images as in training need less memory than in training.
MAX_VAL_BATCH_SIZE = 512  # images
# Number of batches that images are prefetched ahead of their use.
PREFETCH_BATCHES = 2

Batch = tuple[Tensor, Tensor]  # pixels (N, H, W, C) uint8 and labels (N,) int64


class TrainLoader:
    """Loader of this process's training batches, whose order depends only on the seed and the epoch.

    Args:
        store: Training images.
        sampler: Order of the images.
        alternate_flips: Whether to flip each image in every second epoch, half of the images in the first (Jordan 2024,
            arXiv:2404.00498). In two epochs, a network then sees both sides of each image, which random flips would
            show only half of the time.
    """

    def __init__(self, store: ImageStore, sampler: BatchSampler, *, alternate_flips: bool = False) -> None:
        self.store = store
        self.sampler = sampler
        self.flipped_first = draw_halves(len(store.images), sampler.seed) if alternate_flips else None
        self.epoch = 0
        # Batches of the epoch that were yielded.
        self.position = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        # Lightning takes `len(self)` batches and no more, so the code behind the last `yield` would never run.
        if self.position == len(self):
            self.epoch, self.position = self.epoch + 1, 0
        batches = self.sampler.draw_epoch(self.epoch)
        for number in range(self.position, len(batches)):
            for later in batches[number + PREFETCH_BATCHES : number + PREFETCH_BATCHES + 1]:
                self.store.prefetch(later)
            self.position = number + 1
            pixels, labels = self.store.gather(batches[number])
            if self.flipped_first is not None:
                pixels = flip(pixels, self.flipped_first[batches[number]] ^ bool(self.epoch % 2))
            yield pixels, labels

    def state_dict(self) -> dict[str, int]:
        """Return the position in the data."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position that `state_dict` returned."""
        self.epoch, self.position = state["epoch"], state["position"]


def draw_halves(count: int, seed: int) -> Tensor:
    """Draw a mask (count,) bool of about half of the images."""
    return torch.from_numpy(np.random.default_rng([seed, count]).random(count) < 0.5)


class ValLoader:
    """Loader of this process's validation batches.

    Args:
        store: Validation images.
        batch_size: Largest number of images in a batch.
        rank: Index of this process, in [0, world_size). It gets every `world_size`-th image, starting at `rank`.
        world_size: Number of processes that train together.
    """

    def __init__(self, store: ImageStore, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.store = store
        rows = np.arange(rank, len(store.images), world_size)
        # One batch at least, possibly empty, because all processes have to validate.
        self.batches = np.split(rows, range(batch_size, len(rows), batch_size))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        yield from map(self.store.gather, self.batches)


class ImageDataModule(LightningDataModule):
    """Lightning data module of the training and validation images of a classifier.

    Args:
        train: Images to train on.
        val: Images to validate on.
        recipe: Training settings of the architecture.
        seed: Seed of the order of the training images.
    """

    def __init__(self, train: Images, val: Images, recipe: RecipeConfig, seed: int) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.recipe = recipe
        self.seed = seed

    def setup(self, stage: str = "fit") -> None:
        """Place the images for the device, and select this process's part of each batch."""
        trainer = self.trainer
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        sampler = BatchSampler(
            self.train.labels,
            self.recipe.batch_size,
            self.seed,
            accumulate=self.recipe.accumulate_grad_batches,
            balanced=self.recipe.class_balance == "sampler",
            rank=rank,
            world_size=world_size,
        )
        alternate_flips = self.recipe.augment.hflip == "alternate"
        self.train_loader = TrainLoader(
            ImageStore(self.train, device, shuffled=True), sampler, alternate_flips=alternate_flips
        )
        val_batch_size = min(MAX_VAL_BATCH_SIZE, 2 * sampler.batch_size)
        self.val_loader = ValLoader(ImageStore(self.val, device), val_batch_size, rank, world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps in an epoch."""
        return self.train_loader.sampler.steps

    def train_dataloader(self) -> TrainLoader:
        """Return the loader of the training batches."""
        return self.train_loader

    def val_dataloader(self) -> ValLoader:
        """Return the loader of the validation batches."""
        return self.val_loader

    # Lightning restores the state of a loader only from checkpoints within an epoch, that of a data module always.

    def state_dict(self) -> dict[str, int]:
        """Return the position in the training data."""
        return self.train_loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position in the training data."""
        self.train_loader.load_state_dict(state)
