"""GoogLeNet (Szegedy et al. 2014): nine Inception modules and two auxiliary classifiers."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from convoy.core.config import Fraction, PositiveFloat, PositiveInt, schema
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models import TorchvisionEquivalent
from convoy.models.base import Classifier, average_pool_to
from convoy.recipe import RecipeConfig


@schema
class Params:
    """Settings of GoogLeNet."""

    width: PositiveFloat  # factor on the channels of the paper's table 1; paper 1
    third_kernel: PositiveInt  # pixels, odd; kernel size of a module's third branch; paper 5, torchvision 3
    stem_kernel: PositiveInt  # pixels, odd; kernel size of the first convolution; paper 7
    stem_stride: PositiveInt  # pixels; stride of the first convolution; paper 2
    stem_pools: bool  # 3x3 max pooling with stride 2 after the first and third convolutions; paper true
    dropout: Fraction  # probability that an input of the last layer is zeroed; paper 0.4
    auxiliary_dropout: Fraction  # the same probability in the auxiliary classifiers; paper 0.7
    init: str  # source of the initial weights: scratch, pretrained, champion, a run ID or a file
    recipe: RecipeConfig


class Channels(NamedTuple):
    """Output channels of the convolutions in an Inception module, a row of table 1 of the paper."""

    one: int  # 1x1
    three_reduce: int  # 1x1 before the 3x3
    three: int  # 3x3
    five_reduce: int  # 1x1 before the 5x5
    five: int  # 5x5
    pool: int  # 1x1 after the max pooling

    @property
    def depth(self) -> int:
        """Return the number of output channels of the module."""
        return self.one + self.three + self.five + self.pool


INCEPTION_CHANNELS = {
    #          1x1  reduce 3x3  reduce 5x5  pool
    "3a": Channels(64, 96, 128, 16, 32, 32),
    "3b": Channels(128, 128, 192, 32, 96, 64),
    "4a": Channels(192, 96, 208, 16, 48, 64),
    "4b": Channels(160, 112, 224, 24, 64, 64),
    "4c": Channels(128, 128, 256, 24, 64, 64),
    "4d": Channels(112, 144, 288, 32, 64, 64),
    "4e": Channels(256, 160, 320, 32, 128, 128),
    "5a": Channels(256, 160, 320, 32, 128, 128),
    "5b": Channels(384, 192, 384, 48, 128, 128),
}


TORCHVISION_EQUIVALENTS = TorchvisionEquivalent(
    {"googlenet": {"width": 1, "third_kernel": 3, "stem_kernel": 7, "stem_stride": 2, "stem_pools": True}},
    # The weights were converted from TensorFlow, which scales images to [-1, 1].
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


class GoogLeNet(Classifier):
    """GoogLeNet from Szegedy et al. 2014, "Going deeper with convolutions".

    As in the paper: the layers of table 1, and two auxiliary classifiers after 4a and 4d, which have a weight of 0.3 in
    the loss and are used only in training.

    Differences from the paper:

    * Batch norm follows each convolution (Ioffe & Szegedy 2015), and there is no local response normalisation.
    * The last pooling is 2x2.
    * The stem, the kernel of the third branch and a factor on all widths are configurable.
    * Auxiliary classifiers average-pool feature maps of any size to 4x4, at 224 px with the paper's 5x5 windows.
    * Weights are initialised as in He et al. 2015.

    Args:
        info: Classes, image size and channel statistics of the data set.
        params: Settings of the architecture.
    """

    # The auxiliary classifiers are heads with all their layers: torchvision's are untrained, and they are used only in
    # training.
    head_modules: ClassVar[tuple[str, ...]] = ("classifier", "auxiliary_4a", "auxiliary_4d")

    def __init__(self, info: DatasetInfo, params: Params) -> None:
        super().__init__(info, params.recipe)

        def scaled(channels: int) -> int:
            return max(1, round(channels * params.width))

        table = {name: Channels(*map(scaled, line)) for name, line in INCEPTION_CHANNELS.items()}
        # The input channels of each module are the output channels of the one before it.
        inputs = [scaled(192), *(line.depth for line in table.values())]
        module = {
            name: Inception(depth, line, params.third_kernel)
            for depth, (name, line) in zip(inputs, table.items(), strict=False)
        }
        pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        stem_pool = pool if params.stem_pools else nn.Identity()
        self.to_4a = nn.Sequential(
            convolution(info.channels, scaled(64), params.stem_kernel, params.stem_stride),
            stem_pool,
            convolution(scaled(64), scaled(64), 1),
            convolution(scaled(64), scaled(192), 3),
            stem_pool,
            module["3a"],
            module["3b"],
            pool,
            module["4a"],
        )
        self.to_4d = nn.Sequential(module["4b"], module["4c"], module["4d"])
        self.to_5b = nn.Sequential(module["4e"], nn.MaxPool2d(2, stride=2, ceil_mode=True), module["5a"], module["5b"])
        classes = len(info.classes)
        widths = scaled(128), scaled(1024)
        self.auxiliary_4a = Auxiliary(table["4a"].depth, *widths, classes, params.auxiliary_dropout)
        self.auxiliary_4d = Auxiliary(table["4d"].depth, *widths, classes, params.auxiliary_dropout)
        self.classifier = nn.Sequential(nn.Dropout(params.dropout), nn.Linear(table["5b"].depth, classes))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def logits(self, x: Tensor) -> Tensor:
        """Compute the logits (N, K) of normalised images (N, C, H, W)."""
        return self.main_head(self.to_4d(self.to_4a(x)))

    def weighted_heads(self, x: Tensor) -> list[tuple[float, Tensor]]:
        """Compute the logits of the main head and both auxiliary classifiers, with their weights in the loss."""
        x_4a = self.to_4a(x)  # (N, 512, 14, 14)
        x_4d = self.to_4d(x_4a)  # (N, 528, 14, 14)
        # The weight of 0.3 is from section 5 of the paper.
        return [(1.0, self.main_head(x_4d)), (0.3, self.auxiliary_4a(x_4a)), (0.3, self.auxiliary_4d(x_4d))]

    def main_head(self, x: Tensor) -> Tensor:
        """Compute the logits (N, K) from the output of module 4d."""
        x = self.to_5b(x)  # (N, 1024, 7, 7)
        return self.classifier(x.mean((2, 3)))


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Create a padded convolution followed by batch norm and ReLU.

    At stride 1 and with an odd kernel, the output has the height and width of the input.
    """
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        # The eps is from Szegedy et al. 2015, as in torchvision.
        nn.BatchNorm2d(outputs, eps=0.001),
        nn.ReLU(inplace=True),
    )


