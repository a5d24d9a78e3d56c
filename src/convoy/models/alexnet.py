"""AlexNet (Krizhevsky et al. 2012): five convolutions, three overlapping poolings, three fully connected layers."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from convoy.core.config import Fraction, NonNegativeInt, PositiveInt, schema
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models import TorchvisionEquivalent
from convoy.models.base import Classifier, average_pool_to
from convoy.recipe import RecipeConfig


@schema
class Params:
    """Settings of AlexNet."""

    # Channels of each convolution; paper 96, 256, 384, 384, 256.
    widths: Annotated[list[PositiveInt], Field(min_length=5, max_length=5)]
    stem_kernel: PositiveInt  # pixels; kernel size of the first convolution; paper 11
    stem_stride: PositiveInt  # pixels; stride of the first convolution; paper 4
    stem_padding: NonNegativeInt  # pixels; 2 yields the paper's 55x55 feature maps for images of 224 px
    response_norm: bool  # local response normalisation after the first two convolutions; paper true
    pool: PositiveInt  # pixels; height and width of the fully connected layers' input; paper 6
    hidden: PositiveInt  # units of each of the two hidden fully connected layers; paper 4096
    dropout: Fraction  # probability that an input of a hidden fully connected layer is zeroed; paper 0.5
    init: str  # source of the initial weights: scratch, pretrained, champion, a run ID or a file
    recipe: RecipeConfig


TORCHVISION_EQUIVALENTS = TorchvisionEquivalent(
    {
        "alexnet": {
            "widths": [64, 192, 384, 256, 256],
            "stem_kernel": 11,
            "stem_stride": 4,
            "stem_padding": 2,
            "response_norm": False,
            "pool": 6,
            "hidden": 4096,
        }
    }
)


class AlexNet(Classifier):
    """AlexNet from Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural networks".

    As in the paper: five convolutions with ReLU, 3x3 max pooling with stride 2, local response normalisation, dropout.

    Differences from the paper:

    * There is one tower instead of two on two GPUs.
    * The stem is configurable.
    * Feature maps are average-pooled to `pool` x `pool` before the fully connected layers.
    * Weights are initialised as in He et al. 2015.

    Without `response_norm` and with widths 64, 192, 384, 256, 256 this is the network of Krizhevsky 2014, "One weird
    trick for parallelizing convolutional neural networks", which torchvision implements.

    Args:
        info: Classes, image size and channel statistics of the data set.
        params: Settings of the architecture.
    """

    head_modules: ClassVar[tuple[str, ...]] = ("classifier.6",)

    def __init__(self, info: DatasetInfo, params: Params) -> None:
        super().__init__(info, params.recipe)
        self.pool = params.pool
        one, two, three, four, five = params.widths
        response_norm = LocalResponse if params.response_norm else nn.Identity
        self.features = nn.Sequential(
            nn.Conv2d(info.channels, one, params.stem_kernel, params.stem_stride, params.stem_padding),
            nn.ReLU(inplace=True),
            response_norm(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(one, two, 5, padding=2),
            nn.ReLU(inplace=True),
            response_norm(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(two, three, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(three, four, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(four, five, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2),
        )
        output = nn.Linear(params.hidden, len(info.classes))
        self.classifier = nn.Sequential(
            nn.Dropout(params.dropout),
            nn.Linear(five * params.pool**2, params.hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(params.dropout),
            nn.Linear(params.hidden, params.hidden),
            nn.ReLU(inplace=True),
            output,
        )
        for layer in (*self.features, *self.classifier):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                # With the paper's std of 0.01 in every layer, the signal would vanish in narrow layers.
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        # As in the paper: an untrained network prefers no class.
        nn.init.normal_(output.weight, std=0.01)

    def logits(self, x: Tensor) -> Tensor:
        """Compute the logits (N, K) of normalised images (N, C, H, W)."""
        x = self.features(x)  # (N, 256, 6, 6)
        x = average_pool_to(x, self.pool)  # (N, 256, 6, 6) for larger images too
        return self.classifier(x.flatten(1))


class LocalResponse(nn.Module):
    """Local response normalisation across channels (section 3.3 of the paper).

    Divides each value by (2 + 1e-4 * s) ** 0.75, where s is the sum of squares over 5 neighbouring channels.
    In contrast, torch's `local_response_norm` divides 1e-4 by 5, and its backward pass on CUDA is not deterministic.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise feature maps (N, C, H, W) across channels."""
        channel = torch.arange(x.shape[1], device=x.device)
        neighbours = ((channel[:, None] - channel).abs() <= 2).to(x.dtype)  # (C, C)
        # Summing with a 1x1 convolution is 3 times as fast on a CPU as average pooling across channels.
        squares = functional.conv2d(x.square(), neighbours[:, :, None, None])
        return x * (2 + 1e-4 * squares) ** -0.75
