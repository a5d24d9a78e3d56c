"""The architectures, found by module name: `conf/model/resnet.yaml` configures `models/resnet.py`."""

import bisect
import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from convoy.core.config import validate
from convoy.core.errors import ConvoyError, suggest
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models.base import Classifier

# Modules of this package that do not define an architecture.
SHARED = ("base",)


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
    """Return the names of all architectures without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED)


def schema(name: str) -> type:
    """Return the `Params` class of architecture `name`, the schema of `conf/model/<name>.yaml`."""
    return _import_architecture(name).Params


def build(name: str, values: Mapping[str, Any], info: DatasetInfo) -> Classifier:
    """Build a classifier with initial weights drawn from torch's global random generator.

    Args:
        name: Name of the architecture.
        values: Settings, as in `conf/model/<name>.yaml`.
        info: Classes, image size and channel statistics of the data set.

    Raises:
        ConvoyError: If the name is unknown, a setting is invalid, or the images are too small for the settings.
    """
    params: Any = validate(schema(name), values, f"model.{name}")
    _check_image_size(name, params, info)
    return _find_class(name)(info, params)


def restore(name: str, values: Mapping[str, Any], info: DatasetInfo, weights: Path) -> Classifier:
    """Build a classifier, load its weights from a safetensors file and switch it to evaluation mode.

    Args:
        name: Name of the architecture.
        values: Settings that the weights were trained with.
        info: Classes, image size and channel statistics of the data set.
        weights: Path of the safetensors file.

    Raises:
        ConvoyError: If the name is unknown, a setting is invalid, or the file does not contain the weights of this
            classifier.
    """
    # The training has passed the check of the image size, whose import of torch's compiler takes 1.5 s.
    params: Any = validate(schema(name), values, f"model.{name}")
    try:
        classifier: Classifier = _find_class(name)(info, params)
        classifier.load_state_dict(load_file(weights), strict=True)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ConvoyError(f"{weights}: not the weights of this {name}; train it again ({error})") from error
    return classifier.eval()


def equivalents(name: str) -> TorchvisionEquivalent:
    """Return the torchvision equivalents of architecture `name`, which may be empty."""
    return getattr(_import_architecture(name), "TORCHVISION_EQUIVALENTS", TorchvisionEquivalent({}))


def torchvision_name(name: str, values: Mapping[str, Any]) -> str:
    """Return torchvision's name for architecture `name` with the settings `values`.

    Raises:
        ConvoyError: If torchvision has no such network; the message lists the settings of the most similar one.
    """
    differences = {
        other: {key: value for key, value in settings.items() if values[key] != value}
        for other, settings in equivalents(name).settings.items()
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


def _import_architecture(name: str) -> ModuleType:
    if name not in names():
        raise ConvoyError(f"model.{name}: no such architecture; {suggest(name, names())}")
    return importlib.import_module(f"{__name__}.{name}")


def _find_class(name: str) -> type:
    """Return the single `Classifier` subclass that the module of `name` defines."""
    module = _import_architecture(name)
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Classifier) and value.__module__ == module.__name__
    )
    return found


def _check_image_size(name: str, params: Any, info: DatasetInfo) -> None:
    """Check the settings by passing one batch through every head on the meta device, which computes only shapes.

    Raises:
        ConvoyError: If the images are too small; the message gives the smallest size that fits.
    """

    def find_error(size: int) -> str:
        try:
            with torch.device("meta"):
                classifier = _find_class(name)(dataclasses.replace(info, size=size), params)
                pixels = torch.empty(params.recipe.batch_size, size, size, info.channels, dtype=torch.uint8)
            with torch.inference_mode():
                classifier.weighted_heads(classifier.normalise(pixels))
        except (RuntimeError, ValueError) as error:
            return str(error)
        return ""

    if reason := find_error(info.size):
        sizes = range(info.size, 257)
        smallest = bisect.bisect_left(sizes, True, key=lambda size: not find_error(size))
        larger = f"images of {sizes[smallest]} px or more, or " if smallest < len(sizes) else ""
        raise ConvoyError(
            f"model.{name}: does not fit images of {info.size} px ({reason}). It needs {larger}"
            f"a smaller kernel, stride or pool in conf/model/{name}.yaml"
        )
