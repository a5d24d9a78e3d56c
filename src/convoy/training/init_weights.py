"""Transfer learning: initialise a classifier with the weights of an earlier training."""

import dataclasses
import json
import re
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from convoy import models
from convoy.core.artifact_names import RECORD, WEIGHTS
from convoy.core.errors import ConvoyError, describe_error
from convoy.core.hashing import sha256
from convoy.models.base import Classifier
from convoy.training.record import InitialWeights, TrainingRecord

# The ID of an MLflow run.
RUN = re.compile("[0-9a-f]{32}")
PICKLED = (".pth", ".pt")
IMAGENET = 1000  # classes

# Called with `init` and a folder: it copies the weights and the record of the champion or of a run into the folder, and
# returns a description of their source.
FetchWeights = Callable[[str, Path], str]


@dataclasses.dataclass(frozen=True)
class SourceWeights:
    """Weights to initialise a classifier with."""

    source: str  # description for messages and the record
    weights: Mapping[str, Tensor]  # state dict with the names of our classifier
    classes: Sequence[str]  # classes of the head, in its order; empty if unknown
    settings: Mapping[str, Any]  # settings that they were trained with, as far as known
    sha256: str  # checksum of the file
    verified: bool  # whether the file name of torchvision or MLflow confirms the checksum
    # Digests of all our data sets that contributed to the weights, "" for data that was not recorded.
    lineage: Sequence[str] = ()


def check(architecture: str, settings: Mapping[str, Any]) -> None:
    """Check the setting `init` without reading any weights.

    Args:
        architecture: Name of the architecture.
        settings: Settings of the architecture, as in `conf/model/<name>.yaml`.

    Raises:
        ConvoyError: If `init` is invalid, its file does not exist, or torchvision has no network with these settings.
    """
    init = settings["init"]
    if init in ("scratch", "champion") or RUN.fullmatch(init):
        return
    if init == "pretrained" or Path(init).suffix in PICKLED:
        models.torchvision_name(architecture, settings)
    elif Path(init).suffix != Path(WEIGHTS).suffix:
        raise ConvoyError(
            f"model.{architecture}.init={init!r}: it may be scratch, pretrained, champion, the id of an MLflow run "
            "(32 digits and letters a to f), or a file of weights (.safetensors, .pth)"
        )
    if init != "pretrained" and not Path(init).is_file():
        raise ConvoyError(f"model.{architecture}.init: there is no file {init}; its path starts where dvc.yaml is")


def init_weights(
    classifier: Classifier,
    architecture: str,
    settings: Mapping[str, Any],
    bring: FetchWeights,
    scratch: Path | None = None,
) -> InitialWeights:
    """Initialise a classifier with the weights that the setting `init` names.

    The head keeps its random weights, unless the weights have the same classes in the same order. The normalisation is
    copied with the weights.

    Args:
        classifier: A newly built classifier; it is modified in place.
        architecture: Name of the architecture.
        settings: Settings of the architecture, as in `conf/model/<name>.yaml`.
        bring: Fetches the weights of the champion or a run; not called for other sources.
        scratch: Folder for the temporary folder that is passed to `bring`; the system's default if None.

    Returns:
        The description of the initial weights for the training record.

    Raises:
        ConvoyError: If the weights do not exist, do not fit the classifier, or the file holds more than tensors.
    """
    check(architecture, settings)
    init = settings["init"]
    channels = classifier.info.channels
    if init == "scratch":
        return InitialWeights(init)
    if init == "pretrained":
        # Check before anything is downloaded.
        _check_channels(architecture, 3, channels)
        donor = pretrained(classifier, architecture, settings)
    elif init == "champion" or RUN.fullmatch(init):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            # This also verifies the checksums of both files.
            source = bring(init, Path(folder))
            donor = from_file(Path(folder) / WEIGHTS, classifier, architecture, settings, source)
            donor = dataclasses.replace(donor, verified=True)
    else:
        donor = from_file(Path(init), classifier, architecture, settings)
    if "mean" in donor.weights:
        _check_channels(architecture, donor.weights["mean"].numel(), channels)
    kept = list(donor.classes) == classifier.info.classes
    try:
        load_matching(classifier, donor.weights, same_classes=kept)
    except ConvoyError as error:
        others = {
            key: value
            for key, value in donor.settings.items()
            if key not in ("init", "recipe") and settings.get(key) != value
        }
        mend = ", ".join(f"{key}: {json.dumps(value)}" for key, value in others.items())
        said = f"model.{architecture}.init: {donor.source}: {error}" + (f"; set {mend}" if mend else "")
        raise ConvoyError(said) from None
    return InitialWeights(
        init, donor.source, donor.sha256, donor.verified, head="kept" if kept else "new", lineage=tuple(donor.lineage)
    )


