"""The classifier: what every architecture is, an abstract network from pixels to classes."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from convoy.data.dataset_info import DatasetInfo
from convoy.recipe import RecipeConfig


class Classifier(nn.Module, ABC):
    """Maps images, uint8 (N, H, W, C), to logits (N, K). A network defines `logits` and nothing else.

    Normalisation is part of the module (mean and std are buffers, saved with the weights), so that training
    and serving can't differ. It does not know that it is trained: `convoy.training.module` makes a Lightning module
    of it, and whoever only predicts imports no Lightning.
    """

    head: ClassVar[tuple[str, ...]] = ("classifier",)  # names of the layers that other classes need anew
    mean: Tensor
    std: Tensor

    def __init__(self, task: DatasetInfo, recipe: RecipeConfig) -> None:
        super().__init__()
        self.task = task
        self.recipe = recipe
        self.register_buffer("mean", torch.tensor(task.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(task.std).view(1, -1, 1, 1))

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) -> logits (N, K)."""

    def heads(self, x: Tensor) -> list[tuple[float, Tensor]]:
        """The weight in the loss and the logits (N, K) of every head that is trained, the main one first."""
        return [(1.0, self.logits(x))]

    def is_head(self, name: str) -> bool:
        """Whether a layer, a parameter or a buffer, by its name, belongs to a head and not to the body."""
        return f"{name}.".startswith(tuple(f"{layer}." for layer in self.head))

    def normalise(self, pixels: Tensor) -> Tensor:
        """(N, H, W, C) uint8 -> (N, C, H, W) float, of mean 0 and standard deviation 1 in the training set."""
        # whole rows at a time: over channels that lie side by side, the loops would be three values long
        width = pixels.shape[2]
        scale, offset = (
            values.flatten().repeat(width) for values in (1 / (255 * self.std), self.mean / self.std)
        )  # (W * C,)
        rows = pixels.flatten(2).float().mul_(scale).sub_(offset)  # (N, H, W * C)
        return rows.unflatten(2, (width, -1)).permute(0, 3, 1, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, H, W, C) uint8 -> logits (N, K)."""
        return self.logits(self.normalise(pixels))


@torch.inference_mode()
def predict(classifier: Classifier, pixels: np.ndarray, batch_size: int) -> np.ndarray:
    """Probabilities (N, K) float64 of images (N, H, W, C) uint8, in evaluation mode, on the classifier's device."""
    classifier.eval()
    device = classifier.mean.device
    # cuDNN would round to the 10 bits of TF32 on a GPU, and then no CPU would answer alike
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        batches = [
            classifier(torch.tensor(pixels[start : start + batch_size], device=device)).double().softmax(dim=1)
            for start in range(0, len(pixels), batch_size)
        ]
    return torch.cat(batches).cpu().numpy()
