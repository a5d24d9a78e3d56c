"""The architectures: `conf/model/x.yaml` names the module here that builds network `x`, such as `resnet`."""

import bisect
import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from convoy.core.config import ImageSize, validate
from convoy.core.config import schema as _schema
from convoy.core.errors import ConvoyError, suggest
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models.base import Classifier

# Modules of this package that do not define one architecture.
SHARED = ("base", "builders")
# Pixels; tried where a network does not fit its images. These are multiples of the usual patches and windows.
SIZES_TRIED = sorted({*range(32, 1025, 32), *range(56, 1025, 28)})


@_schema
class CommonParams:
    """Settings of every network, which stand beside those of its module's `Params`."""

    module: str  # module of this package
    size: ImageSize  # pixels; height and width of its images


COMMON = tuple(field.name for field in dataclasses.fields(CommonParams))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class TorchvisionEquivalent:
    """The torchvision networks that equal an architecture, and how to convert their weights.

    An architecture's module stores its equivalents in the constant `TORCHVISION_EQUIVALENTS`. The layers have the same
    order in both implementations.
    """

    settings: Mapping[str, Mapping[str, Any]]  # torchvision name -> settings that the weights depend on
    # The normalisation, per channel, that the weights were trained with.
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    # Converts torchvision's state dict to one with as many tensors as ours, in our order.
    translate: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict


def names() -> list[str]:
    """Return the names of the modules of one architecture each, without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED)


def check_settings(name: str, values: Mapping[str, Any]) -> None:
    """Check the settings of a network as far as that is possible without images.

    Args:
        name: Name of the network.
        values: Settings, as in `conf/model/<name>.yaml`.

    Raises:
        ConvoyError: If a setting is invalid.
    """
    section = f"model.{name}"
    common = {key: values[key] for key in COMMON if key in values}
    # The module comes first, because the other settings depend on it.
    module = import_module(name, values)
    params = parse(name, values)
    validate(CommonParams, common, section)
    if hasattr(module, "check_params"):
        module.check_params(section, params, values["size"])


def build(name: str, values: Mapping[str, Any], info: DatasetInfo) -> Classifier:
    """Build a classifier with initial weights drawn from torch's global random generator.

    Args:
        name: Name of the network.
        values: Settings, as in `conf/model/<name>.yaml`.
        info: Classes, image size and channel statistics of the data set.

    Raises:
        ConvoyError: If the name is unknown, a setting is invalid, or the images are too small for the settings.
    """
    params: Any = parse(name, values)
    network = _find_class(name, values)
    _check_image_size(name, network, params, info)
    classifier: Classifier = network(info, params)
    classifier.name = name
    return classifier


def restore(name: str, values: Mapping[str, Any], info: DatasetInfo, weights: Path) -> Classifier:
    """Build a classifier, load its weights from a safetensors file and switch it to evaluation mode.

    Args:
        name: Name of the network.
        values: Settings that the weights were trained with.
        info: Classes, image size and channel statistics of the data set.
        weights: Path of the safetensors file.

    Raises:
        ConvoyError: If the name is unknown, a setting is invalid, or the file does not contain the weights of this
            classifier.
    """
    # The training has passed the check of the image size, whose import of torch's compiler takes 1.5 s.
    params: Any = parse(name, values)
    try:
        classifier: Classifier = _find_class(name, values)(info, params)
        classifier.load_state_dict(load_file(weights), strict=True)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ConvoyError(f"{weights}: not the weights of this {name}; train it again ({error})") from error
    classifier.name = name
    return classifier.eval()


def import_module(name: str, values: Mapping[str, Any]) -> ModuleType:
    """Import the module that builds a network. Settings of earlier versions do not name it: it has the same name."""
    return _import_module(str(values.get("module", name)), f"model.{name}.module={{}}" if "module" in values else "")


def parse(name: str, values: Mapping[str, Any]) -> Any:
    """Return the settings of a network that its module defines, validated as an instance of the module's `Params`."""
    own = {key: value for key, value in values.items() if key not in COMMON}
    return validate(import_module(name, values).Params, own, f"model.{name}")


