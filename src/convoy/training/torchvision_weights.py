"""Weights of torchvision's networks, converted to the names of our classifiers."""

import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convoy import models
from convoy.core.errors import ConvoyError, describe_error
from convoy.models.base import Classifier

# Suffixes of files that torch.save wrote.
TORCH_SUFFIXES = (".pth", ".pt")
IMAGENET_CLASSES = 1000


def download_weights(architecture: str, settings: Mapping[str, Any]) -> tuple[Path, str]:
    """Download torchvision's ImageNet weights for these settings, unless they are in torchvision's cache.

    Args:
        architecture: Name of the architecture.
        settings: Settings of the architecture, as in `conf/model/<name>.yaml`.

    Returns:
        The path of the file, and a description of the weights.

    Raises:
        ConvoyError: If torchvision has no such network, or the file can't be downloaded.
    """
    from torchvision.models import get_model_weights

    torchvision_name = models.torchvision_name(architecture, settings)
    published = get_model_weights(torchvision_name).IMAGENET1K_V1
    file = Path(torch.hub.get_dir(), "checkpoints", Path(published.url).name)
    download(architecture, published, file)
    return file, f"torchvision {torchvision_name} {published.name}"


def download(architecture: str, published: Any, file: Path) -> None:
    """Download the file of published weights into torch's cache, unless it is there.

    Args:
        architecture: Name of the architecture, for messages.
        published: The weights, an entry of a `WeightsEnum` of torchvision.
        file: The file in the cache.

    Raises:
        ConvoyError: If the file can't be downloaded, or its sha256 does not begin as its name says.
    """
    if file.exists():
        return
    try:
        # By default, torchvision would unpickle any object and verify no checksum.
        published.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
    except (OSError, HTTPException, RuntimeError) as error:
        raise ConvoyError(
            f"model.{architecture}.init: {published.url} can't be downloaded ({describe_error(error, 200)}); "
            f"put that file into {file.parent} by hand, or set init: scratch"
        ) from error


def find_published_checksum(file: Path, architecture: str, settings: Mapping[str, Any]) -> str:
    """Return the beginning of the sha256 that the name of a file states, if it is one of torchvision; else "".

    The names of torchvision's files end in the first 8 digits of their sha256.

    Args:
        file: File of weights.
        architecture: Name of the architecture.
        settings: Settings of the architecture, as in `conf/model/<name>.yaml`.
    """
    from torchvision.models import get_model_weights

    published = get_model_weights(models.torchvision_name(architecture, settings))
    return file.stem.rpartition("-")[2] if file.name in {Path(weights.url).name for weights in published} else ""


def load_weights(
    file: Path, classifier: Classifier, architecture: str, settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Sequence[str]]:
    """Load the weights of a torchvision network from a file without running any code that it contains.

    Args:
        file: File that holds a state dict of torchvision.
        classifier: The classifier whose names the weights are converted to.
        architecture: Name of the architecture.
        settings: Settings of the architecture, as in `conf/model/<name>.yaml`.

    Returns:
        A state dict with the names of `classifier`, and the classes of its head, which are empty if unknown.

    Raises:
        ConvoyError: If the file holds anything but the weights of the torchvision network with these settings.
    """
    from torchvision.models import get_model_weights

    torchvision_name = models.torchvision_name(architecture, settings)
    weights = load_tensors(file, architecture)
    network = make_meta_network(torchvision_name, IMAGENET_CLASSES)
    # The last name is the bias of the output layer.
    *_, last = network.state_dict()
    outputs = weights[last].numel() if last in weights else IMAGENET_CLASSES
    network = make_meta_network(torchvision_name, outputs)
    try:
        # Load with torchvision's own module, because old files have another order and no batch counters.
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ConvoyError(
            f"model.{architecture}.init: {file} does not hold the weights of torchvision's {torchvision_name} "
            f"({describe_error(error, 300)})"
        ) from error
    equivalents = models.equivalents(architecture, settings)
    normalisation = {name: torch.tensor(getattr(equivalents, name)).view(1, -1, 1, 1) for name in ("mean", "std")}
    names = [name for name in classifier.state_dict() if name not in normalisation]
    layers = zip(names, equivalents.translate(network.state_dict()).values(), strict=True)
    # The file does not name its classes; a thousand classes are assumed to be those of ImageNet.
    is_imagenet = outputs == IMAGENET_CLASSES
    classes = get_model_weights(torchvision_name).IMAGENET1K_V1.meta["categories"] if is_imagenet else []
    return {**normalisation, **dict(layers)}, classes


def make_meta_network(torchvision_name: str, classes: int) -> nn.Module:
    """Create a network of torchvision on the meta device, with shapes but no values."""
    from torchvision.models import get_model

    with torch.device("meta"), warnings.catch_warnings():
        # GoogLeNet warns about its initial weights, which are not used here.
        warnings.simplefilter("ignore", FutureWarning)
        return get_model(torchvision_name, weights=None, num_classes=classes)


def load_tensors(file: Path, architecture: str) -> Mapping[str, Tensor]:
    """Load a state dict that torch.save wrote, without running any code in the file."""
    try:
        # Files in the old format, which is not a ZIP archive, cannot be memory-mapped.
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    # Broken and malicious files raise many kinds of exceptions.
    except Exception as error:
        raise ConvoyError(
            f"model.{architecture}.init: {file} is no file of plain weights, and no code in it was run "
            f"({describe_error(error, 200)})"
        ) from error
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ConvoyError(
            f"model.{architecture}.init: {file} holds other objects than tensors: save a state_dict() in it"
        )
    return weights
