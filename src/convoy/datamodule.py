"""The data module: says which steps are due, and takes their images by the batch where they lie."""

from collections.abc import Iterator

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from convoy.batches import Batches, Images
from convoy.recipe import Recipe

TOGETHER = 16  # steps that Lightning is told of at a time: around each time it spends 1 ms
VAL_BATCH = 512  # images
ON_DEVICE = 0.5  # share of the free GPU memory that images may take


class Held:
    """The images of a split, held where they are used: in GPU memory where they fit, else where they are."""

    def __init__(self, images: Images, device: torch.device) -> None:
        self.images = images
        self.device = device
        self.resident: tuple[Tensor, Tensor] | None = None
        if device.type == "cuda" and images.pixels.nbytes < ON_DEVICE * torch.cuda.mem_get_info(device)[0]:
            labels = torch.from_numpy(images.labels).to(device)
            self.resident = torch.from_numpy(np.array(images.pixels)).to(device), labels

    def take(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pixels (N, H, W, C) uint8 and labels (N,) int64 of these rows, on the device; the host waits for nothing."""
        if self.resident is not None:
            index = torch.from_numpy(rows).pin_memory().to(self.device, non_blocking=True)
            pixels, labels = self.resident
            return pixels.index_select(0, index), labels.index_select(0, index)
        taken = torch.from_numpy(np.take(self.images.pixels, rows, axis=0)), torch.from_numpy(self.images.labels[rows])
        if self.device.type == "cpu":
            return taken
        pixels, labels = (part.pin_memory().to(self.device, non_blocking=True) for part in taken)
        return pixels, labels


class ImageData(LightningDataModule):
    """Feeds a training from `train` and `val`, in an order that follows from `seed` and the epoch alone.

    `epoch` and `step` are where the training stands: epochs done, and steps done in the one under way. What the loaders
    hand out are not images but which: the steps of the epoch that are left, some at a time, and rows to validate.
    """

    def __init__(self, train: Images, val: Images, recipe: Recipe, seed: int) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.recipe = recipe
        self.seed = seed
        self.epoch = 0
        self.step = 0
        self.together = TOGETHER
        self.share(torch.device("cpu"), 0, 1)

    def share(self, device: torch.device, rank: int, ranks: int) -> None:
        """Hold the images for `device`, and take the part of `rank` among `ranks` processes that train together."""
        self.rank, self.ranks = rank, ranks
        balanced = self.recipe.balance == "sampler"
        self.batches = Batches(
            self.train.labels, self.recipe.batch_size, self.seed, balanced=balanced, rank=rank, ranks=ranks
        )
        self.order: tuple[int, list[np.ndarray]] = (-1, [])  # an epoch and the rows of its steps
        self.held_train, self.held_val = Held(self.train, device), Held(self.val, device)
        if ranks > 1:
            self.together = 1  # each call then brings the processes' running means level

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return len(self.batches)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The pixels and labels of a step of the epoch under way: this process' part of the batch."""
        if self.order[0] != self.epoch:
            self.order = self.epoch, self.batches.epoch(self.epoch)
        return self.held_train.take(self.order[1][step])

    def train_dataloader(self) -> "Left":
        return Left(self)

    def val_dataloader(self) -> "Rows":
        return Rows(np.arange(self.rank, len(self.val), self.ranks))

    def transfer_batch_to_device(self, batch: object, device: torch.device, dataloader_idx: int) -> object:
        return batch  # only which, not the images


class Left:
    """The steps that are left of the epoch under way, some at a time; where none is, an empty range comes once."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[range]:
        data = self.data
        yield range(data.step, min(data.step + data.together, data.steps))
        for start in range(data.step + data.together, data.steps, data.together):
            yield range(start, min(start + data.together, data.steps))


class Rows:
    """Rows to validate, a batch at a time."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self.rows), VAL_BATCH):
            yield self.rows[start : start + VAL_BATCH]
