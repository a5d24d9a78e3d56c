"""AlexNet (Krizhevsky et al. 2012): five convolutions, three overlapping poolings, three full layers."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from convoy.config import Count, Share, Whole, schema
from convoy.data.dataset_info import DatasetInfo
from convoy.models import TorchvisionEquivalent
from convoy.models.base import Classifier
from convoy.recipe import RecipeConfig


@schema
class Params:
    """AlexNet's numbers."""

    widths: Annotated[list[Count], Field(min_length=5, max_length=5)]  # channels; paper 96, 256, 384, 384, 256
    stem_kernel: Count  # pixels, of the first convolution; paper 11
    stem_stride: Count  # pixels; paper 4
    stem_padding: Whole  # pixels; 2 for the paper's 224 px and 55x55 maps
    response_norm: bool  # local response normalisation after the first two convolutions; paper true
    pool: Count  # height and width of the maps that the full layers see; paper 6
    hidden: Count  # units of each of the two hidden full layers; paper 4096
    dropout: Share  # probability that an input of a hidden full layer is dropped; paper 0.5
    init: str  # where the weights come from: scratch, pretrained, champion, a run's id or a file
    recipe: RecipeConfig


TWINS = TorchvisionEquivalent(
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
    """Krizhevsky, Sutskever & Hinton 2012, "ImageNet classification with deep convolutional neural networks".

    Kept: five convolutions with ReLU, 3x3 max pooling with stride 2, local response normalisation, dropout.
    Changed: one tower, not two on two GPUs; the stem is a setting; maps are averaged down to `pool`; weights start
    from He et al. 2015. Without response_norm and at widths 64, 192, 384, 256, 256 it is Krizhevsky 2014, "One
    weird trick for parallelizing convolutional neural networks", the form that torchvision has.
    """

    head: ClassVar[tuple[str, ...]] = ("classifier.6",)

    def __init__(self, task: DatasetInfo, params: Params) -> None:
        super().__init__(task, params.recipe)
        self.pool = params.pool
        one, two, three, four, five = params.widths
        response_norm = LocalResponse if params.response_norm else nn.Identity
        self.features = nn.Sequential(
            nn.Conv2d(task.channels, one, params.stem_kernel, params.stem_stride, params.stem_padding),
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
        output = nn.Linear(params.hidden, len(task.classes))
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
                # the paper's deviation, 0.01 everywhere, fades out in narrow layers
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.normal_(output.weight, std=0.01)  # as in the paper: a fresh net prefers no class

    def logits(self, x: Tensor) -> Tensor:
        x = self.features(x)  # (N, 256, 6, 6)
        x = average_to(x, self.pool)  # (N, 256, 6, 6) of larger images too
        return self.classifier(x.flatten(1))


class LocalResponse(nn.Module):
    """Divides by (2 + 1e-4 * the sum of squares over 5 neighbouring channels) ** 0.75 (section 3.3 of the paper).

    Not torch's local_response_norm, which divides 1e-4 by 5, and whose backward pass on CUDA is not deterministic.
    """

    def forward(self, x: Tensor) -> Tensor:
        channel = torch.arange(x.shape[1], device=x.device)
        neighbours = ((channel[:, None] - channel).abs() <= 2).to(x.dtype)  # (C, C)
        # the sum as a 1x1 convolution: 3 times as fast on a CPU as average pooling across channels
        squares = functional.conv2d(x.square(), neighbours[:, :, None, None])
        return x * (2 + 1e-4 * squares) ** -0.75


def average_to(x: Tensor, size: int) -> Tensor:
    """Means of equal windows, `size` by `size` of them; maps of that size stay as they are.

    Not adaptive_avg_pool2d, whose backward pass on CUDA is not deterministic.
    """
    stride = x.shape[-1] // size
    return functional.avg_pool2d(x, x.shape[-1] - (size - 1) * stride, stride)
