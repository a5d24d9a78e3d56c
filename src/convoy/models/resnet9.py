"""ResNet-9 (Page 2018): a short residual network that is made for fast training on small images."""

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from convoy.core.config import PositiveFloat, PositiveInt, ProperFraction, schema
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models.base import Classifier
from convoy.recipe import RecipeConfig

# Height and width of the patches that the first layer whitens, in pixels.
PATCH = 2
# Number of training images that the patches are taken from.
WHITENED_IMAGES = 5000
# Added to the variances that the first layer divides by, which limits the amplification of noise (Jordan 2024).
VARIANCE_OFFSET = 5e-4


@schema
class Params:
    """Settings of ResNet-9."""

    # Channels of the three groups of layers, each of which halves the feature maps.
    widths: Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]
    residual: Annotated[list[bool], Field(min_length=3, max_length=3)]  # whether the groups end in a residual block
    batch_norm_momentum: ProperFraction  # weight of the newest batch in the running statistics
    logit_scale: PositiveFloat  # factor of the logits; a small one keeps the first predictions uncertain
    init: str  # source of the initial weights: scratch, pretrained, champion, a run ID or a file
    recipe: RecipeConfig


class ResNet9(Classifier):
    """ResNet-9 from Page 2018, "How to train your ResNet".

    Three groups of a 3x3 convolution with max pooling, each of which may be followed by a residual block of two
    convolutions (in the source, the first and the last are); global max pooling; and one fully connected layer, whose
    logits are scaled down.

    Differences from the source, all of them from Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU"
    (arXiv:2404.00498):

    * The first layer is fixed. Its filters whiten patches of 2x2 pixels: they are the eigenvectors of the covariance of
      the patches of the training images, divided by the standard deviation along them, and each with both signs.
    * GELU in place of CELU, and fewer channels.
    * Each 3x3 convolution starts as the identity on as many channels as it has inputs (or outputs, if they are fewer).
    * Batch norms have a bias, but no trained scale.

    Args:
        info: Classes, image size and channel statistics of the data set.
        params: Settings of the architecture.
    """

    def __init__(self, info: DatasetInfo, params: Params) -> None:
        super().__init__(info, params.recipe)
        channels = 2 * info.channels * PATCH**2
        self.whitening = nn.Conv2d(info.channels, channels, PATCH)
        self.whitening.weight.requires_grad_(False)
        groups = []
        for width, has_residual in zip(params.widths, params.residual, strict=True):
            groups.append(Group(channels, width, params.batch_norm_momentum, residual=has_residual))
            channels = width
        self.groups = nn.Sequential(*groups)
        self.classifier = nn.Linear(channels, len(info.classes), bias=False)
        self.logit_scale = params.logit_scale

    def init_from_images(self, pixels: np.ndarray) -> None:
        """Set the filters of the first layer to whiten the patches of training images.

        Args:
            pixels: Images (N, H, W, C) uint8.
        """
        # Sums of products of integers are exact in float64, so they don't depend on the order of the additions.
        images = torch.tensor(pixels[:WHITENED_IMAGES]).double()
        windows = images.unfold(1, PATCH, 1).unfold(2, PATCH, 1)  # (N, H - 1, W - 1, C, 2, 2)
        patches = windows.flatten(3).flatten(0, 2)  # (M, 4 * C)
        total, products = patches.sum(dim=0), patches.T @ patches
        covariance = products / len(patches) - torch.outer(total, total) / len(patches) ** 2
        scale = (1 / (255 * self.std)).double().expand(1, -1, PATCH, PATCH).flatten()
        variances, vectors = torch.linalg.eigh(covariance * torch.outer(scale, scale))
        filters = (vectors / (variances + VARIANCE_OFFSET).sqrt()).T.view(-1, *self.whitening.weight.shape[1:])
        self.whitening.weight.data.copy_(torch.cat([filters, -filters]))

    def logits(self, x: Tensor) -> Tensor:
        """Compute the logits (N, K) of normalised images (N, C, H, W)."""
        x = nn.functional.gelu(self.whitening(x))  # (N, 24, 31, 31)
        x = self.groups(x)  # (N, 256, 3, 3)
        return self.classifier(x.amax((2, 3))) * self.logit_scale


class Group(nn.Module):
    """Convolution with max pooling, which halves the feature maps, and a residual block of two convolutions.

    The input is (N, inputs, H, W), the output (N, outputs, H // 2, W // 2).

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels.
        momentum: Momentum of the batch norms.
        residual: Whether there is a residual block.
    """

    def __init__(self, inputs: int, outputs: int, momentum: float, *, residual: bool) -> None:
        super().__init__()
        self.pooling = convolution(inputs, outputs, momentum, nn.MaxPool2d(2))
        self.residual = (
            nn.Sequential(convolution(outputs, outputs, momentum), convolution(outputs, outputs, momentum))
            if residual
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the feature maps (N, outputs, H // 2, W // 2)."""
        x = self.pooling(x)
        return x if self.residual is None else x + self.residual(x)


def convolution(inputs: int, outputs: int, momentum: float, *pooling: nn.Module) -> nn.Sequential:
    """Create a 3x3 convolution with batch norm and GELU, whose pooling comes before the batch norm.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels.
        momentum: Momentum of the batch norm.
        pooling: A pooling layer, or none.
    """
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    same = min(inputs, outputs)
    nn.init.dirac_(layer.weight.data[:same])
    norm = nn.BatchNorm2d(outputs, momentum=momentum)
    norm.weight.requires_grad_(False)
    return nn.Sequential(layer, *pooling, norm, nn.GELU())
