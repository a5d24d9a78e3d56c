"""Torchvision data sets: published data sets that torchvision downloads and verifies."""

import functools
import inspect
import os
import shutil
import socket
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convoy.core.disk import explain_full_disk
from convoy.core.errors import ConvoyError, describe_error, suggest
from convoy.data.image_io import InvalidImageError, to_grey_or_rgb
from convoy.data.sources.base import SPLIT_WORDS, Sample, Source, TorchvisionSet


def read_torchvision(params: TorchvisionSet, folder: Path) -> Source:
    """Read a torchvision data set, downloading it first if it is not in `folder` yet.

    Args:
        params: The name of the data set and the arguments that select its splits.
        folder: The root folder of the data set, as torchvision expects it.

    Returns:
        The source of all images in the selected splits.

    Raises:
        ConvoyError: If torchvision does not have the data set, if the arguments are invalid for it or select images
            without labels, if its images are not each of one class, or if the download fails.
    """
    import torchvision

    known = [name for name in torchvision.datasets.__all__ if inspect.isclass(getattr(torchvision.datasets, name))]
    if params.name not in known:
        raise ConvoyError(
            f"dataset.torchvision.name={params.name!r}: torchvision has no such data set; {suggest(params.name, known)}"
        )
    make = getattr(torchvision.datasets, params.name)
    if "loader" in inspect.signature(make).parameters:
        # The images are files, and only their names are taken here. The same holds for OxfordIIITPet, which opens its
        # files itself but lists them (see `Unopened`). All other data sets are decoded here by torchvision, one image
        # at a time.
        make = functools.partial(make, loader=str)
    # Complete the replacement of the folder if an earlier process was killed during it.
    _keep_others(folder)
    try:
        parts = _parts(make, params, folder)
    except (TypeError, ValueError) as error:
        raise ConvoyError(f"dataset.torchvision.splits={params.splits} is not for {params.name}: {error}") from error
    # torchvision raises these if the data set is missing or incomplete.
    except (OSError, RuntimeError):
        parts = _downloaded(make, params, folder)
    try:
        classes = _classes(parts.values())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConvoyError(
            f"dataset.torchvision.name={params.name!r}: its images are not each of one class ({error}); take a set that"
            " is for classification, or select its classes in dataset.torchvision.splits"
        ) from error
    if min(classes, default=0) < 0:
        raise ConvoyError(
            f"dataset.torchvision.splits={params.splits} selects images of {params.name} that have no label:"
            " leave those out"
        )
    return Source(
        classes=list(classes.values()),
        count=sum(len(part) for part in parts.values()),
        members=(
            _member(part, row, f"{params.name}/{split}/{row}", SPLIT_WORDS.get(split, ""), classes, folder)
            for split, part in parts.items()
            for row in range(len(part))
        ),
    )


class Unopened:
    """A data set that returns file names in place of the images that torchvision would open.

    Only ingestion is protected against what a file may contain.
    """

    def __init__(self, part: Any) -> None:
        targets = getattr(part, "_target_types", ["category"])
        if targets != ["category"]:
            raise ConvoyError(
                f"dataset.torchvision.splits selects target_types={targets} of {type(part).__name__}, whose classes"
                " are its categories: leave target_types out"
            )
        self.classes, self.targets, self.files = part.classes, part._labels, part._images

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[str, int]:
        return str(self.files[row]), self.targets[row]


def _member(part: Any, row: int, path: str, split: str, classes: dict[int, str], folder: Path) -> Sample:
    """Return one image of a split as a sample, named after its file if it has its own, else `path`."""
    try:
        image, label = part[row]
    # For a data set that opens its files itself, Pillow may raise any error.
    except Exception as error:
        return Sample(path, "", split, "", InvalidImageError(f"can't be decoded: {str(error) or type(error).__name__}"))
    if isinstance(image, str):
        path = str(Path(image).relative_to(folder.parent))
    return Sample(path, classes[int(label)], split, "", _content(image))


def _content(image: str | Image.Image) -> str | np.ndarray | InvalidImageError:
    """Return a file name unchanged, and an image in memory as pixels, (H, W, 1 or 3) uint8."""
    if isinstance(image, str):
        return image
    try:
        return to_grey_or_rgb(image)
    except InvalidImageError as fault:
        return fault