def libraries(values: Mapping[str, Any]) -> list[str]:
    """Return the packages besides torch that a network with these settings is built from."""
    # timm itself requires torchvision.
    return [str(values["builder"]).partition("/")[0]] if "builder" in values else []


def equivalents(name: str, values: Mapping[str, Any] | None = None) -> TorchvisionEquivalent:
    """Return the torchvision equivalents of architecture `name`, which may be empty."""
    return getattr(import_module(name, values or {}), "TORCHVISION_EQUIVALENTS", TorchvisionEquivalent({}))


def torchvision_name(name: str, values: Mapping[str, Any]) -> str:
    """Return torchvision's name for architecture `name` with the settings `values`.

    Raises:
        ConvoyError: If torchvision has no such network; the message lists the settings of the most similar one.
    """
    differences = {
        other: {key: value for key, value in settings.items() if values[key] != value}
        for other, settings in equivalents(name, values).settings.items()
    }
    if not differences:
        raise ConvoyError(f"model.{name}.init: torchvision has no {name} with weights from ImageNet; set init: scratch")
    nearest = min(differences, key=lambda other: len(differences[other]))
    if differences[nearest]:
        changes = ", ".join(f"{key}: {json.dumps(value)}" for key, value in differences[nearest].items())
        raise ConvoyError(
            f"model.{name}.init: torchvision has no {name} with these settings; for its {nearest} set {changes}"
        )
    return nearest


def _import_module(module: str, setting: str = "") -> ModuleType:
    known = [*names(), "builders"]
    if module not in known:
        where = setting.format(module) or f"model.{module}"
        raise ConvoyError(f"{where}: no such architecture; {suggest(module, known)}")
    return importlib.import_module(f"{__name__}.{module}")


def _find_class(name: str, values: Mapping[str, Any]) -> type:
    """Return the single `Classifier` subclass that the module of a network defines."""
    module = import_module(name, values)
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Classifier) and value.__module__ == module.__name__
    )
    return found


def _check_image_size(name: str, network: type, params: Any, info: DatasetInfo) -> None:
    """Check the settings by passing one batch through every head on the meta device, which computes only shapes.

    Raises:
        ConvoyError: If the network does not fit the images; the message gives the sizes that it fits.
    """

    def find_error(size: int) -> str:
        try:
            with torch.device("meta"):
                classifier = network(dataclasses.replace(info, size=size), params)
                pixels = torch.empty(params.recipe.batch_size, size, size, info.channels, dtype=torch.uint8)
            with torch.inference_mode():
                classifier.weighted_heads(classifier.normalise(pixels))
        except (RuntimeError, ValueError, AssertionError) as error:
            return str(error)
        return ""

    def find_first(sizes: Iterable[int]) -> int:
        return next((size for size in sizes if not find_error(size)), 0)

    if not (reason := find_error(info.size)):
        return
    larger = find_first(size for size in SIZES_TRIED if size > info.size)
    smaller = find_first(size for size in reversed(SIZES_TRIED) if size < info.size)
    if larger:
        # Between the last size that does not fit and the first that does.
        between = range(max([info.size, *(size for size in SIZES_TRIED if size < larger)]) + 1, larger)
        larger = [*between, larger][bisect.bisect_left(between, True, key=lambda size: not find_error(size))]
    settings = f"other settings in conf/model/{name}.yaml"
    if larger or smaller:
        nearest = " or ".join(str(size) for size in (larger, smaller) if size)
        smallest = find_first(SIZES_TRIED) if smaller else larger
        largest = find_first(reversed(SIZES_TRIED)) if larger else smaller
        fix = (
            f"set model.{name}.size to {nearest}, the nearest that fits (the smallest is {smallest}, the largest"
            f" {largest}), or {settings}"
        )
    else:
        fix = f"set {settings}, or choose another network"
    raise ConvoyError(f"model.{name}: does not fit images of {info.size} px ({reason}): {fix}")