def load_matching(classifier: Classifier, weights: Mapping[str, Tensor], same_classes: bool) -> None:
    """Copy the weights of a state dict into a classifier.

    Args:
        classifier: The classifier; it is modified in place.
        weights: State dict to copy from.
        same_classes: Whether the weights have the same classes, so that the head is copied, too.

    Raises:
        ConvoyError: If a name is missing or unknown, or a shape differs; the classifier is then unchanged.
    """
    # The tensors share their memory with the classifier.
    own = classifier.state_dict()
    taken = [name for name in own if same_classes or not classifier.is_in_head(name)]
    if wrong := list(_misfits(own, taken, weights)):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConvoyError(f"the weights don't fit the settings: {'; '.join(wrong[:3])}{more}")
    for name in taken:
        own[name].copy_(weights[name])


def _misfits(own: Mapping[str, Tensor], taken: Sequence[str], weights: Mapping[str, Tensor]) -> Iterator[str]:
    for name in taken:
        if name not in weights:
            yield f"{name} is missing"
        elif weights[name].shape != own[name].shape:
            yield f"{name} has the shape {list(weights[name].shape)}, and here {list(own[name].shape)}"
    yield from (f"{name} is unknown here" for name in weights if name not in own)


def pretrained(classifier: Classifier, architecture: str, settings: Mapping[str, Any]) -> SourceWeights:
    """Load torchvision's ImageNet weights for these settings, downloading them into torchvision's cache if needed.

    Args:
        classifier: The classifier whose names the weights are converted to.
        architecture: Name of the architecture.
        settings: Settings of the architecture, as in `conf/model/<name>.yaml`.

    Raises:
        ConvoyError: If torchvision has no such network, or the file can be neither read nor downloaded.
    """
    from torchvision.models import get_model_weights

    twin = models.torchvision_name(architecture, settings)
    published = get_model_weights(twin).IMAGENET1K_V1
    file = Path(torch.hub.get_dir(), "checkpoints", Path(published.url).name)
    if not file.exists():
        try:
            # By default, torchvision would unpickle any object and verify no checksum.
            published.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
        except (OSError, HTTPException, RuntimeError) as error:
            raise ConvoyError(
                f"model.{architecture}.init: {published.url} can't be downloaded ({describe_error(error, 200)}); "
                f"put that file into {file.parent} by hand, or set init: scratch"
            ) from error
    donor = from_file(file, classifier, architecture, settings)
    return dataclasses.replace(donor, source=f"torchvision {twin} {published.name}")


def from_file(
    file: Path, classifier: Classifier, architecture: str, settings: Mapping[str, Any], source: str = ""
) -> SourceWeights:
    """Load weights from a file without running any code that it contains.

    Args:
        file: A .safetensors file of ours with its record.json in the same folder, or a .pth file of torchvision.
        classifier: The classifier whose names the weights are converted to.
        architecture: Name of the architecture.
        settings: Settings of the architecture, as in `conf/model/<name>.yaml`.
        source: Description of the source for messages, if the file is a temporary copy.

    Raises:
        ConvoyError: If the file is of another architecture, does not contain weights, or differs from the file that
            torchvision published under its name.
    """
    try:
        digest = sha256(file)
    except OSError as error:
        raise ConvoyError(f"model.{architecture}.init: {file} can't be read ({error.strerror})") from error
    if file.suffix in PICKLED:
        verified = _is_published(file, digest, architecture, settings)
        content = _of_torchvision(file, classifier, architecture, settings)
    else:
        verified = False
        content = _of_ours(file, architecture, source)
    weights, classes, trained_with, lineage = content
    return SourceWeights(source or str(file), weights, classes, trained_with, digest, verified, lineage)


