"""The data module: whole batches of uint8 images, in an order that follows from the seed and the epoch alone."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler

from convoy.config import Whole, schema


@schema
class Augment:
    """Random changes to training images that leave their label true."""

    shift: Whole  # pixels: moved by up to this far each way, the edge repeated into the gap
    flip: bool  # left to right, every second image; not for digits or letters


def augment(pixels: Tensor, params: Augment) -> Tensor:
    """A changed copy of `pixels` (N, H, W, C) uint8, drawn from torch's global generator on the host."""
    count, height, width, _ = pixels.shape
    rows = torch.arange(height, device=pixels.device).expand(count, height)
    columns = torch.arange(width, device=pixels.device).expand(count, width)
    if params.shift:
        down, right = torch.randint(-params.shift, params.shift + 1, (2, count, 1)).to(pixels.device)
        rows, columns = (rows + down).clamp(0, height - 1), (columns + right).clamp(0, width - 1)
    if params.flip:
        flipped = (torch.rand(count, 1) < 0.5).to(pixels.device)
        columns = torch.where(flipped, columns.flip(1), columns)
    images = torch.arange(count, device=pixels.device)
    return pixels[images[:, None, None], rows[:, :, None], columns[:, None, :]]


class Images(Dataset):
    """One split: pixels (N, H, W, C) uint8 and labels (N,) int64, fetched by the batch: `images[[3, 1, 4]]`."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels = pixels
        self.labels = labels

    @classmethod
    def load(cls, folder: Path, split: str) -> "Images":
        """The split that preprocessing wrote into `folder`; its pixels stay on disk until they are asked for."""
        pixels = np.load(folder / f"{split}_pixels.npy", mmap_mode="r")
        return cls(pixels, np.load(folder / f"{split}_labels.npy"))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.pixels[rows]), torch.from_numpy(self.labels[rows])


class ShuffledBatches(Sampler[list[int]]):
    """Rows by the batch, in an order that is a function of (seed, epoch), whatever else has drawn random numbers.

    The last batch is left out where it is not full: batch norm can't train on a batch of one.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count = count
        self.batch_size = min(batch_size, count)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        for batch in range(len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size].tolist()


class ImageData(LightningDataModule):
    """Feeds a classifier from arrays that may be memory maps: `train` and `val` as (pixels, labels)."""

    def __init__(self, train: Images, val: Images, batch_size: int, augment: Augment, seed: int) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.batch_size = batch_size
        self.augment = augment
        self.seed = seed

    def train_dataloader(self) -> DataLoader:
        # batch_size=None: the sampler hands out whole batches, and the loader passes each on as it is
        batches = ShuffledBatches(len(self.train), self.batch_size, self.seed)
        return DataLoader(self.train, sampler=batches, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        batches = BatchSampler(SequentialSampler(self.val), 512, drop_last=False)
        return DataLoader(self.val, sampler=batches, batch_size=None)

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        pixels, labels = batch
        if self.trainer is not None and self.trainer.training:
            pixels = augment(pixels, self.augment)
        return pixels, labels
