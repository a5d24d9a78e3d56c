"""The champion with images that it was trained on, to compare new images with."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from convoy.core.errors import ConvoyError
from convoy.data.image_io import center_crop_resize
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.data.packed.packed_dataset import PackedDataset
from convoy.inference.predictor import Predictor
from convoy.monitoring.drift import Drift, detect_drift, sample_rows
from convoy.monitoring.embedding import embed
from convoy.promotion import champion
from convoy.registry import model_loader
from convoy.reporting.unusual_images import draw_unusual
from convoy.tracking.store import open_store
from pipeline.stage import project_root

SEED = 1  # of the samples and of the test
MAX_LISTED_CLASSES = 3


@dataclasses.dataclass(frozen=True)
class Champion:
    """The champion, as far as new images are compared with it."""

    name: str  # for messages
    predictor: Predictor
    training_hashes: frozenset[str]  # sha256 of the images that it was trained and selected on
    accuracy_low: float | None  # lower end of the interval of its test accuracy; None: not recorded


@dataclasses.dataclass(frozen=True)
class Comparison:
    """New images beside training images of the champion."""

    drift: Drift
    new: int  # new images in the test
    reference: int  # training images in the test
    shifts: list[str]  # how often the classes are predicted whose fraction has changed most


def load_champion(root: Path, name: str) -> Champion | None:
    """Load the champion of a registered model, or return None if there is none.

    Raises:
        ConvoyError: If MLflow can't be reached, or the champion is missing or was modified.
    """
    with open_store(project_root(root), name) as store:
        version = champion.current_version(store, name)
        if version is None:
            return None
        found = model_loader.find(store, f"models:/{name}/{version}")
        predictor = model_loader.load(found, store.scratch)
        hashes = frozenset(model_loader.all_training_hashes(store, found) or ())
        metrics = store.client.get_run(str(found.run_id)).data.metrics
    title = f"{predictor.architecture} (version {version})"
    return Champion(title, predictor, hashes, metrics.get("test/accuracy_low"))


def read_images(packed: PackedDataset, rows: Sequence[int], info: DatasetInfo) -> Iterator[np.ndarray]:
    """Read the images in some rows of the packed data set, (H, W, C) uint8 each, as a network takes them."""
    for row in rows:
        yield center_crop_resize(packed.read_image(int(row)), info.size, info.channels)


def compare(
    found: Champion, packed: PackedDataset, names: Sequence[str], images: Sequence[np.ndarray], picture: Path
) -> Comparison:
    """Test new images for drift from the champion's training images, and draw the most unusual ones.

    Args:
        found: The champion.
        packed: The packed data set, which holds its training images.
        names: Names of the N new images.
        images: The new images, as the champion's network takes them.
        picture: Image file to write.

    Raises:
        ConvoyError: If there are too few images.
    """
    hashes = packed.table.read_columns("sha256")["sha256"]
    known = np.flatnonzero(hashes.isin(found.training_hashes))
    known = known[sample_rows(len(known), SEED)]
    chosen = sample_rows(len(images), SEED)
    names, images = [names[row] for row in chosen], [images[row] for row in chosen]
    if not len(known) or not images:
        raise ConvoyError(
            f"there are no {'new images' if len(known) else f'training images of {found.name} in artifacts/fetch'}"
        )
    classifier, info = found.predictor.classifier, found.predictor.info
    reference, usual_classes = embed(classifier, read_images(packed, known, info))
    new, new_classes = embed(classifier, images)
    drift = detect_drift(reference, new, SEED)
    draw_unusual(names, images, drift.unusualness, picture, f"The most unusual of {len(images):,} new images")
    shifts = describe_shifts(info.classes, usual_classes, new_classes)
    return Comparison(drift, len(images), len(known), shifts)


def describe_shifts(classes: Sequence[str], usual: np.ndarray, new: np.ndarray) -> list[str]:
    """Describe how often the classes are predicted whose fraction has changed most.

    Args:
        classes: Names of the K classes.
        usual: (N,) predicted classes of training images.
        new: (M,) predicted classes of new images.
    """
    before, now = (np.bincount(values, minlength=len(classes)) / len(values) for values in (usual, new))
    order = np.argsort(-np.abs(now - before), kind="stable")[:MAX_LISTED_CLASSES]
    return [f"{classes[row]!r}: {now[row]:.1%} of the new images, {before[row]:.1%} of the others" for row in order]