def _is_published(file: Path, digest: str, architecture: str, settings: Mapping[str, Any]) -> bool:
    """Return whether torchvision published the file, judging by its name and checksum.

    The names of torchvision's files end in the first 8 digits of their sha256.

    Raises:
        ConvoyError: If the file has such a name but another checksum.
    """
    from torchvision.models import get_model_weights

    published = {
        Path(weights.url).name for weights in get_model_weights(models.torchvision_name(architecture, settings))
    }
    if file.name not in published:
        return False
    expected = file.stem.rpartition("-")[2]
    if not digest.startswith(expected):
        again = "the next run downloads it again" if settings["init"] == "pretrained" else "download it again"
        raise ConvoyError(
            f"model.{architecture}.init: {file} is damaged, or not the file that torchvision published under this "
            f"name: its sha256 begins with {digest[: len(expected)]} instead of {expected}. Remove it, and {again}; if "
            "it is a file of your own, give it another name"
        )
    return True


# Weights, classes, settings and lineage of `SourceWeights`.
LoadedWeights = tuple[Mapping[str, Tensor], Sequence[str], Mapping[str, Any], Sequence[str]]


def _of_ours(file: Path, architecture: str, source: str) -> LoadedWeights:
    beside = file.with_name(RECORD)
    weights_of, record_of = (f"{each.name} of {source}" if source else str(each) for each in (file, beside))
    try:
        record = TrainingRecord.parse(beside.read_bytes(), record_of)
    except (OSError, ConvoyError) as error:
        raise ConvoyError(
            f"model.{architecture}.init: {record_of} is missing or can't be read: "
            "put the record of the training that left the weights beside them"
        ) from error
    if record.architecture != architecture:
        raise ConvoyError(
            f"model.{architecture}.init: {weights_of} holds weights of {record.architecture}, not of {architecture}"
        )
    try:
        return load_file(file), record.dataset_info.classes, record.settings, record.lineage
    except SafetensorError as error:
        raise ConvoyError(f"model.{architecture}.init: {weights_of} is no safetensors file ({error})") from error


def _of_torchvision(
    file: Path, classifier: Classifier, architecture: str, settings: Mapping[str, Any]
) -> LoadedWeights:
    from torchvision.models import get_model_weights

    twin = models.torchvision_name(architecture, settings)
    weights = _plain(file, architecture)
    theirs = _blank(twin, IMAGENET)
    # The last name is the bias of the output layer.
    *_, last = theirs.state_dict()
    outputs = weights[last].numel() if last in weights else IMAGENET
    theirs = _blank(twin, outputs)
    try:
        # Load with torchvision's own module, because old files have another order and no batch counters.
        theirs.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ConvoyError(
            f"model.{architecture}.init: {file} is not of torchvision's {twin} ({describe_error(error, 300)})"
        ) from error
    twins = models.equivalents(architecture)
    norm = {"mean": torch.tensor(twins.mean).view(1, -1, 1, 1), "std": torch.tensor(twins.std).view(1, -1, 1, 1)}
    names = [name for name in classifier.state_dict() if name not in norm]
    layers = zip(names, twins.translate(theirs.state_dict()).values(), strict=True)
    # The file does not name its classes; a thousand classes are assumed to be those of ImageNet.
    classes = get_model_weights(twin).IMAGENET1K_V1.meta["categories"] if outputs == IMAGENET else []
    return {**norm, **dict(layers)}, classes, settings, []


def _blank(twin: str, classes: int) -> nn.Module:
    """Create torchvision's network on the meta device, with shapes but no values."""
    from torchvision.models import get_model

    with torch.device("meta"), warnings.catch_warnings():
        # GoogLeNet warns about its initial weights, which are not used here.
        warnings.simplefilter("ignore", FutureWarning)
        return get_model(twin, weights=None, num_classes=classes)


def _plain(file: Path, architecture: str) -> Mapping[str, Tensor]:
    try:
        # Files in the old format cannot be memory-mapped.
        whole = not zipfile.is_zipfile(file)
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=not whole)
    # Broken and malicious files raise many kinds of exceptions.
    except Exception as error:
        raise ConvoyError(
            f"model.{architecture}.init: {file} is no file of plain weights, and nothing in it was run "
            f"({describe_error(error, 200)})"
        ) from error
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ConvoyError(f"model.{architecture}.init: {file} holds more than tensors: save a state_dict() in it")
    return weights


def _check_channels(architecture: str, theirs: int, ours: int) -> None:
    if theirs != ours:
        raise ConvoyError(
            f"model.{architecture}.init: the weights are for images with {theirs} channels, and these have {ours}: "
            f"set preprocess.channels: {theirs}"
        )
