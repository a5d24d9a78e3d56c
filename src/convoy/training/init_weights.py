"""Transfer learning: initialise a classifier with the weights of an earlier training."""

import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from convoy import models
from convoy.core.artifact_names import RECORD, WEIGHTS
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.models.base import Classifier
from convoy.training import builder_weights, torchvision_weights
from convoy.training.record import InitialWeights, TrainingRecord
from convoy.training.torchvision_weights import TORCH_SUFFIXES

# The ID of an MLflow run.
RUN_ID = re.compile("[0-9a-f]{32}")
# Largest number of names in a message about weights that don't fit.
MAX_LISTED_WEIGHTS = 3

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


def check_init(architecture: str, settings: Mapping[str, Any]) -> None:
    """Check the setting `init` without reading any weights.

    Args:
        architecture: Name of the architecture.
        settings: Settings of the architecture, as in `conf/model/<name>.yaml`.

    Raises:
        ConvoyError: If `init` is invalid, its file does not exist, or torchvision has no network with these settings.
    """
    init = settings["init"]
    if init in ("scratch", "champion") or RUN_ID.fullmatch(init):
        return
    is_published = init == "pretrained" or Path(init).suffix in TORCH_SUFFIXES
    if is_published and not is_built(settings):
        models.torchvision_name(architecture, settings)
    elif not is_published and Path(init).suffix != Path(WEIGHTS).suffix:
        raise ConvoyError(
            f"model.{architecture}.init={init!r}: it may be scratch, pretrained, champion, the id of an MLflow run "
            "(32 digits and letters a to f), or a file of weights (.safetensors, .pth)"
        )
    if init != "pretrained" and not Path(init).is_file():
        raise ConvoyError(
            f"model.{architecture}.init: there is no file {init}; the path is relative to the folder of dvc.yaml"
        )


def init_weights(
    classifier: Classifier,
    architecture: str,
    settings: Mapping[str, Any],
    fetch: FetchWeights,
    scratch: Path | None = None,
) -> InitialWeights:
    """Initialise a classifier with the weights that the setting `init` names.

    The head keeps its random weights, unless the weights have the same classes in the same order. The normalisation is
    copied with the weights.

    Args:
        classifier: A newly built classifier; it is modified in place.
        architecture: Name of the architecture.
        settings: Settings of the architecture, as in `conf/model/<name>.yaml`.
        fetch: Fetches the weights of the champion or a run; not called for other sources.
        scratch: Folder for the temporary folder that is passed to `fetch`; the system's default if None.

    Returns:
        The description of the initial weights for the training record.

    Raises:
        ConvoyError: If the weights do not exist, do not fit the classifier, or the file holds more than tensors.
    """
    check_init(architecture, settings)
    init = settings["init"]
    channels = classifier.mean.numel()
    if init == "scratch":
        return InitialWeights(init)
    if init == "pretrained":
        # Check before anything is downloaded.
        _check_channels(architecture, 3, channels)
        library = builder_weights if is_built(settings) else torchvision_weights
        file, source = library.download_weights(architecture, settings)
        loaded = dataclasses.replace(load_source_weights(file, classifier, architecture, settings), source=source)
    elif init == "champion" or RUN_ID.fullmatch(init):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            # This also verifies the checksums of both files.
            source = fetch(init, Path(folder))
            loaded = load_source_weights(Path(folder) / WEIGHTS, classifier, architecture, settings, source)
            loaded = dataclasses.replace(loaded, verified=True)
    else:
        loaded = load_source_weights(Path(init), classifier, architecture, settings)
    if "mean" in loaded.weights:
        _check_channels(architecture, loaded.weights["mean"].numel(), channels)
    same_classes = list(loaded.classes) == classifier.info.classes
    try:
        load_matching(classifier, loaded.weights, same_classes)
    except ConvoyError as error:
        changes = [
            f"{key}: {json.dumps(value)}"
            for key, value in loaded.settings.items()
            if key not in ("init", "recipe") and settings.get(key) != value
        ]
        fix = f"; set {', '.join(changes)}" if changes else ""
        raise ConvoyError(f"model.{architecture}.init: {loaded.source}: {error}{fix}") from None
    head: Literal["kept", "new"] = "kept" if same_classes else "new"
    return InitialWeights(init, loaded.source, loaded.sha256, loaded.verified, head, tuple(loaded.lineage))


