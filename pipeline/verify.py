"""The check that a registered model is unmodified, loads in a new process and predicts as evaluated."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from convoy.core import config
from convoy.core.artifact_names import DATASET_INFO, PREDICTIONS
from convoy.core.errors import ConvoyError
from convoy.data.packed.arrays import Images
from convoy.evaluation.metrics import PROBABILITY_PREFIX
from convoy.registry import model_loader, verification
from convoy.tracking.store import TrackingStore, open_store
from pipeline.stage import find_images_name, project_root

MAX_IMAGES = 200  # images to predict


def verify_model(root: Path, uri: str, evaluated: Path, prepared: Path | None = None) -> str:
    """Verify a registered model of the project against its recorded evaluation; see `verify`."""
    params = config.load(root / "params.yaml")
    prepared = prepared or root / "artifacts" / find_images_name(params, evaluated.name)
    with open_store(project_root(root), params["register"]["name"]) as store:
        return verify(store, uri, evaluated, prepared)


def verify(store: TrackingStore, uri: str, evaluated: Path, prepared: Path) -> str:
    """Verify a registered model against its recorded evaluation.

    Args:
        store: The open MLflow store.
        uri: models:/NAME@ALIAS or models:/NAME/VERSION.
        evaluated: The output folder of the evaluate stage for this model.
        prepared: The output folder of the preprocess stage.

    Returns:
        A message that describes the result.

    Raises:
        ConvoyError: If the model is not the one that was evaluated.
    """
    pixels, expected = sample(evaluated, prepared)
    difference = verification.verify(model_loader.find(store, uri), pixels, expected, store.scratch)
    return f"{uri} {describe(len(pixels), difference)}"


def describe(count: int, difference: float) -> str:
    """Return the message for a model that predicts `count` images as evaluated, up to a difference in probability."""
    return f"predicts {count} images as evaluated; probabilities differ by {difference:.1g} at most"


def sample(evaluated: Path, prepared: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return a sample of the test images of every class, with their recorded probabilities.

    Args:
        evaluated: The output folder of the evaluate stage for a model.
        prepared: The output folder of the preprocess stage.

    Returns:
        The pixels, (N, H, W, C) uint8, and the probabilities, (N, K), with N <= `MAX_IMAGES`.

    Raises:
        ConvoyError: If a file is missing, or the folders are of different images or classes.
    """
    for file in (evaluated / PREDICTIONS, prepared / DATASET_INFO, prepared / "test_pixels.npy"):
        if not file.is_file():
            raise ConvoyError(f"{file} does not exist: give the folder of an evaluation, such as artifacts/evaluate/x")
    predictions = pd.read_parquet(evaluated / PREDICTIONS)
    classes = json.loads((prepared / DATASET_INFO).read_text())["classes"]
    columns = [f"{PROBABILITY_PREFIX}{name}" for name in classes]
    if not set(columns) <= set(predictions):
        raise ConvoyError(f"{evaluated} and {prepared} have different classes: run `convoy run`")
    expected = predictions[columns].to_numpy()
    test = Images.load(prepared, "test")
    if len(test) != len(expected):
        raise ConvoyError(f"{evaluated} has {len(expected)} images and {prepared} has {len(test)}: run `convoy run`")
    # Evenly spaced rows cover every class, because the test images are ordered by class.
    rows = np.unique(np.linspace(0, len(test) - 1, MAX_IMAGES).round().astype(int))
    return test.pixels[rows], expected[rows]
