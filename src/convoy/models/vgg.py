"""VGG (Simonyan & Zisserman 2014): stacks of 3x3 convolutions with max pooling, then fully connected layers."""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from convoy.core.config import Fraction, PositiveInt, schema
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models import TorchvisionEquivalent
from convoy.models.base import Classifier, average_pool_to
from convoy.recipe import RecipeConfig

Stack = Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]  # [convolutions, channels]


@schema
class Params:
    """Settings of VGG."""

    # Paper: A [1, 64], [1, 128], [2, 256], [2, 512], [2, 512]
    #        D [2, 64], [2, 128], [3, 256], [3, 512], [3, 512], known as VGG-16
    stacks: Annotated[list[Stack], Field(min_length=1)]
    batch_norm: bool  # batch norm after each convolution; paper false
    pool: PositiveInt  # pixels; height and width of the fully connected layers' input; paper 7
    hidden: PositiveInt  # units of each of the two hidden fully connected layers; paper 4096
    dropout: Fraction  # probability that an output of a hidden fully connected layer is zeroed; paper 0.5
    init: str  # source of the initial weights: scratch, pretrained, champion, a run ID or a file
    recipe: RecipeConfig


def fold_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold the biases of convolutions before a batch norm into the running mean of that batch norm.

    Torchvision's convolutions have such biases, ours do not. The network computes the same function.

    Args:
        weights: State dict of the torchvision network.

    Returns:
        A state dict without these biases; `weights` is unchanged.
    """
    folded = dict(weights)
    for name, mean in weights.items():
        if name.endswith("running_mean"):
            # For example, features.1.running_mean follows features.0.bias.
            _, norm, _ = name.split(".")
            folded[name] = mean - folded.pop(f"features.{int(norm) - 1}.bias")
    return folded


# Table 1 of the paper, columns A, B, D and E.
STACKS = {
    "vgg11": [[1, 64], [1, 128], [2, 256], [2, 512], [2, 512]],
    "vgg13": [[2, 64], [2, 128], [2, 256], [2, 512], [2, 512]],
    "vgg16": [[2, 64], [2, 128], [3, 256], [3, 512], [3, 512]],
    "vgg19": [[2, 64], [2, 128], [4, 256], [4, 512], [4, 512]],
}
TORCHVISION_EQUIVALENTS = TorchvisionEquivalent(
    {
        name + ending: {"stacks": stacks, "batch_norm": bool(ending), "pool": 7, "hidden": 4096}
        for name, stacks in STACKS.items()
        for ending in ("", "_bn")
    },
    translate=fold_biases,
)


class VGG(Classifier):
    """VGG from Simonyan & Zisserman 2014, "Very deep convolutional networks for large-scale image recognition".

    As in the paper: only 3x3 convolutions and 2x2 max pooling before the fully connected layers, and dropout.

    Differences from the paper:

    * Batch norm (Ioffe & Szegedy 2015) is optional.
    * Feature maps are average-pooled to `pool` x `pool` before the fully connected layers.
    * Weights are initialised as in He et al. 2015, whereas the paper trained a shallow network first.

    Args:
        info: Classes, image size and channel statistics of the data set.
        params: Settings of the architecture.
    """

    head_modules: ClassVar[tuple[str, ...]] = ("classifier.6",)

    def __init__(self, info: DatasetInfo, params: Params) -> None:
        super().__init__(info, params.recipe)
        self.pool = params.pool
        layers: list[nn.Module] = []
        channels = info.channels
        for convolutions, width in params.stacks:
            for _ in range(convolutions):
                # A batch norm has its own bias.
                layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not params.batch_norm))
                layers.extend([nn.BatchNorm2d(width)] if params.batch_norm else [])
                layers.append(nn.ReLU(inplace=True))
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        output = nn.Linear(params.hidden, len(info.classes))
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
        # As in the paper: an untrained network prefers no class.
        nn.init.normal_(output.weight, std=0.01)

    def logits(self, x: Tensor) -> Tensor:
        """Compute the logits (N, K) of normalised images (N, C, H, W)."""
        x = self.features(x)  # (N, 512, 7, 7)
        x = average_pool_to(x, self.pool)  # (N, 512, 7, 7) for larger images too
        return self.classifier(x.flatten(1))
