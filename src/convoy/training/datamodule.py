"""The Lightning data module, whose loaders yield indices of images that are gathered in batches."""

import math
import mmap
from collections.abc import Iterator

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from convoy.data.packed.arrays import Images
from convoy.recipe import RecipeConfig
from convoy.training.sampler import BatchSampler

# Steps per call of `training_step`: Lightning's overhead is 1 ms per call.
STEPS_PER_CALL = 16  # steps
# Largest validation batch. Without gradients, twice as many images as in training need less memory than in training.
MAX_VAL_BATCH_SIZE = 512  # images
# Amount of data that is copied to a GPU at a time.
UPLOAD_BYTES = 2**26  # bytes
# Largest fraction of the free GPU memory that the images may occupy.
GPU_MEMORY_FRACTION = 0.5
# Size from which a memory map is read image by image, with each image prefetched.
MMAP_PREFETCH_BYTES = 2**30  # bytes
# Number of steps that images are prefetched ahead of their use.
PREFETCH_STEPS = 2  # steps


class ImageStore:
    """The images of a split, kept in GPU memory if they fit and otherwise where they are.

    Images of a large memory map that is read in shuffled order are prefetched: with memory for a fifth of the images,
    training is then as fast as with memory for all of them (benchmarks/README.md).

    Args:
        images: Pixels and labels of the split.
        device: Device that the batches are used on.
        shuffled: Whether the images are read in another order than they are stored in.
    """

    def __init__(self, images: Images, device: torch.device, shuffled: bool = False) -> None:
        self.images = images
        self.device = device
        self.resident: tuple[Tensor, Tensor] | None = None
        fits = device.type == "cuda" and images.pixels.nbytes < GPU_MEMORY_FRACTION * torch.cuda.mem_get_info(device)[0]
        if fits:
            self.resident = copy_to_device(images.pixels, device), torch.from_numpy(images.labels).to(device)
        # Offset of the pixels in the file, in bytes.
        self.offset = 0
        self.file: mmap.mmap | None = None
        pixels = images.pixels
        is_large_map = isinstance(pixels, np.memmap) and pixels.nbytes >= MMAP_PREFETCH_BYTES
        if is_large_map and shuffled and self.resident is None and isinstance(pixels.base, mmap.mmap):
            self.file, self.offset = pixels.base, pixels.offset
            # Without this, the kernel would also read the data around each image.
            self.file.madvise(mmap.MADV_RANDOM)

    def prefetch(self, rows: np.ndarray) -> None:
        """Start reading images from the disk in the background, if they have to be prefetched.

        Args:
            rows: Indices (N,) int64 of the images.
        """
        if self.file is None:
            return
        size = self.images.pixels[0].nbytes
        for start in (self.offset + rows * size).tolist():
            page = start - start % mmap.PAGESIZE
            self.file.madvise(mmap.MADV_WILLNEED, page, start + size - page)

    def gather(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Gather images on the device without blocking the host on the device.

        Args:
            rows: Indices (N,) int64 of the images.

        Returns:
            Pixels (N, H, W, C) uint8 and labels (N,) int64.
        """
        if self.resident is not None:
            index = torch.from_numpy(rows).pin_memory().to(self.device, non_blocking=True)
            pixels, labels = self.resident
            return pixels.index_select(0, index), labels.index_select(0, index)
        batch = torch.from_numpy(np.take(self.images.pixels, rows, axis=0)), torch.from_numpy(self.images.labels[rows])
        if self.device.type == "cpu":
            return batch
        pixels, labels = (part.pin_memory().to(self.device, non_blocking=True) for part in batch)
        return pixels, labels


def copy_to_device(pixels: np.ndarray, device: torch.device) -> Tensor:
    """Copy pixels (N, H, W, C) uint8 to a device, using only `UPLOAD_BYTES` bytes of host memory at a time."""
    copied = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    step = max(1, UPLOAD_BYTES // pixels[0].nbytes)
    for start in range(0, len(pixels), step):
        copied[start : start + step] = torch.from_numpy(np.array(pixels[start : start + step]))
    return copied


class ImageData(LightningDataModule):
    """Lightning data module whose order of images depends only on the seed and the epoch.

    The attributes `epoch` and `step` hold the position of the training: the number of completed epochs, and of
    completed steps in the current epoch. The loaders yield indices instead of images: the training loader yields ranges
    of the remaining steps of the epoch, the validation loader yields the rows of each batch.

    Args:
        train: Images to train on.
        val: Images to validate on.
        recipe: Training settings of the architecture.
        seed: Seed of the order of the training images.
    """

    def __init__(self, train: Images, val: Images, recipe: RecipeConfig, seed: int) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.recipe = recipe
        self.seed = seed
        self.epoch = 0
        self.step = 0
        self.set_rank(torch.device("cpu"), 0, 1)

    def set_rank(self, device: torch.device, rank: int, world_size: int) -> None:
        """Place the images for a device, and select this process's part of each batch.

        Args:
            device: Device that the batches are used on.
            rank: Index of this process, in [0, world_size).
            world_size: Number of processes that train together.
        """
        self.rank, self.world_size = rank, world_size
        balanced = self.recipe.class_balance == "sampler"
        self.sampler = BatchSampler(
            self.train.labels, self.recipe.batch_size, self.seed, balanced=balanced, rank=rank, world_size=world_size
        )
        # An epoch and the rows of each of its steps.
        self.order: tuple[int, list[np.ndarray]] = (-1, [])
        self.train_store, self.val_store = ImageStore(self.train, device, shuffled=True), ImageStore(self.val, device)

    @property
    def steps(self) -> int:
        """Return the number of steps in an epoch."""
        return len(self.sampler)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return this process's part of the batch of a step in the current epoch, and prefetch a later one.

        Args:
            step: Step, from 0 in the epoch.

        Returns:
            Pixels (N, H, W, C) uint8 and labels (N,) int64, on the device.
        """
        if self.order[0] != self.epoch:
            self.order = self.epoch, self.sampler.draw_epoch(self.epoch)
        _, rows = self.order
        for later in rows[step + PREFETCH_STEPS : step + PREFETCH_STEPS + 1]:
            self.train_store.prefetch(later)
        return self.train_store.gather(rows[step])

    @property
    def micro_batch_size(self) -> int:
        """Return the micro-batch size, the number of images that this process computes the gradient of at a time."""
        return math.ceil(self.sampler.batch_size / self.world_size / self.recipe.accumulate_grad_batches)

    def train_dataloader(self) -> "StepLoader":
        """Return a loader of ranges of the remaining steps of the epoch."""
        return StepLoader(self)

    def val_dataloader(self) -> "ValLoader":
        """Return a loader of the rows of this process's validation batches."""
        rows = np.arange(self.rank, len(self.val), self.world_size)
        return ValLoader(rows, min(MAX_VAL_BATCH_SIZE, 2 * self.micro_batch_size))

    def transfer_batch_to_device(self, batch: object, device: torch.device, dataloader_idx: int) -> object:
        """Return the batch unchanged, because it consists of indices that are used on the host."""
        return batch


def split_batch(pixels: Tensor, labels: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Split a batch into micro-batches.

    Their sizes differ by one image at most, because batch norm would fail on a leftover of one image.

    Args:
        pixels: Images (N, H, W, C) uint8.
        labels: Labels (N,) int64.
        count: Number of micro-batches, limited to N.

    Returns:
        The pixels and labels of each micro-batch.
    """
    count = min(count, len(labels))
    return zip(pixels.tensor_split(count), labels.tensor_split(count), strict=True)


class StepLoader:
    """Loader that yields ranges of the remaining steps of the current epoch.

    If no step is left, it yields a single empty range.

    Args:
        data: The data module, which holds the position of the training.
    """

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[range]:
        data = self.data
        yield range(data.step, min(data.step + STEPS_PER_CALL, data.steps))
        for start in range(data.step + STEPS_PER_CALL, data.steps, STEPS_PER_CALL):
            yield range(start, min(start + STEPS_PER_CALL, data.steps))


class ValLoader:
    """Loader that yields the rows of each validation batch.

    Args:
        rows: Indices (N,) int64 of the images to validate.
        batch_size: Largest number of images in a batch.
    """

    def __init__(self, rows: np.ndarray, batch_size: int) -> None:
        self.rows, self.batch_size = rows, batch_size

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self.rows), self.batch_size):
            yield self.rows[start : start + self.batch_size]