def is_built(settings: Mapping[str, Any]) -> bool:
    """Return whether a network is built by another library, whose weights have the names of that library."""
    return settings.get("module") == "builders"


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
    names = [name for name in own if same_classes or not classifier.is_in_head(name)]
    if mismatches := list(_find_mismatches(own, names, weights)):
        listed, hidden = mismatches[:MAX_LISTED_WEIGHTS], len(mismatches) - MAX_LISTED_WEIGHTS
        more = f" and {hidden} more" if hidden > 0 else ""
        raise ConvoyError(f"the weights don't fit the settings: {'; '.join(listed)}{more}")
    for name in names:
        own[name].copy_(weights[name])


def _find_mismatches(own: Mapping[str, Tensor], names: Sequence[str], weights: Mapping[str, Tensor]) -> Iterator[str]:
    for name in names:
        if name not in weights:
            yield f"{name} is missing"
        elif weights[name].shape != own[name].shape:
            yield f"{name} has the shape {list(weights[name].shape)} instead of {list(own[name].shape)}"
    yield from (f"{name} is unknown" for name in weights if name not in own)


def load_source_weights(
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
        checksum = sha256(file)
    except OSError as error:
        raise ConvoyError(f"model.{architecture}.init: {file} can't be read ({error.strerror})") from error
    # A safetensors file of ours has a record beside it, one of timm has none.
    is_own = file.suffix not in TORCH_SUFFIXES and (not is_built(settings) or file.with_name(RECORD).exists())
    if is_own:
        return _load_own_weights(file, checksum, architecture, source)
    library = builder_weights if is_built(settings) else torchvision_weights
    expected = library.find_published_checksum(file, architecture, settings)
    if not checksum.startswith(expected):
        download = "the next run downloads it again" if settings["init"] == "pretrained" else "download it again"
        raise ConvoyError(
            f"model.{architecture}.init: {file} is damaged, or not the file that was published under this name: its "
            f"sha256 begins with {checksum[:8]} instead of {expected[:8]}. Remove it, and {download}; if it is a file "
            "of your own, give it another name"
        )
    weights, classes = library.load_weights(file, classifier, architecture, settings)
    return SourceWeights(source or str(file), weights, classes, settings, checksum, bool(expected))


def _load_own_weights(file: Path, checksum: str, architecture: str, source: str) -> SourceWeights:
    record_file = file.with_name(RECORD)
    weights_name, record_name = (f"{each.name} of {source}" if source else str(each) for each in (file, record_file))
    try:
        record = TrainingRecord.parse(record_file.read_bytes(), record_name)
    except (OSError, ConvoyError) as error:
        raise ConvoyError(
            f"model.{architecture}.init: {record_name} is missing or can't be read: "
            "put the record of the training that produced the weights into their folder"
        ) from error
    if record.architecture != architecture:
        raise ConvoyError(
            f"model.{architecture}.init: {weights_name} holds weights of {record.architecture}, not of {architecture}"
        )
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ConvoyError(f"model.{architecture}.init: {weights_name} is no safetensors file ({error})") from error
    return SourceWeights(
        source or str(file),
        weights,
        record.dataset_info.classes,
        record.settings,
        checksum,
        verified=False,
        lineage=record.lineage,
    )


def _check_channels(architecture: str, theirs: int, ours: int) -> None:
    if theirs != ours:
        raise ConvoyError(
            f"model.{architecture}.init: the weights are for images with {theirs} channels instead of {ours}: "
            f"set preprocess.channels: {theirs}"
        )
