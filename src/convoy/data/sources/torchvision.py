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
from convoy.data.sources.base import SPLIT_NAMES, Sample, Source, TorchvisionConfig

# torchvision itself would wait forever for a server that does not respond.
DOWNLOAD_TIMEOUT_S = 60


def read_torchvision(params: TorchvisionConfig, folder: Path) -> Source:
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
    create = getattr(torchvision.datasets, params.name)
    if "loader" in inspect.signature(create).parameters:
        # The images are files, and only their names are taken here. The same holds for OxfordIIITPet, which opens its
        # files itself but lists them (see `UnopenedImages`). All other data sets are decoded here by torchvision, one
        # image at a time.
        create = functools.partial(create, loader=str)
    # Complete the replacement of the folder if an earlier process was killed during it.
    _finish_replacement(folder)
    try:
        datasets = _load_splits(create, params, folder)
    except (TypeError, ValueError) as error:
        raise ConvoyError(f"dataset.torchvision.splits={params.splits} is not for {params.name}: {error}") from error
    # torchvision raises these if the data set is missing or incomplete.
    except (OSError, RuntimeError):
        datasets = _download(create, params, folder)
    try:
        classes = _find_classes(datasets.values())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConvoyError(
            f"dataset.torchvision.name={params.name!r}: its images do not have one class each ({error}); use a data"
            " set for classification, or select its classes in dataset.torchvision.splits"
        ) from error
    if min(classes, default=0) < 0:
        raise ConvoyError(
            f"dataset.torchvision.splits={params.splits} selects images of {params.name} without labels: remove them"
        )
    return Source(
        classes=list(classes.values()),
        count=sum(len(dataset) for dataset in datasets.values()),
        samples=(
            _make_sample(dataset, row, f"{params.name}/{split}/{row}", SPLIT_NAMES.get(split, ""), classes, folder)
            for split, dataset in datasets.items()
            for row in range(len(dataset))
        ),
    )


class UnopenedImages:
    """A data set that returns file names in place of the images that torchvision would open.

    Only ingestion is protected against what a file may contain.
    """

    def __init__(self, dataset: Any) -> None:
        targets = getattr(dataset, "_target_types", ["category"])
        if targets != ["category"]:
            raise ConvoyError(
                f"dataset.torchvision.splits selects target_types={targets} of {type(dataset).__name__}, whose classes"
                " are its categories: remove target_types"
            )
        self.classes, self.targets, self.files = dataset.classes, dataset._labels, dataset._images

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[str, int]:
        return str(self.files[row]), self.targets[row]


def _make_sample(dataset: Any, row: int, path: str, split: str, classes: dict[int, str], folder: Path) -> Sample:
    """Return one image of a split as a sample, named after its file if it has its own, else `path`."""
    try:
        image, label = dataset[row]
    # For a data set that opens its files itself, Pillow may raise any error.
    except Exception as error:
        return Sample(path, "", split, "", InvalidImageError(f"can't be decoded: {describe_error(error)}"))
    if isinstance(image, str):
        path = str(Path(image).relative_to(folder.parent))
    return Sample(path, classes[int(label)], split, "", _read_content(image))


def _read_content(image: str | Image.Image) -> str | np.ndarray | InvalidImageError:
    """Return a file name unchanged, and an image in memory as pixels, (H, W, 1 or 3) uint8."""
    if isinstance(image, str):
        return image
    try:
        return to_grey_or_rgb(image)
    except InvalidImageError as fault:
        return fault


def _find_classes(datasets: Collection[Any]) -> dict[int, str]:
    """Map each label to its class name, or to the label itself if the data set has no class names.

    A class without images, such as "N/A" in EMNIST, is left out, unless the images would have to be decoded to know.
    """
    names = getattr(next(iter(datasets)), "classes", None)
    listed = [_read_stored_labels(dataset) for dataset in datasets]
    if names and not all(listed):
        used = list(range(len(names)))
    else:
        used = sorted(
            {
                label
                for dataset, labels in zip(datasets, listed, strict=True)
                for label in labels or _iter_labels(dataset)
            }
        )
    # Each class of Imagenette has several names.
    named = {label: name if isinstance(name, str) else name[0] for label, name in enumerate(names or [])}
    return {label: named.get(label, str(label)) for label in used}


def _read_stored_labels(dataset: Any) -> list[int]:
    """Return the labels of all images if the data set stores them as one array, else an empty list."""
    for name in ("targets", "labels"):
        labels = np.asarray(getattr(dataset, name, ()))
        if labels.shape == (len(dataset),) and np.issubdtype(labels.dtype, np.integer):
            return labels.tolist()
    return []


def _iter_labels(dataset: Any) -> Iterator[int]:
    """Yield the labels of all images, opening each image."""
    return (int(dataset[row][1]) for row in range(len(dataset)))


def _load_splits(create: Callable, params: TorchvisionConfig, folder: Path) -> dict[str, Any]:
    """Map each selected split to its torchvision data set."""
    datasets = {split: create(folder, download=False, **arguments) for split, arguments in params.splits.items()}
    return {
        split: UnopenedImages(dataset) if hasattr(dataset, "_images") and hasattr(dataset, "_labels") else dataset
        for split, dataset in datasets.items()
    }


def _download(create: Callable, params: TorchvisionConfig, folder: Path) -> dict[str, Any]:
    """Download and verify the selected splits with torchvision, and move them to `folder` when all are complete.

    Other files in `folder`, including those added meanwhile, are kept, even if this process is killed.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if folder.exists():
        # Files that are already present need not be downloaded again.
        shutil.copytree(folder, partial)
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        for arguments in params.splits.values():
            create(partial, download=True, **arguments)
    # The error may come from urllib, from an incomplete archive or from torchvision itself.
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if explain_full_disk(error, folder.parent):
            raise
        raise ConvoyError(
            f"{params.name} could not be fetched from {_find_url(error)}: {describe_error(error)}. Try again when the"
            f" server responds, or copy the original files that torchvision downloads into {folder}/"
        ) from error
    finally:
        socket.setdefaulttimeout(previous_timeout)
    if folder.exists():
        folder.rename(_backup_path(folder))
    partial.rename(folder)
    _finish_replacement(folder)
    return _load_splits(create, params, folder)


def _backup_path(folder: Path) -> Path:
    """Return the path of the previous version of a folder while it is being replaced."""
    return folder.with_name(f"{folder.name}.before")


def _finish_replacement(folder: Path) -> None:
    """Move files that only the previous version of a folder has into the new one, and remove the previous version."""
    before = _backup_path(folder)
    if before.exists() and not folder.exists():
        before.rename(folder)
    elif before.exists():
        for file in before.rglob("*"):
            kept = folder / file.relative_to(before)
            if not file.is_dir() and not os.path.lexists(kept):
                kept.parent.mkdir(parents=True, exist_ok=True)
                file.rename(kept)
        shutil.rmtree(before)


def _find_url(error: BaseException) -> str:
    """Return the URL at which a download failed, taken from the traceback as torchvision's errors may not name it."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    addresses = [frame.f_locals["url"] for frame in frames if isinstance(frame.f_locals.get("url"), str)]
    return addresses[-1] if addresses else "its address"
