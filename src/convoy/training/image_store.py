"""The images of a split in the memory where they are gathered into batches: the GPU's, the host's, or a memory map."""

import mmap

import numpy as np
import torch
from torch import Tensor

from convoy.data.packed.arrays import Images

# Amount of data that is copied to a GPU at a time.
UPLOAD_BYTES = 2**26  # bytes
# Largest fraction of the free GPU memory that the images may occupy.
GPU_MEMORY_FRACTION = 0.5
# Size from which a memory map is read image by image, with each image prefetched.
MMAP_PREFETCH_BYTES = 2**30  # bytes


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
