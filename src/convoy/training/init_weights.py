"""Transfer: a classifier that starts from weights which another training left."""

import dataclasses
import json
import re
import sys
import tempfile
import textwrap
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
from convoy.errors import ConvoyError
from convoy.hashing import sha256
from convoy.models.base import Classifier

RUN = re.compile("[0-9a-f]{32}")  # the id of an MLflow run
WEIGHTS = "weights.safetensors"
RECORD = "record.json"  # beside it, of the training that left the weights: architecture, settings, task
PICKLED = (".pth", ".pt")
IMAGENET = 1000  # classes

# (init, folder): brings the weights and the record of the champion or of a run into the folder, and says whose they are
FetchWeights = Callable[[str, Path], str]


@dataclasses.dataclass(frozen=True)
class SourceWeights:
    """Weights to start from."""

    source: str  # whose they are, in words
    weights: Mapping[str, Tensor]  # under the names of our own classifier
    classes: Sequence[str]  # of the head, in its order; none where nobody knows them
    settings: Mapping[str, Any]  # that they were trained with, as far as they are known
    sha256: str  # of the file
    verified: bool  # whether somebody vouches for that sha256: torchvision in the file's name, or MLflow
    lineage: Sequence[str] = ()  # digests of all data of ours that led to them, "" for data that nobody wrote down


def check(architecture: str, settings: Mapping[str, Any]) -> None:
    """Raises ConvoyError where the settings alone tell that their `init` can't be followed."""
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
) -> dict[str, Any]:
    """Give a fresh `classifier` the weights that `settings` (of conf/model/x.yaml) name in `init`.

    Its head stays fresh, unless the weights are of the same classes in the same order. Normalisation comes with
    the weights. Returns what a run's record says of it: init, and unless it is scratch source, sha256, verified
    (whether torchvision or MLflow vouches for that sha256), head ("kept" or "new") and lineage. `bring` is called only
    for the champion or a run, with a temporary folder in `scratch`. Raises ConvoyError for weights that aren't there,
    that don't fit, or that are no plain numbers.
    """
    check(architecture, settings)
    init = settings["init"]
    channels = classifier.task.channels
    if init == "scratch":
        return {"init": init}
    if init == "pretrained":
        _check_channels(architecture, 3, channels)  # before anything is downloaded
        donor = pretrained(classifier, architecture, settings)
    elif init == "champion" or RUN.fullmatch(init):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            source = bring(init, Path(folder))  # which has checked both files
            donor = from_file(Path(folder) / WEIGHTS, classifier, architecture, settings, source)
            donor = dataclasses.replace(donor, verified=True)
    else:
        donor = from_file(Path(init), classifier, architecture, settings)
    if "mean" in donor.weights:
        _check_channels(architecture, donor.weights["mean"].numel(), channels)
    kept = list(donor.classes) == classifier.task.classes
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
    return {
        "init": init,
        "source": donor.source,
        "sha256": donor.sha256,
        "verified": donor.verified,
        "head": "kept" if kept else "new",
        "lineage": list(donor.lineage),
    }


def load_matching(classifier: Classifier, weights: Mapping[str, Tensor], same_classes: bool) -> None:
    """Copy `weights`, a state dict, into `classifier`: without the head, unless they are of the same classes.

    Raises ConvoyError, with the classifier untouched, where a name is missing or unknown, or has another shape.
    """
    own = classifier.state_dict()  # which shares its numbers with the classifier
    taken = [name for name in own if same_classes or not classifier.is_head(name)]
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
    """The network of these settings as torchvision has it, trained on ImageNet.

    From torchvision's cache, or downloaded into it. Raises ConvoyError that names the file, where neither goes.
    """
    from torchvision.models import get_model_weights

    twin = models.torchvision_name(architecture, settings)
    published = get_model_weights(twin).IMAGENET1K_V1
    file = Path(torch.hub.get_dir(), "checkpoints", Path(published.url).name)
    if not file.exists():
        try:
            # its defaults would unpickle anything, and ask for no checksum
            published.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
        except (OSError, HTTPException, RuntimeError) as error:
            said = textwrap.shorten(str(error), 200)
            raise ConvoyError(
                f"model.{architecture}.init: {published.url} can't be downloaded ({said}); "
                f"put that file into {file.parent} by hand, or set init: scratch"
            ) from error
    donor = from_file(file, classifier, architecture, settings)
    return dataclasses.replace(donor, source=f"torchvision {twin} {published.name}")


