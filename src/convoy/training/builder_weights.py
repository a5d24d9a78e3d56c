"""Published weights of the networks of torchvision and timm, as their own libraries name them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from convoy import models
from convoy.core.errors import ConvoyError, describe_error
from convoy.models.base import Classifier
from convoy.training.torchvision_weights import IMAGENET_CLASSES, download, load_tensors

# Seconds to wait for an answer of the Hugging Face Hub.
HUB_TIMEOUT_S = 10
SHA256_DIGITS = 64


def download_weights(architecture: str, settings: Mapping[str, Any]) -> tuple[Path, str]:
    """Download the published weights of a network, unless they are in the cache of torch or of the Hugging Face Hub.

    Args:
        architecture: Name of the network.
        settings: Settings of the network, as in `conf/model/<name>.yaml`.

    Returns:
        The path of the file, and a description of the weights.

    Raises:
        ConvoyError: If there are no such weights, or the file can't be downloaded.
    """
    published = _find_published(architecture, settings)
    if published.hub:
        return _download_from_hub(architecture, published), published.name
    file = Path(torch.hub.get_dir(), "checkpoints", published.file_name)
    download(architecture, published.source, file)
    return file, published.name


def _download_from_hub(architecture: str, published: Any) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(published.hub, "model.safetensors", etag_timeout=HUB_TIMEOUT_S))
    except (OSError, LocalEntryNotFoundError, HfHubHTTPError, RuntimeError, ValueError) as error:
        raise ConvoyError(
            f"model.{architecture}.init: model.safetensors of https://huggingface.co/{published.hub} is not in the "
            f"cache and can't be downloaded ({describe_error(error, 200)}); set init to the path of a file with these "
            "weights, or to scratch"
        ) from error


def find_published_checksum(file: Path, architecture: str, settings: Mapping[str, Any]) -> str:
    """Return the beginning of the sha256 that the name of a file states; "" if it states none.

    torchvision's file names end in the first 8 digits of the sha256. The cache of the Hugging Face Hub names a file by
    its complete sha256, which the Hub has stated.

    Args:
        file: File of weights.
        architecture: Name of the network.
        settings: Settings of the network, as in `conf/model/<name>.yaml`.
    """
    published = _find_published(architecture, settings, is_required=False)
    if published and file.name == published.file_name:
        return file.stem.rpartition("-")[2]
    blob = file.resolve().name
    return blob if file.is_symlink() and len(blob) == SHA256_DIGITS else ""


def load_weights(
    file: Path, classifier: Classifier, architecture: str, settings: Mapping[str, Any]
) -> tuple[dict[str, Tensor], Sequence[str]]:
    """Load a state dict of the library's network from a file without running any code that it contains.

    Args:
        file: File in the format of torch.save or safetensors.
        classifier: The classifier whose names the weights are converted to.
        architecture: Name of the network.
        settings: Settings of the network, as in `conf/model/<name>.yaml`.

    Returns:
        A state dict with the names of `classifier`, and the classes of its head, which are empty if unknown.

    Raises:
        ConvoyError: If the file holds anything but tensors.
    """
    if file.suffix == ".safetensors":
        try:
            tensors: Mapping[str, Tensor] = load_file(file)
        except SafetensorError as error:
            raise ConvoyError(f"model.{architecture}.init: {file} is no safetensors file ({error})") from error
    else:
        tensors = load_tensors(file, architecture)
    module: Any = models.import_module(architecture, settings)
    published = _find_published(architecture, settings, is_required=False)
    weights = module.normalisation(published) | module.rename_weights(tensors, classifier)
    heads = [value for name, value in weights.items() if classifier.is_in_head(name) and value.ndim == 1]
    # The file does not name its classes; a thousand classes are assumed to be those of ImageNet.
    is_imagenet = published is not None and [len(head) for head in heads] == [IMAGENET_CLASSES]
    return weights, published.classes if is_imagenet else []


def _find_published(architecture: str, settings: Mapping[str, Any], *, is_required: bool = True) -> Any:
    """Return the `PublishedWeights` that the settings name, or None if there are none and none are required."""
    module: Any = models.import_module(architecture, settings)
    try:
        with module.prefix_errors(f"model.{architecture}"):
            return module.find_published(models.parse(architecture, settings))
    except ConvoyError:
        if is_required:
            raise
        return None
