"""What all architectures share: the abstract classifier, its prediction, and a deterministic pooling."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from convoy.data.packed.dataset_info import DatasetInfo
from convoy.recipe import RecipeConfig


class Classifier(nn.Module, ABC):
    """Abstract network that maps images (N, H, W, C) uint8 to logits (N, K).

    A subclass must define `logits`. Normalisation is part of the module (`mean` and `std` are buffers that are saved
    with the weights), so training and serving cannot differ. The class knows nothing about training:
    `convoy.training.module` wraps it in a Lightning module, so code that only predicts does not import Lightning.

    Args:
        info: Classes, image size and channel statistics of the data set.
        recipe: Training settings of the architecture.
    """

    # Names of the layers that must be re-initialised when the classes change.
    head_modules: ClassVar[tuple[str, ...]] = ("classifier",)
    # Name in the settings, which `convoy.models` sets, for messages.
    name: str = ""
    mean: Tensor
    std: Tensor

    def __init__(self, info: DatasetInfo, recipe: RecipeConfig) -> None:
        super().__init__()
        self.info = info
        self.recipe = recipe
        self.register_buffer("mean", torch.tensor(info.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(info.std).view(1, -1, 1, 1))

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Compute the logits (N, K) of normalised images (N, C, H, W)."""

    def init_from_images(self, pixels: np.ndarray) -> None:
        """Initialise the layers whose first weights follow from training images; most networks have none.

        Args:
            pixels: Images (N, H, W, C) uint8.
        """

    def weighted_heads(self, x: Tensor) -> list[tuple[float, Tensor]]:
        """Compute the logits of every head that is trained, the main head first.

        Args:
            x: Normalised images (N, C, H, W).

        Returns:
            One pair per head: its weight in the loss and its logits (N, K).
        """
        return [(1.0, self.logits(x))]

    def is_in_head(self, name: str) -> bool:
        """Return whether the layer, parameter or buffer called `name` belongs to a head and not to the backbone."""
        return f"{name}.".startswith(tuple(f"{layer}." for layer in self.head_modules))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Scale pixels (N, H, W, C) uint8 to mean 0 and std 1 over the training set, as (N, C, H, W) float32."""
        # Work on complete image rows: with the channels innermost in memory, the inner loops would have a length of 3.
        width = pixels.shape[2]
        scale, offset = (
            values.flatten().repeat(width) for values in (1 / (255 * self.std), self.mean / self.std)
        )  # (W * C,)
        rows = pixels.flatten(2).float().mul_(scale).sub_(offset)  # (N, H, W * C)
        return rows.unflatten(2, (width, -1)).permute(0, 3, 1, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute the logits (N, K) of images (N, H, W, C) uint8."""
        return self.logits(self.normalise(pixels))


def average_pool_to(x: Tensor, size: int) -> Tensor:
    """Average-pool feature maps to `size` x `size` using windows of equal size.

    Feature maps that already have this size are returned unchanged. Unlike `adaptive_avg_pool2d`, the backward pass is
    deterministic on CUDA.

    Args:
        x: Feature maps (N, C, H, H), with H >= size.
        size: Height and width of the result, in pixels.

    Returns:
        Feature maps (N, C, size, size).
    """
    stride = x.shape[-1] // size
    return functional.avg_pool2d(x, x.shape[-1] - (size - 1) * stride, stride)


@torch.inference_mode()
def predict(classifier: Classifier, pixels: np.ndarray, batch_size: int) -> np.ndarray:
    """Predict class probabilities in evaluation mode on the classifier's device.

    Args:
        classifier: The classifier; it is left in evaluation mode.
        pixels: Images (N, H, W, C) uint8.
        batch_size: Number of images per forward pass.

    Returns:
        Probabilities (N, K) float64.
    """
    classifier.eval()
    device = classifier.mean.device
    # On a GPU, cuDNN would otherwise round to the 10 mantissa bits of TF32, and predictions would differ from a CPU's.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        # Flipped images have negative strides, which torch does not read.
        batches = (np.ascontiguousarray(pixels[at : at + batch_size]) for at in range(0, len(pixels), batch_size))
        found = [classifier(torch.tensor(batch, device=device)).double().softmax(dim=1) for batch in batches]
    return torch.cat(found).cpu().numpy()
