"""LeNet-5 (LeCun et al. 1998): convolutions with average pooling, then fully connected layers."""

import math
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional

from convoy.core.config import PositiveInt, schema
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models.base import Classifier, average_pool_to
from convoy.recipe import RecipeConfig


@schema
class Params:
    """Settings of LeNet; the layers are named as in the paper."""

    c1: PositiveInt  # feature maps of the first 5x5 convolution; paper 6
    c3: PositiveInt  # feature maps of the second 5x5 convolution; paper 16
    c5: PositiveInt  # units of the third 5x5 convolution, which covers its complete 5x5 input; paper 120
    f6: PositiveInt  # units of the fully connected layer; paper 84
    init: str  # source of the initial weights: scratch, pretrained, champion, a run ID or a file
    recipe: RecipeConfig


class LeNet(Classifier):
    """LeNet-5 from LeCun, Bottou, Bengio & Haffner 1998, "Gradient-based learning applied to document recognition".

    As in the paper: layers C1 to F6 for 32x32 images, the scaled tanh, and subsampling by 2x2 averages.

    Differences from the paper:

    * The subsampling layers have no trainable coefficients or biases, and no tanh.
    * C3 is connected to every feature map of S2.
    * The output layer is linear instead of using radial basis functions.
    * For images larger than 32x32, feature maps are average-pooled to 5x5 before C5.
    * Weights are initialised as in LeCun et al. 1998, "Efficient BackProp".

    Args:
        info: Classes, image size and channel statistics of the data set.
        params: Settings of the architecture.
    """

    head_modules: ClassVar[tuple[str, ...]] = ("output",)

    def __init__(self, info: DatasetInfo, params: Params) -> None:
        super().__init__(info, params.recipe)
        self.c1 = nn.Conv2d(info.channels, params.c1, kernel_size=5)
        self.c3 = nn.Conv2d(params.c1, params.c3, kernel_size=5)
        self.c5 = nn.Conv2d(params.c3, params.c5, kernel_size=5)
        self.f6 = nn.Linear(params.c5, params.f6)
        self.output = nn.Linear(params.f6, len(info.classes))
        for layer in (self.c1, self.c3, self.c5, self.f6, self.output):
            # With this std, a weighted sum of inputs of variance 1 has variance 1, as the scaled tanh expects.
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.weight[0].numel()))
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def logits(self, x: Tensor) -> Tensor:
        """Compute the logits (N, K) of normalised images (N, C, H, W)."""
        x = scaled_tanh(self.c1(x))  # (N, 6, 28, 28)
        x = functional.avg_pool2d(x, 2)  # (N, 6, 14, 14)
        x = scaled_tanh(self.c3(x))  # (N, 16, 10, 10)
        x = functional.avg_pool2d(x, 2)  # (N, 16, 5, 5)
        x = average_pool_to(x, 5)  # (N, 16, 5, 5) for any image of 32x32 or larger
        x = scaled_tanh(self.c5(x)).flatten(1)  # (N, 120)
        x = scaled_tanh(self.f6(x))  # (N, 84)
        return self.output(x)


def scaled_tanh(x: Tensor) -> Tensor:
    """Apply the scaled tanh of the paper's appendix A, which maps 1 to 1 and -1 to -1."""
    return 1.7159 * (x * (2 / 3)).tanh()
