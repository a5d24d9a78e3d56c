"""VGG (Simonyan & Zisserman 2014): stacks of 3x3 convolutions, each halved by max pooling, then three full layers."""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from convoy.config import Count, Share, schema
from convoy.data.dataset_info import DatasetInfo
from convoy.models import TorchvisionEquivalent
from convoy.models.base import Classifier
from convoy.recipe import RecipeConfig

Stack = Annotated[list[Count], Field(min_length=2, max_length=2)]  # [convolutions, channels]


@schema
class Params:
    """VGG's numbers."""

    # paper: A [1, 64], [1, 128], [2, 256], [2, 512], [2, 512]
    #        D [2, 64], [2, 128], [3, 256], [3, 512], [3, 512], known as VGG-16
    stacks: Annotated[list[Stack], Field(min_length=1)]
    batch_norm: bool  # after each convolution; paper false
    pool: Count  # height and width of the maps that the full layers see; paper 7
    hidden: Count  # units of each of the two hidden full layers; paper 4096
    dropout: Share  # probability that an output of a hidden full layer is dropped; paper 0.5
    init: str  # where the weights come from: scratch, pretrained, champion, a run's id or a file
    recipe: RecipeConfig


def fold(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the biases that torchvision's convolutions have before a batch norm: taken off its mean instead."""
    folded = dict(weights)
    for name, mean in weights.items():
        if name.endswith("running_mean"):
            _, norm, _ = name.split(".")  # features.1.running_mean, after features.0.bias
            folded[name] = mean - folded.pop(f"features.{int(norm) - 1}.bias")
    return folded


STACKS = {  # the paper's table 1: columns A, B, D and E
    "vgg11": [[1, 64], [1, 128], [2, 256], [2, 512], [2, 512]],
    "vgg13": [[2, 64], [2, 128], [2, 256], [2, 512], [2, 512]],
    "vgg16": [[2, 64], [2, 128], [3, 256], [3, 512], [3, 512]],
    "vgg19": [[2, 64], [2, 128], [4, 256], [4, 512], [4, 512]],
}
TWINS = TorchvisionEquivalent(
    {
        name + ending: {"stacks": stacks, "batch_norm": bool(ending), "pool": 7, "hidden": 4096}
        for name, stacks in STACKS.items()
        for ending in ("", "_bn")
    },
    translate=fold,
)


class VGG(Classifier):
    """Simonyan & Zisserman 2014, "Very deep convolutional networks for large-scale image recognition".

    Kept: nothing but 3x3 convolutions and 2x2 max pooling before the full layers, dropout.
    Changed: batch norm (Ioffe & Szegedy 2015) is a setting; maps are averaged down to `pool`; weights start from
    He et al. 2015, where the paper trained a shallow net first.
    """

    head: ClassVar[tuple[str, ...]] = ("classifier.6",)

    def __init__(self, task: DatasetInfo, params: Params) -> None:
        super().__init__(task, params.recipe)
        self.pool = params.pool
        layers: list[nn.Module] = []
        channels = task.channels
        for convolutions, width in params.stacks:
            for _ in range(convolutions):
                # batch norm brings a bias of its own
                layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not params.batch_norm))
                layers.extend([nn.BatchNorm2d(width)] if params.batch_norm else [])
                layers.append(nn.ReLU(inplace=True))
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        output = nn.Linear(params.hidden, len(task.classes))
        self.classifier = nn.Sequential(
            nn.Linear(channels * params.pool**2, params.hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(params.dropout),
            nn.Linear(params.hidden, params.hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(params.dropout),
            output,
        )
        for layer in (*self.features, *self.classifier):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(output.weight, std=0.01)  # as in the paper: a fresh net prefers no class

    def logits(self, x: Tensor) -> Tensor:
        x = self.features(x)  # (N, 512, 7, 7)
        x = average_to(x, self.pool)  # (N, 512, 7, 7) of larger images too
        return self.classifier(x.flatten(1))


def average_to(x: Tensor, size: int) -> Tensor:
    """Means of equal windows, `size` by `size` of them; maps of that size stay as they are.

    Not adaptive_avg_pool2d, whose backward pass on CUDA is not deterministic.
    """
    stride = x.shape[-1] // size
    return functional.avg_pool2d(x, x.shape[-1] - (size - 1) * stride, stride)