class Inception(nn.Module):
    """Inception module: four parallel branches whose feature maps are concatenated (figure 2b of the paper).

    Args:
        inputs: Number of input channels.
        channels: Output channels of the module's convolutions.
        third_kernel: Kernel size of the third branch, in pixels.
    """

    def __init__(self, inputs: int, channels: Channels, third_kernel: int) -> None:
        super().__init__()
        self.one = convolution(inputs, channels.one, 1)
        self.three = nn.Sequential(
            convolution(inputs, channels.three_reduce, 1),
            convolution(channels.three_reduce, channels.three, 3),
        )
        self.five = nn.Sequential(
            convolution(inputs, channels.five_reduce, 1),
            convolution(channels.five_reduce, channels.five, third_kernel),
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), convolution(inputs, channels.pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the feature maps of all branches, (N, channels.depth, H, W)."""
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)


class Auxiliary(nn.Module):
    """Auxiliary classifier on intermediate feature maps, which strengthens the gradient in lower layers (section 5).

    Args:
        inputs: Number of input channels.
        channels: Output channels of the 1x1 convolution.
        hidden: Units of the hidden fully connected layer.
        classes: Number of classes.
        dropout: Probability that an input of the output layer is zeroed.
    """

    def __init__(self, inputs: int, channels: int, hidden: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.convolution = convolution(inputs, channels, 1)
        self.classifier = nn.Sequential(
            nn.Linear(channels * 4 * 4, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits (N, K) from feature maps (N, C, H, W)."""
        x = average_pool_to(x, 4)  # (N, 512, 4, 4)
        x = self.convolution(x)  # (N, 128, 4, 4)
        return self.classifier(x.flatten(1))
