"""The architectures. The folder is the registry: `models/resnet.py` is what `conf/model/resnet.yaml` configures."""

import bisect
import dataclasses
import difflib
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

from convoy.config import typed
from convoy.data.dataset_info import DatasetInfo
from convoy.errors import ConvoyError
from convoy.models.base import Classifier

# modules of this folder that are no architectures
SHARED = ("base", "layers")


@dataclasses.dataclass(frozen=True)
class TorchvisionEquivalent:
    """The networks of torchvision that an architecture is equal to, and what makes their weights ours.

    A module that has some holds them as `TWINS`. The layers stand in the same order on both sides.
    """

    settings: Mapping[str, Mapping[str, Any]]  # under torchvision's name of each: those that the weights depend on
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of the images that the weights were trained with
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    translate: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict  # to as many tensors as ours, in our order


def names() -> list[str]:
    """Return the names of all architectures, without importing any."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in SHARED)


def schema(name: str) -> type:
    """The `Params` of architecture `name`: what `conf/model/<name>.yaml` must hold."""
    return _module(name).Params


def build(name: str, values: Mapping[str, Any], task: DatasetInfo) -> Classifier:
    """Architecture `name` with `values` from `conf/model/<name>.yaml`, its weights from torch's global generator.

    Raises ConvoyError for an unknown name, a wrong setting, or settings that the images are too small for.
    """
    params: Any = typed(schema(name), values, f"model.{name}")
    _rehearse(name, params, task)
    return _class(name)(task, params)


def restore(name: str, values: Mapping[str, Any], task: DatasetInfo, weights: Path) -> Classifier:
    """A built classifier with the `weights` of a safetensors file, in evaluation mode."""
    classifier = build(name, values, task)
    try:
        classifier.load_state_dict(load_file(weights), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConvoyError(f"{weights}: not the weights of this {name}; train it again ({error})") from error
    return classifier.eval()


def equivalents(name: str) -> TorchvisionEquivalent:
    """What torchvision has of architecture `name`."""
    return getattr(_module(name), "TWINS", TorchvisionEquivalent({}))


def torchvision_name(name: str, values: Mapping[str, Any]) -> str:
    """Torchvision's name of the network that architecture `name` is with `values`.

    Raises ConvoyError that says what to set for the nearest one.
    """
    wanted = {
        twin: {key: value for key, value in settings.items() if values[key] != value}
        for twin, settings in equivalents(name).settings.items()
    }
    if not wanted:
        raise ConvoyError(f"model.{name}.init: torchvision has no {name} with weights from ImageNet; set init: scratch")
    nearest = min(wanted, key=lambda twin: len(wanted[twin]))
    if wanted[nearest]:
        mend = ", ".join(f"{key}: {json.dumps(value)}" for key, value in wanted[nearest].items())
        raise ConvoyError(
            f"model.{name}.init: torchvision has no {name} with these settings; for its {nearest} set {mend}"
        )
    return nearest


def _module(name: str) -> ModuleType:
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConvoyError(f"model.{name}: no such architecture; {hint}There are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def _class(name: str) -> type:
    """The one classifier that the module defines."""
    module = _module(name)
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Classifier) and value.__module__ == module.__name__
    )
    return found


def _rehearse(name: str, params: Any, task: DatasetInfo) -> None:
    """One batch through every head on the meta device, which has shapes and no numbers.

    Raises ConvoyError with the smallest images that do fit, if these don't.
    """

    def refusal(size: int) -> str:
        try:
            with torch.device("meta"):
                classifier = _class(name)(dataclasses.replace(task, size=size), params)
                pixels = torch.empty(params.recipe.batch_size, size, size, task.channels, dtype=torch.uint8)
            with torch.inference_mode():
                classifier.heads(classifier.normalise(pixels))
        except (RuntimeError, ValueError) as error:
            return str(error)
        return ""

    if reason := refusal(task.size):
        sizes = range(task.size, 257)
        smallest = bisect.bisect_left(sizes, True, key=lambda size: not refusal(size))
        fits = f"images of {sizes[smallest]} px or more" if smallest < len(sizes) else "other numbers for any image"
        raise ConvoyError(
            f"model.{name}: does not fit images of {task.size} px ({reason}). It needs {fits}, "
            f"or a smaller kernel, stride or pool in conf/model/{name}.yaml"
        )
