"""ResNet (He et al. 2015): blocks that add what they learn to what they were given."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from convoy.config import Count, schema
from convoy.data.dataset_info import DatasetInfo
from convoy.models import TorchvisionEquivalent
from convoy.models.base import Classifier
from convoy.recipe import RecipeConfig

FourStages = Annotated[list[Count], Field(min_length=4, max_length=4)]  # conv2_x to conv5_x


@schema
class Params:
    """ResNet's numbers: a column of the paper's table 1."""

    block: Literal["basic", "bottleneck"]  # paper: basic to 34 layers, bottleneck from 50
    # paper: 18 layers [2, 2, 2, 2], 34 and 50 layers [3, 4, 6, 3], 101 layers [3, 4, 23, 3]
    blocks: FourStages
    widths: FourStages  # channels of the 3x3 convolutions; paper 64, 128, 256, 512
    stem_kernel: Count  # pixels, odd: of the first convolution; paper 7
    stem_stride: Count  # pixels; paper 2
    stem_pool: bool  # 3x3 max pooling with stride 2 after it; paper true
    init: str  # where the weights come from: scratch, pretrained, champion, a run's id or a file
    recipe: RecipeConfig


DEPTHS = {  # the paper's table 1
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet34": ("basic", [3, 4, 6, 3]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
    "resnet101": ("bottleneck", [3, 4, 23, 3]),
    "resnet152": ("bottleneck", [3, 8, 36, 3]),
}
STEM = {"stem_kernel": 7, "stem_stride": 2, "stem_pool": True}
TWINS = TorchvisionEquivalent(
    {
        name: {"block": block, "blocks": blocks, "widths": [64, 128, 256, 512], **STEM}
        for name, (block, blocks) in DEPTHS.items()
    }
)


class ResNet(Classifier):
    """He, Zhang, Ren & Sun 2015, "Deep residual learning for image recognition".

    Kept: table 1 of the paper, batch norm after each convolution, identity shortcuts where the shape stays and
    projections where it changes (option B).
    Changed: the stem is a setting; a bottleneck halves its maps in the 3x3, not in the first 1x1, and each block
    starts as the identity (both Goyal et al. 2017).
    """

    def __init__(self, task: DatasetInfo, params: Params) -> None:
        super().__init__(task, params.recipe)
        block = {"basic": basic, "bottleneck": bottleneck}[params.block]
        channels = params.widths[0]
        self.stem = nn.Sequential(
            convolution(task.channels, channels, params.stem_kernel, params.stem_stride),
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
        self.classifier = nn.Linear(channels, len(task.classes))
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.classifier.weight, std=0.01)  # Goyal et al. 2017
        nn.init.zeros_(self.classifier.bias)

    def logits(self, x: Tensor) -> Tensor:
        x = self.stem(x)  # (N, 64, 56, 56)
        x = self.blocks(x)  # (N, 512, 7, 7)
        return self.classifier(x.mean((2, 3)))


class Residual(nn.Module):
    """A block: its body added to its input, (N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""

    def __init__(self, body: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.body = body
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        nn.init.zeros_(body[-1].weight)  # type: ignore[arg-type]  # a block starts as the identity (Goyal et al. 2017)

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


def basic(inputs: int, width: int, stride: int) -> Residual:
    """Two 3x3 convolutions (figure 5, left)."""
    body = nn.Sequential(
        convolution(inputs, width, 3, stride),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        convolution(width, width, 3),
        nn.BatchNorm2d(width),
    )
    return Residual(body, inputs, width, stride)


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    """A 3x3 convolution between two 1x1, the last four times as wide (figure 5, right)."""
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
    """A convolution as this network has them: it keeps height and width at stride 1, and batch norm is its bias."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