def _classes(parts: Collection[Any]) -> dict[int, str]:
    """Map each label to its class name, or to the label itself if the data set has no class names.

    A class without images, such as "N/A" in EMNIST, is left out, unless the images would have to be decoded to know.
    """
    names = getattr(next(iter(parts)), "classes", None)
    listed = [_listed_labels(part) for part in parts]
    if names and not all(listed):
        used = list(range(len(names)))
    else:
        used = sorted(
            {label for part, labels in zip(parts, listed, strict=True) for label in labels or _sought_labels(part)}
        )
    # Each class of Imagenette has several names.
    named = {label: name if isinstance(name, str) else name[0] for label, name in enumerate(names or [])}
    return {label: named.get(label, str(label)) for label in used}


def _listed_labels(part: Any) -> list[int]:
    """Return the labels of all images if the data set stores them as one array, else an empty list."""
    for name in ("targets", "labels"):
        labels = np.asarray(getattr(part, name, ()))
        if labels.shape == (len(part),) and np.issubdtype(labels.dtype, np.integer):
            return labels.tolist()
    return []


def _sought_labels(part: Any) -> Iterator[int]:
    """Yield the labels of all images, opening each image."""
    return (int(part[row][1]) for row in range(len(part)))


def _parts(make: Callable, params: TorchvisionSet, folder: Path) -> dict[str, Any]:
    """Map each selected split to its torchvision data set."""
    parts = {split: make(folder, download=False, **chosen) for split, chosen in params.splits.items()}
    return {
        split: Unopened(part) if hasattr(part, "_images") and hasattr(part, "_labels") else part
        for split, part in parts.items()
    }


def _downloaded(make: Callable, params: TorchvisionSet, folder: Path) -> dict[str, Any]:
    """Download and verify the selected splits with torchvision, and move them to `folder` when all are complete.

    Other files in `folder`, including those added meanwhile, are kept, even if this process is killed.
    """
    arriving = folder.with_name(f"{folder.name}.arriving")
    shutil.rmtree(arriving, ignore_errors=True)
    if folder.exists():
        # Files that are already present need not be downloaded again.
        shutil.copytree(folder, arriving)
    patience = socket.getdefaulttimeout()
    # Without a timeout, torchvision would wait forever for a server that does not respond.
    socket.setdefaulttimeout(60)  # seconds
    try:
        for chosen in params.splits.values():
            make(arriving, download=True, **chosen)
    # The error may come from urllib, from an incomplete archive or from torchvision itself.
    except Exception as error:
        shutil.rmtree(arriving, ignore_errors=True)
        if explain_full_disk(error, folder.parent):
            raise
        raise ConvoyError(
            f"{params.name} could not be fetched from {_address(error)}: {describe_error(error)}. Try again when that"
            f" address answers, or put the files that torchvision looks for into {folder}/, byte for byte as it would"
            " fetch them"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    if folder.exists():
        folder.rename(_before(folder))
    arriving.rename(folder)
    _keep_others(folder)
    return _parts(make, params, folder)


def _before(folder: Path) -> Path:
    """Return the path of the previous version of a folder while it is being replaced."""
    return folder.with_name(f"{folder.name}.before")


def _keep_others(folder: Path) -> None:
    """Move files that only the previous version of a folder has into the new one, and remove the previous version."""
    before = _before(folder)
    if before.exists() and not folder.exists():
        before.rename(folder)
    elif before.exists():
        for file in before.rglob("*"):
            kept = folder / file.relative_to(before)
            if not file.is_dir() and not os.path.lexists(kept):
                kept.parent.mkdir(parents=True, exist_ok=True)
                file.rename(kept)
        shutil.rmtree(before)


def _address(error: BaseException) -> str:
    """Return the URL at which a download failed, taken from the traceback as torchvision's errors may not name it."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    addresses = [frame.f_locals["url"] for frame in frames if isinstance(frame.f_locals.get("url"), str)]
    return addresses[-1] if addresses else "its address"
