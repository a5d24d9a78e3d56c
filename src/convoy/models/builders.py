"""Classification networks of torchvision and timm, by the name of their builder: `torchvision/convnext_tiny`."""

import contextlib
import dataclasses
import difflib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convoy.core.config import schema
from convoy.core.errors import ConvoyError, describe_error
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models.base import Classifier, average_pool_to
from convoy.recipe import RecipeConfig

LIBRARIES = ("torchvision", "timm")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# torchvision's networks whose auxiliary classifiers and old initialisation are switched off. Their weights were
# converted from TensorFlow, which scales images to [-1, 1].
INCEPTIONS = ("googlenet", "inception_v3")
# Arguments that come from the data, and may not be set.
RESERVED = ("weights", "progress", "pretrained", "num_classes")


@schema
class Params:
    """Settings of a network of torchvision or timm."""

    builder: str  # library and name, such as torchvision/convnext_tiny or timm/convnext_tiny
    arguments: dict[str, Any]  # more arguments of the builder, as in the library's documentation
    weights: str  # name of the published weights for init: pretrained, such as IMAGENET1K_V1; DEFAULT are the best
    init: str  # source of the initial weights: scratch, pretrained, champion, a run ID or a file
    recipe: RecipeConfig


@dataclasses.dataclass(frozen=True)
class PublishedWeights:
    """Weights that a library offers for one of its networks."""

    name: str  # for messages and the record
    source: Any  # torchvision's entry; None if they are on the Hugging Face Hub
    hub: str  # repository on the Hugging Face Hub; "" for torchvision
    size: int | None  # pixels, height and width of its images, if the weights fit no others
    mean: Sequence[float]  # of the 3 channels
    std: Sequence[float]  # of the 3 channels
    classes: Sequence[str]  # of the head, in its order; empty if unknown

    @property
    def file_name(self) -> str:
        """Return the name of torchvision's file, which ends in the first 8 digits of its sha256."""
        return Path(self.source.url).name if self.source else ""


class BuiltNetwork(Classifier):
    """A network of torchvision or timm with a new head for the classes of the data set.

    Grey images are repeated for a network that takes three channels. Adaptive average pooling, which is not
    deterministic on a GPU, is replaced by means.

    Args:
        info: Classes, image size and channel statistics of the data set.
        params: Settings of the network.
    """

    def __init__(self, info: DatasetInfo, params: Params) -> None:
        super().__init__(info, params.recipe)
        self.network = replace_pooling(make_network(params, len(info.classes), info.size))
        with torch.device("meta"):
            other = make_network(params, len(info.classes) + 1, info.size).state_dict()
        state = self.network.state_dict()
        # The layers whose shapes depend on the number of classes.
        self.head_layers = {
            f"network.{name.rpartition('.')[0]}." for name in state if state[name].shape != other[name].shape
        }
        self.channels = int(params.arguments.get("in_chans", 3))
        if info.channels == 1:
            self.mean = self.mean.repeat(1, self.channels, 1, 1)
            self.std = self.std.repeat(1, self.channels, 1, 1)

    def logits(self, x: Tensor) -> Tensor:
        """Compute the logits (N, K) of normalised images (N, C, H, W)."""
        output = self.network(x)
        # In training, some networks also return the logits of auxiliary classifiers.
        return output if isinstance(output, Tensor) else output[0]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Scale pixels (N, H, W, C) uint8 to mean 0 and std 1 over the training set, as (N, C, H, W) float32."""
        if pixels.shape[3] == 1:
            pixels = pixels.expand(-1, -1, -1, self.channels)
        return super().normalise(pixels)

    def is_in_head(self, name: str) -> bool:
        """Return whether the layer, parameter or buffer called `name` belongs to the head and not to the backbone."""
        return f"{name}.".startswith(tuple(self.head_layers))


class AveragePool(nn.Module):
    """Average pooling to a fixed size, whose backward pass is deterministic.

    Args:
        size: Height and width of the result, in pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Pool feature maps (N, C, H, W) to (N, C, size, size)."""
        return x.mean((2, 3), keepdim=True) if self.size == 1 else average_pool_to(x, self.size)


def replace_pooling(network: nn.Module) -> nn.Module:
    """Replace adaptive average pooling, which has no deterministic backward pass on a GPU, in place."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            size = layer.output_size
            height, width = size if isinstance(size, tuple) else (size, size)
            if height == width and height is not None:
                network.set_submodule(name, AveragePool(height))
    return network


