"""ResNet (He et al. 2015): residual blocks, each of which adds its output to its input."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from convoy.core.config import PositiveInt, schema
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models import TorchvisionEquivalent
from convoy.models.base import Classifier
from convoy.recipe import RecipeConfig

FourStages = Annotated[list[PositiveInt], Field(min_length=4, max_length=4)]  # conv2_x to conv5_x


@schema
class Params:
    """Settings of ResNet, which correspond to a column of table 1 of the paper."""

    block: Literal["basic", "bottleneck"]  # paper: basic up to 34 layers, bottleneck from 50 layers
    # Blocks per stage in the paper: 18 layers [2, 2, 2, 2], 34 and 50 layers [3, 4, 6, 3], 101 layers [3, 4, 23, 3]
    blocks: FourStages
    widths: FourStages  # channels of each stage's 3x3 convolutions; paper 64, 128, 256, 512
    stem_kernel: PositiveInt  # pixels, odd; kernel size of the first convolution; paper 7
    stem_stride: PositiveInt  # pixels; stride of the first convolution; paper 2
    stem_pool: bool  # 3x3 max pooling with stride 2 after the first convolution; paper true
    init: str  # source of the initial weights: scratch, pretrained, champion, a run ID or a file
    recipe: RecipeConfig


# Table 1 of the paper: the block and the number of blocks per stage.
DEPTHS = {
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet34": ("basic", [3, 4, 6, 3]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
    "resnet101": ("bottleneck", [3, 4, 23, 3]),
    "resnet152": ("bottleneck", [3, 8, 36, 3]),
}
STEM = {"stem_kernel": 7, "stem_stride": 2, "stem_pool": True}
TORCHVISION_EQUIVALENTS = TorchvisionEquivalent(
    {
        name: {"block": block, "blocks": blocks, "widths": [64, 128, 256, 512], **STEM}
        for name, (block, blocks) in DEPTHS.items()
    }
)


class ResNet(Classifier):
    """ResNet from He, Zhang, Ren & Sun 2015, "Deep residual learning for image recognition".

    As in the paper: the layers of table 1, batch norm after each convolution, identity shortcuts where the shape is
    unchanged and projections where it changes (option B).

    Differences from the paper:

    * The stem is configurable.
    * A bottleneck block halves its feature maps in the 3x3 convolution instead of the first 1x1 convolution, and each
      block is initialised to the identity (both Goyal et al. 2017).

    Args:
        info: Classes, image size and channel statistics of the data set.
        params: Settings of the architecture.
    """

    def __init__(self, info: DatasetInfo, params: Params) -> None:
        super().__init__(info, params.recipe)
        block = {"basic": basic_block, "bottleneck": bottleneck_block}[params.block]
        channels = params.widths[0]
        self.stem = nn.Sequential(
            convolution(info.channels, channels, params.stem_kernel, params.stem_stride),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1) if params.stem_pool else nn.Identity(),
        )
        stages = []
        for stage, (blocks, width) in enumerate(zip(params.blocks, params.widths, strict=True)):
            for position in range(blocks):
                halves = stage > 0 and position == 0
                stages.append(block(channels, width, stride=2 if halves else 1))
                channels = stages[-1].outputs
        self.blocks = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, len(info.classes))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        # The std is from Goyal et al. 2017.
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def logits(self, x: Tensor) -> Tensor:
        """Compute the logits (N, K) of normalised images (N, C, H, W)."""
        x = self.stem(x)  # (N, 64, 56, 56)
        x = self.blocks(x)  # (N, 512, 7, 7)
        return self.classifier(x.mean((2, 3)))


class Residual(nn.Module):
    """Residual block that adds the output of its body to its input.

    The input is (N, inputs, H, W), the output (N, outputs, H / stride, W / stride).

    Args:
        body: Layers of the block, which must end in a batch norm.
        inputs: Number of input channels.
        outputs: Number of output channels.
        stride: Stride of the block, in pixels.
    """

    def __init__(self, body: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.body = body
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        # Initialise the block to the identity (Goyal et al. 2017).
        nn.init.zeros_(body[-1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the feature maps (N, outputs, H / stride, W / stride)."""
        return (self.body(x) + self.shortcut(x)).relu()


def basic_block(inputs: int, width: int, stride: int) -> Residual:
    """Create a block of two 3x3 convolutions (figure 5 of the paper, left)."""
    body = nn.Sequential(
        convolution(inputs, width, 3, stride),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        convolution(width, width, 3),
        nn.BatchNorm2d(width),
    )
    return Residual(body, inputs, width, stride)


def bottleneck_block(inputs: int, width: int, stride: int) -> Residual:
    """Create a block with a 3x3 convolution between two 1x1 convolutions (figure 5 of the paper, right).

    The last convolution has `4 * width` output channels.
    """
    outputs = 4 * width
    body = nn.Sequential(
        convolution(inputs, width, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        convolution(width, width, 3, stride),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        convolution(width, outputs, 1),
        nn.BatchNorm2d(outputs),
    )
    return Residual(body, inputs, outputs, stride)


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Create a padded convolution without bias, because a batch norm with its own bias follows.

    At stride 1 and with an odd kernel, the output has the height and width of the input.
    """
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
