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
    """`pixels` (N, H, W, C) uint8 with random changes, drawn from torch's global generator on the host.

    The tensor given stays as it is, and nothing is read back from its device.
    """
    count = len(pixels)
    if params.shift:
        down, right = torch.randint(-params.shift, params.shift + 1, (2, count, 1))
        pixels = move(pixels, params.shift, down, right)
    if params.flip:
        image = torch.arange(count) + count * (torch.rand(count) < 0.5)
        both = torch.cat([pixels, pixels.flip(2)])
        pixels = both.index_select(0, image.to(pixels.device, non_blocking=True))
    return pixels


def move(pixels: Tensor, shift: int, down: Tensor, right: Tensor) -> Tensor:
    """Each image as seen from `down` and `right` of it, on the host, (N, 1) pixels in -shift..shift."""
    count, height, width, channels = pixels.shape
    wide = torch.cat([pixels[:, :, :1]] * shift + [pixels] + [pixels[:, :, -1:]] * shift, dim=2)
    # A row of the result lies in `wide` in one piece, so whole rows are copied: an index of every pixel takes
    # four times as long.
    pieces = wide.flatten().unfold(0, width * channels, channels)  # (N * H * (W + 2 * shift) - W + 1, W * C)
    row = (torch.arange(height) + down).clamp(0, height - 1) + height * torch.arange(count)[:, None]  # (N, H)
    piece = row * (width + 2 * shift) + shift + right
    return pieces.index_select(0, piece.flatten().to(pixels.device, non_blocking=True)).view(pixels.shape)


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
        return torch.from_numpy(np.take(self.pixels, rows, axis=0)), torch.from_numpy(self.labels[rows])


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