def make_network(params: Params, classes: int, size: int) -> nn.Module:
    """Create the network of a builder, with random weights.

    Args:
        params: Settings of the network.
        classes: Number of classes.
        size: Height and width of its images, in pixels.

    Raises:
        ConvoyError: If the builder does not exist or does not take the arguments.
    """
    library, name = split_builder(params.builder)
    arguments = {**default_arguments(library, name, size), **params.arguments, "num_classes": classes}
    if taken := sorted(set(RESERVED) & set(params.arguments)):
        raise ConvoyError(f"arguments.{taken[0]} of {params.builder} is set by convoy: remove it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return _call_builder(library, name, arguments)
            except NotImplementedError:
                # Some builders, such as RegNet's, compute with tensors and can't do so on the meta device.
                device = torch.get_default_device()
                with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                    return _call_builder(library, name, arguments).to(device)
    except TypeError as error:
        raise ConvoyError(
            f"arguments: {params.builder} does not take them ({describe_error(error, 200)}): see the documentation of "
            f"{library}"
        ) from error


def _call_builder(library: str, name: str, arguments: Mapping[str, Any]) -> Any:
    if library == "timm":
        import timm

        return timm.create_model(name, pretrained=False, **arguments)
    from torchvision import models

    builder: Any = getattr(models, name, None)
    # A class such as VisionTransformer may be called, too.
    return (builder if inspect.isclass(builder) else models.get_model_builder(name))(**arguments)


def default_arguments(library: str, name: str, size: int) -> dict[str, Any]:
    """Return the arguments that make a network fit images of `size` pixels and this library."""
    if library == "timm":
        import timm

        found = timm.get_pretrained_cfg(name)
        return {"img_size": size} if found and found.fixed_input_size else {}
    if name in INCEPTIONS:
        return {"aux_logits": False, "init_weights": False}
    if name.startswith("vit_") or name == "VisionTransformer":
        return {"image_size": size}
    return {"input_size": (size, size)} if name == "maxvit_t" else {}


def check_params(section: str, params: Params, size: int) -> None:
    """Check the settings of a network without images.

    Args:
        section: Dotted name of the section in params.yaml, for messages.
        params: Settings of the network.
        size: Height and width of its images, in pixels.

    Raises:
        ConvoyError: If the builder or the weights do not exist, or the builder does not take the arguments.
    """
    with prefix_errors(section):
        library, name = split_builder(params.builder)
        known = list_builders(library)
        is_class = library == "torchvision" and name[:1].isupper() and _is_torchvision_class(name)
        if name.partition(".")[0] not in known and not is_class:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"see the networks in {library}'s documentation"
            raise ConvoyError(f"builder={params.builder}: {library} has no such network; {hint}")
        # A size that does not fit is reported with the sizes that do, when the network is built.
        with torch.device("meta"), contextlib.suppress(RuntimeError, ValueError, AssertionError):
            make_network(params, 2, size)
        if params.init == "pretrained":
            published = find_published(params)
            if published.size not in (None, size):
                raise ConvoyError(
                    f"size={size}: the weights {published.name} fit images of {published.size} px only: set size to it"
                )


@contextlib.contextmanager
def prefix_errors(section: str) -> Iterator[None]:
    """Put the name of the section in front of the message of any `ConvoyError`."""
    try:
        yield
    except ConvoyError as error:
        raise ConvoyError(f"{section}.{error}") from None


def split_builder(builder: str) -> tuple[str, str]:
    """Return the library and the name of a builder.

    Raises:
        ConvoyError: If the library is unknown or not installed.
    """
    library, _, name = builder.partition("/")
    if library not in LIBRARIES or not name:
        raise ConvoyError(f"builder={builder}: it must be torchvision/NAME or timm/NAME, such as torchvision/resnet50")
    if library == "timm":
        try:
            import timm  # noqa: F401
        except ImportError:
            raise ConvoyError(f"builder={builder}: timm is not installed: `make install` installs it") from None
    return library, name


def list_builders(library: str) -> list[str]:
    """Return the names of the classification networks of a library."""
    if library == "timm":
        import timm

        return timm.list_models()
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def _is_torchvision_class(name: str) -> bool:
    import torchvision

    found = getattr(torchvision.models, name, None)
    return inspect.isclass(found) and issubclass(found, nn.Module)


# Published weights


def find_published(params: Params) -> PublishedWeights:
    """Return the published weights that the settings name.

    Raises:
        ConvoyError: If there are none of this name.
    """
    library, name = split_builder(params.builder)
    if library == "timm":
        return _find_timm_weights(name, params)
    import torchvision

    if _is_torchvision_class(name):
        raise ConvoyError(f"init: torchvision offers no weights for the class {name}; set init: scratch")
    offered = torchvision.models.get_model_weights(name)
    if params.weights != "DEFAULT" and params.weights not in offered.__members__:
        choices = ", ".join(["DEFAULT", *offered.__members__])
        raise ConvoyError(f"weights={params.weights}: torchvision offers {choices} for {name}")
    found = offered[params.weights] if params.weights != "DEFAULT" else offered.DEFAULT
    preset = found.transforms()
    is_fixed = name.startswith(("vit_", "maxvit_"))
    is_inception = name in INCEPTIONS
    return PublishedWeights(
        name=f"torchvision {name} {found.name}",
        source=found,
        hub="",
        size=preset.crop_size[0] if is_fixed else None,
        mean=(0.5, 0.5, 0.5) if is_inception else preset.mean,
        std=(0.5, 0.5, 0.5) if is_inception else preset.std,
        classes=found.meta["categories"],
    )


def _find_timm_weights(name: str, params: Params) -> PublishedWeights:
    import timm

    full_name = name if params.weights == "DEFAULT" else f"{name.partition('.')[0]}.{params.weights}"
    offered = timm.list_pretrained(f"{name.partition('.')[0]}.*")
    is_known = full_name in offered or ("." not in full_name and offered)
    found: Any = timm.get_pretrained_cfg(full_name) if is_known else None
    if found is None or not found.hf_hub_id:
        tags = ", ".join(each.partition(".")[2] for each in offered) or "none"
        raise ConvoyError(f"weights={params.weights}: timm offers {tags} for {name.partition('.')[0]}")
    return PublishedWeights(
        name=f"timm {found.architecture}.{found.tag}",
        source=None,
        hub=found.hf_hub_id,
        size=found.input_size[1] if found.fixed_input_size else None,
        mean=found.mean,
        std=found.std,
        classes=found.label_names or [],
    )


def normalisation(published: PublishedWeights | None) -> dict[str, Tensor]:
    """Return the buffers `mean` and `std` that weights were trained with; ImageNet's if that is unknown."""
    mean, std = (published.mean, published.std) if published else (IMAGENET_MEAN, IMAGENET_STD)
    return {name: torch.tensor(values).view(1, -1, 1, 1) for name, values in (("mean", mean), ("std", std))}


def rename_weights(weights: Mapping[str, Tensor], classifier: Classifier) -> dict[str, Tensor]:
    """Convert the names of a library's state dict to those of our classifier.

    Auxiliary classifiers are left out. Files from before torch counted the batches of batch norms lack the counters,
    which start at 0.

    Args:
        weights: State dict of the library's network.
        classifier: The classifier that has this network.
    """
    own = classifier.state_dict()
    named = {f"network.{name}": value for name, value in weights.items()}
    counters = {name: torch.zeros_like(value) for name, value in own.items() if name.endswith("num_batches_tracked")}
    auxiliary = ("network.aux", "network.AuxLogits")
    return counters | {name: value for name, value in named.items() if name in own or not name.startswith(auxiliary)}
