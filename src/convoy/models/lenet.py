"""LeNet-5 (LeCun et al. 1998): two rounds of convolution and averaging, then three full layers."""

import math
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from convoy.config import Count, schema
from convoy.data.dataset_info import DatasetInfo
from convoy.models.base import Classifier
from convoy.recipe import RecipeConfig


@schema
class Params:
    """LeNet's numbers, under the paper's names of the layers."""

    c1: Count  # maps of the first 5x5 convolution; paper 6
    c3: Count  # maps of the second; paper 16
    c5: Count  # units of the third, which sees all of its 5x5 input at once; paper 120
    f6: Count  # units of the full layer; paper 84
    init: str  # where the weights come from: scratch, pretrained, champion, a run's id or a file
    recipe: RecipeConfig


class LeNet(Classifier):
    """LeCun, Bottou, Bengio & Haffner 1998, "Gradient-based learning applied to document recognition".

    Kept: the layers C1 to F6 for 32x32 images, the scaled tanh, subsampling by averages of 2x2.
    Changed: a subsampling map has no coefficient and bias of its own, nor a tanh; C3 sees every map of S2; the
    output is linear, not radial basis functions; images above 32x32 are averaged down to 5x5 before C5; weights
    start from LeCun et al. 1998, "Efficient BackProp".
    """

    head: ClassVar[tuple[str, ...]] = ("output",)

    def __init__(self, task: DatasetInfo, params: Params) -> None:
        super().__init__(task, params.recipe)
        self.c1 = nn.Conv2d(task.channels, params.c1, kernel_size=5)
        self.c3 = nn.Conv2d(params.c1, params.c3, kernel_size=5)
        self.c5 = nn.Conv2d(params.c3, params.c5, kernel_size=5)
        self.f6 = nn.Linear(params.c5, params.f6)
        self.output = nn.Linear(params.f6, len(task.classes))
        for layer in (self.c1, self.c3, self.c5, self.f6, self.output):
            # a weighted sum of inputs of variance 1 has variance 1, for which the scaled tanh was made
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.weight[0].numel()))
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def logits(self, x: Tensor) -> Tensor:
        x = squash(self.c1(x))  # (N, 6, 28, 28)
        x = functional.avg_pool2d(x, 2)  # (N, 6, 14, 14)
        x = squash(self.c3(x))  # (N, 16, 10, 10)
        x = functional.avg_pool2d(x, 2)  # (N, 16, 5, 5)
        x = average_to(x, 5)  # (N, 16, 5, 5) of any image from 32x32 up
        x = squash(self.c5(x)).flatten(1)  # (N, 120)
        x = squash(self.f6(x))  # (N, 84)
        return self.output(x)


def squash(x: Tensor) -> Tensor:
    """The paper's tanh, which maps 1 to 1 and -1 to -1 (its appendix A)."""
    return 1.7159 * (x * (2 / 3)).tanh()


def average_to(x: Tensor, size: int) -> Tensor:
    """Means of equal windows, `size` by `size` of them; maps of that size stay as they are.

    Not adaptive_avg_pool2d, whose backward pass on CUDA is not deterministic.
    """
    stride = x.shape[-1] // size
    return functional.avg_pool2d(x, x.shape[-1] - (size - 1) * stride, stride)