def from_file(
    file: Path, classifier: Classifier, architecture: str, settings: Mapping[str, Any], source: str = ""
) -> SourceWeights:
    """The weights in a .safetensors file of ours, with its record.json beside it, or in a .pth file of torchvision.

    `source` is what messages call it where the file is a temporary copy. Nothing in it is run. Raises ConvoyError for
    another architecture, for what is no file of weights, and for a file that is not what torchvision published under
    its name.
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
    """Whether `file` has a name of torchvision's weights, which ends in the first 8 digits of the file's sha256.

    Raises ConvoyError where it has such a name and another sha256.
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


# weights, classes, settings and lineage of a Donor
LoadedWeights = tuple[Mapping[str, Tensor], Sequence[str], Mapping[str, Any], Sequence[str]]


def _of_ours(file: Path, architecture: str, source: str) -> LoadedWeights:
    beside = file.with_name(RECORD)
    weights_of, record_of = (f"{each.name} of {source}" if source else str(each) for each in (file, beside))
    try:
        record = json.loads(beside.read_text())
        found, classes, trained_with = record["architecture"], record["task"]["classes"], record["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConvoyError(
            f"model.{architecture}.init: {record_of} is missing or can't be read: "
            "put the record of the training that left the weights beside them"
        ) from error
    if found != architecture:
        raise ConvoyError(f"model.{architecture}.init: {weights_of} holds weights of {found}, not of {architecture}")
    try:
        return load_file(file), classes, trained_with, _lineage(record)
    except SafetensorError as error:
        raise ConvoyError(f"model.{architecture}.init: {weights_of} is no safetensors file ({error})") from error


def _lineage(record: Mapping[str, Any]) -> list[str]:
    """Of the weights that a training with this record left."""
    start = record.get("init", {"init": "unknown"})
    before = start.get("lineage", [] if start["init"] == "scratch" else [""])
    return sorted({*before, record.get("data", {}).get("digest", "")})


def _of_torchvision(
    file: Path, classifier: Classifier, architecture: str, settings: Mapping[str, Any]
) -> LoadedWeights:
    from torchvision.models import get_model_weights

    twin = models.torchvision_name(architecture, settings)
    weights = _plain(file, architecture)
    theirs = _blank(twin, IMAGENET)
    *_, last = theirs.state_dict()  # the bias of the output layer
    outputs = weights[last].numel() if last in weights else IMAGENET
    theirs = _blank(twin, outputs)
    try:
        # By torchvision's own module: an old file has another order, and counts no batches
        theirs.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        said = textwrap.shorten(str(error), 300)
        raise ConvoyError(f"model.{architecture}.init: {file} is not of torchvision's {twin} ({said})") from error
    twins = models.equivalents(architecture)
    norm = {"mean": torch.tensor(twins.mean).view(1, -1, 1, 1), "std": torch.tensor(twins.std).view(1, -1, 1, 1)}
    names = [name for name in classifier.state_dict() if name not in norm]
    layers = zip(names, twins.translate(theirs.state_dict()).values(), strict=True)
    # such a file names no classes: a thousand are taken for those of ImageNet
    classes = get_model_weights(twin).IMAGENET1K_V1.meta["categories"] if outputs == IMAGENET else []
    return {**norm, **dict(layers)}, classes, settings, []


def _blank(twin: str, classes: int) -> nn.Module:
    """Torchvision's network, with shapes and no numbers."""
    from torchvision.models import get_model

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of GoogLeNet, about first weights that are not used here
        return get_model(twin, weights=None, num_classes=classes)


def _plain(file: Path, architecture: str) -> Mapping[str, Tensor]:
    try:
        whole = not zipfile.is_zipfile(file)  # in the old form, which can't be mapped
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=not whole)
    except Exception as error:  # broken and hostile files fail in many ways
        said = textwrap.shorten(str(error), 200)
        raise ConvoyError(
            f"model.{architecture}.init: {file} is no file of plain weights, and nothing in it was run ({said})"
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
