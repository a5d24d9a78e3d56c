"""The data module: says which steps are due, and takes their images by the batch where they lie."""

import math
import mmap
from collections.abc import Iterator

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from convoy.data.arrays import Images
from convoy.recipe import RecipeConfig
from convoy.training.sampler import Batches

STEPS_PER_CALL = 16  # steps that Lightning is told of at a time: around each time it spends 1 ms
VAL_BATCH = 512  # images at the most; without gradients twice as many as in training come to less memory
UPLOAD_BYTES = 2**26  # bytes that go to a GPU at a time
ON_DEVICE = 0.5  # share of the free GPU memory that images may take
MMAP_PREFETCH_BYTES = 2**30  # bytes of a memory map from which it is read image by image, each ahead of its use
PREFETCH_STEPS = 2  # steps


class ImageStore:
    """The images of a split, held where they are used: in GPU memory where they fit, else where they are.

    A large memory map that is read in another order than it lies in (`shuffled`) is read ahead: with memory for a
    fifth of the images a training is then as fast as with memory for all (benchmarks/README.md).
    """

    def __init__(self, images: Images, device: torch.device, shuffled: bool = False) -> None:
        self.images = images
        self.device = device
        self.resident: tuple[Tensor, Tensor] | None = None
        if device.type == "cuda" and images.pixels.nbytes < ON_DEVICE * torch.cuda.mem_get_info(device)[0]:
            self.resident = uploaded(images.pixels, device), torch.from_numpy(images.labels).to(device)
        self.first = 0  # byte of the file at which the pixels begin
        self.file: mmap.mmap | None = None
        pixels = images.pixels
        large = isinstance(pixels, np.memmap) and pixels.nbytes >= MMAP_PREFETCH_BYTES
        if large and shuffled and self.resident is None and isinstance(pixels.base, mmap.mmap):
            self.file, self.first = pixels.base, pixels.offset
            self.file.madvise(mmap.MADV_RANDOM)  # else what lies beside an image would be read with it

    def expect(self, rows: np.ndarray) -> None:
        """Have these rows read from the disk, if they must be, while the network is at work on others."""
        if self.file is None:
            return
        size = self.images.pixels[0].nbytes
        for start in (self.first + rows * size).tolist():
            page = start - start % mmap.PAGESIZE
            self.file.madvise(mmap.MADV_WILLNEED, page, start + size - page)

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


def uploaded(pixels: np.ndarray, device: torch.device) -> Tensor:
    """All of (N, H, W, C) uint8 on a device, by way of `UPLOAD_BYTES` bytes of the host's memory."""
    there = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    step = max(1, UPLOAD_BYTES // pixels[0].nbytes)
    for start in range(0, len(pixels), step):
        there[start : start + step] = torch.from_numpy(np.array(pixels[start : start + step]))
    return there


class ImageData(LightningDataModule):
    """Feeds a training from `train` and `val`, in an order that follows from `seed` and the epoch alone.

    `epoch` and `step` are where the training stands: epochs done, and steps done in the one under way. What the loaders
    hand out are not images but which: the steps of the epoch that are left, some at a time, and rows to validate.
    """

    def __init__(self, train: Images, val: Images, recipe: RecipeConfig, seed: int) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.recipe = recipe
        self.seed = seed
        self.epoch = 0
        self.step = 0
        self.share(torch.device("cpu"), 0, 1)

    def share(self, device: torch.device, rank: int, ranks: int) -> None:
        """Hold the images for `device`, and take the part of `rank` among `ranks` processes that train together."""
        self.rank, self.ranks = rank, ranks
        balanced = self.recipe.balance == "sampler"
        self.batches = Batches(
            self.train.labels, self.recipe.batch_size, self.seed, balanced=balanced, rank=rank, ranks=ranks
        )
        self.order: tuple[int, list[np.ndarray]] = (-1, [])  # an epoch and the rows of its steps
        self.held_train, self.held_val = ImageStore(self.train, device, shuffled=True), ImageStore(self.val, device)

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return len(self.batches)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The pixels and labels of a step of the epoch under way: this process' part of the batch."""
        if self.order[0] != self.epoch:
            self.order = self.epoch, self.batches.epoch(self.epoch)
        _, rows = self.order
        for later in rows[step + PREFETCH_STEPS : step + PREFETCH_STEPS + 1]:
            self.held_train.expect(later)
        return self.held_train.take(rows[step])

    @property
    def piece(self) -> int:
        """Images that this process computes the gradient of at a time."""
        return math.ceil(self.batches.batch_size / self.ranks / self.recipe.accumulate)

    def train_dataloader(self) -> "StepLoader":
        return StepLoader(self)

    def val_dataloader(self) -> "ValLoader":
        return ValLoader(np.arange(self.rank, len(self.val), self.ranks), min(VAL_BATCH, 2 * self.piece))

    def transfer_batch_to_device(self, batch: object, device: torch.device, dataloader_idx: int) -> object:
        return batch  # only which, not the images


class StepLoader:
    """The steps that are left of the epoch under way, some at a time; where none is, an empty range comes once."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[range]:
        data = self.data
        yield range(data.step, min(data.step + STEPS_PER_CALL, data.steps))
        for start in range(data.step + STEPS_PER_CALL, data.steps, STEPS_PER_CALL):
            yield range(start, min(start + STEPS_PER_CALL, data.steps))


class ValLoader:
    """Rows to validate, a batch at a time."""

    def __init__(self, rows: np.ndarray, batch_size: int) -> None:
        self.rows, self.batch_size = rows, batch_size

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self.rows), self.batch_size):
            yield self.rows[start : start + self.batch_size]
