"""Published sets: those that torchvision knows, fetched and checked by it."""

import difflib
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

from convoy.data.image_io import InvalidImageError, to_grey_or_rgb
from convoy.data.sources.base import SPLIT_WORDS, Sample, Source, TorchvisionSet
from convoy.disk import explain_full_disk
from convoy.errors import ConvoyError


def read_torchvision(params: TorchvisionSet, folder: Path) -> Source:
    """A data set that torchvision knows, from `folder`, into which torchvision fetches it where it is not there yet.

    Raises ConvoyError for a name that torchvision does not know, for arguments that the set does not take or that
    select images without labels, and for a download that fails.
    """
    import torchvision

    known = [name for name in torchvision.datasets.__all__ if inspect.isclass(getattr(torchvision.datasets, name))]
    if params.name not in known:
        close = difflib.get_close_matches(params.name, known)
        raise ConvoyError(
            f"dataset.torchvision.name={params.name!r}: torchvision has no such set; it has {close or known}"
        )
    make = getattr(torchvision.datasets, params.name)
    if "loader" in inspect.signature(make).parameters:
        # its images are files, which are left as they are; so are those of OxfordIIITPet, which opens them itself but
        # lists them (see `Unopened`). A set that does neither is decoded by torchvision, here and one by one
        make = functools.partial(make, loader=str)
    _keep_others(folder)  # of a process that was killed
    try:
        parts = _parts(make, params, folder)
    except (TypeError, ValueError) as error:
        raise ConvoyError(f"dataset.torchvision.splits={params.splits} is not for {params.name}: {error}") from error
    except (OSError, RuntimeError):  # torchvision's words for a set that is not there, or not whole
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
    """A set that opens its files itself, as their names: only the intake is proof against what a file may hold."""

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
    """One image of a part: under the name of its file where it has one of its own, else under `path`."""
    try:
        image, label = part[row]
    except Exception as error:  # of a set that opens its files itself: Pillow raises whatever comes up
        return Sample(path, "", split, "", InvalidImageError(f"can't be decoded: {str(error) or type(error).__name__}"))
    if isinstance(image, str):
        path = str(Path(image).relative_to(folder.parent))
    return Sample(path, classes[int(label)], split, "", _content(image))


def _content(image: str | Image.Image) -> str | np.ndarray | InvalidImageError:
    """A file as it is; a picture that torchvision has in memory, as pixels."""
    if isinstance(image, str):
        return image
    try:
        return to_grey_or_rgb(image)
    except InvalidImageError as fault:
        return fault


def _classes(parts: Collection[Any]) -> dict[int, str]:
    """Label -> the name of its class; of a set that names none, the label itself.

    A class that no image has is left out, such as EMNIST's "N/A", unless the images would have to be decoded for it.
    """
    names = getattr(next(iter(parts)), "classes", None)
    listed = [_listed_labels(part) for part in parts]
    if names and not all(listed):
        used = list(range(len(names)))
    else:
        used = sorted(
            {label for part, labels in zip(parts, listed, strict=True) for label in labels or _sought_labels(part)}
        )
    # a class of Imagenette has several names
    named = {label: name if isinstance(name, str) else name[0] for label, name in enumerate(names or [])}
    return {label: named.get(label, str(label)) for label in used}


def _listed_labels(part: Any) -> list[int]:
    """The labels of all images where the set has them in a row, else none."""
    for name in ("targets", "labels"):
        labels = np.asarray(getattr(part, name, ()))
        if labels.shape == (len(part),) and np.issubdtype(labels.dtype, np.integer):
            return labels.tolist()
    return []


def _sought_labels(part: Any) -> Iterator[int]:
    """The labels of all images, each opened for it."""
    return (int(part[row][1]) for row in range(len(part)))


def _parts(make: Callable, params: TorchvisionSet, folder: Path) -> dict[str, Any]:
    """Split -> its torchvision data set."""
    parts = {split: make(folder, download=False, **chosen) for split, chosen in params.splits.items()}
    return {
        split: Unopened(part) if hasattr(part, "_images") and hasattr(part, "_labels") else part
        for split, part in parts.items()
    }


def _downloaded(make: Callable, params: TorchvisionSet, folder: Path) -> dict[str, Any]:
    """The parts of a set that torchvision fetches and checks; they appear in `folder` when all of them are whole.

    Whatever else is in `folder`, or comes there meanwhile, stays, also where this process is killed.
    """
    arriving = folder.with_name(f"{folder.name}.arriving")
    shutil.rmtree(arriving, ignore_errors=True)
    if folder.exists():
        shutil.copytree(folder, arriving)  # what is there already need not come again
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # seconds; torchvision itself would wait for ever on a server that is silent
    try:
        for chosen in params.splits.values():
            make(arriving, download=True, **chosen)
    except Exception as error:  # of urllib, of an archive that is not whole, or torchvision's own
        shutil.rmtree(arriving, ignore_errors=True)
        if explain_full_disk(error, folder.parent):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConvoyError(
            f"{params.name} could not be fetched from {_address(error)}: {said}. Try again when that address answers,"
            f" or put the files that torchvision looks for into {folder}/, byte for byte as it would fetch them"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    if folder.exists():
        folder.rename(_before(folder))
    arriving.rename(folder)
    _keep_others(folder)
    return _parts(make, params, folder)


def _before(folder: Path) -> Path:
    """Where the last version of a folder is, for a moment."""
    return folder.with_name(f"{folder.name}.before")


def _keep_others(folder: Path) -> None:
    """Move what only the last version of a folder holds into the new one, and remove that version."""
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
    """The address that a download was at when it failed: torchvision's errors do not always tell."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    addresses = [frame.f_locals["url"] for frame in frames if isinstance(frame.f_locals.get("url"), str)]
    return addresses[-1] if addresses else "its address"
