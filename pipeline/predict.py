"""Prediction of the label and probability of images with a registered model."""

import glob
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from convoy.core import config
from convoy.core.errors import ConvoyError
from convoy.data.decode_worker import MAX_FILE_BYTES, TOO_LARGE
from convoy.data.image_io import InvalidImageError
from convoy.data.sources.file_listing import is_image, is_junk
from convoy.inference.predictor import Predictor
from convoy.registry import model_loader
from convoy.tracking.store import open_store
from convoy.training import hardware
from pipeline.stage import project_root

BATCH_SIZE = 64  # images in memory at a time

# The keys are image and either label and probability, or error.
Prediction = dict[str, str | float]


def load_model(root: Path, uri: str | None) -> tuple[str, Predictor]:
    """Load a registered model.

    Args:
        root: The project folder.
        uri: models:/NAME@ALIAS or models:/NAME/VERSION, or None for the champion.

    Returns:
        A description of the model and its predictor.

    Raises:
        ConvoyError: If there is no MLflow store or no such model.
    """
    params = config.load(root / "params.yaml")
    name = params["register"]["name"]
    project = project_root(root)
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (project / "mlflow.db").exists():
        raise ConvoyError("mlflow.db does not exist: run `convoy run`, or set MLFLOW_TRACKING_URI")
    with open_store(project, name) as store:
        version = model_loader.find(store, uri or f"models:/{name}@champion")
        predictor = model_loader.load(version, store.scratch)
    predictor.classifier.to(hardware.select_device(params["trainer"]["accelerator"]))
    return f"{version.name} {version.version}, {predictor.architecture}", predictor


def print_predictions(predictor: Predictor, paths: Sequence[str], title: str, *, as_json: bool = False) -> None:
    """Print the label and probability of each image.

    Args:
        predictor: The model.
        paths: Files, folders (recursively) or patterns such as '*.png'.
        title: A description of the model, above the table.
        as_json: Whether to print a JSON object per line instead of a table.

    Raises:
        ConvoyError: If an image could not be predicted, after the predictions of the others are printed.
    """
    predictions = predict(predictor, paths)
    if failed := print_lines(predictions) if as_json else print_table(predictions, title):
        raise ConvoyError(f"{failed} image{'s' if failed > 1 else ''} could not be predicted")


def predict(predictor: Predictor, paths: Sequence[str]) -> Iterator[Prediction]:
    """Yield a prediction or an error for each image.

    The order is that of the paths; images of a folder or a pattern are sorted by name.

    Args:
        predictor: The model.
        paths: Files, folders or patterns.
    """
    batch: list[tuple[str, np.ndarray | InvalidImageError]] = []
    for path in find_images(paths):
        batch.append((str(path), read_image(path, predictor)))
        if len(batch) == BATCH_SIZE:
            yield from _predict_batch(predictor, batch)
            batch = []
    yield from _predict_batch(predictor, batch)


def _predict_batch(
    predictor: Predictor, batch: Sequence[tuple[str, np.ndarray | InvalidImageError]]
) -> Iterator[Prediction]:
    pixels = [image for _, image in batch if isinstance(image, np.ndarray)]
    rows = iter(predictor.probabilities(np.stack(pixels)) if pixels else [])
    for path, image in batch:
        if isinstance(image, InvalidImageError):
            yield {"image": path, "error": str(image)}
        else:
            row = next(rows)
            best = int(row.argmax())
            yield {"image": path, "label": predictor.info.classes[best], "probability": float(row[best])}


def find_images(paths: Sequence[str]) -> Iterator[Path]:
    """Yield the files that the paths name; a path that matches nothing is yielded unchanged."""
    for name in paths:
        matches = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute one)
        for path in map(Path, matches or [name]):
            below = sorted(file for file in path.rglob("*") if not file.is_dir()) if path.is_dir() else []
            files = [file for file in below if not is_junk(str(file.relative_to(path)))]
            inside = [file for file in files if is_image(file.name) or not file.suffix]
            if other := len(files) - len(inside):
                print(
                    f"{escape_unprintable(str(path))}: {other} files without an image suffix are ignored",
                    file=sys.stderr,
                )
            yield from inside or [path]


def read_image(path: Path, predictor: Predictor) -> np.ndarray | InvalidImageError:
    """Return an image preprocessed for the network, or the error that explains why it can't be used."""
    try:
        if path.is_dir():
            return InvalidImageError("is a folder without images")
        if not path.exists():
            return InvalidImageError("does not exist")
        # Reading a pipe or a device might never end.
        if not path.is_file():
            return InvalidImageError("is not a file")
        if path.stat().st_size > MAX_FILE_BYTES:
            return InvalidImageError(TOO_LARGE)
        return predictor.preprocess(path.read_bytes())
    except OSError as error:
        return InvalidImageError(f"can't be read: {error.strerror}")
    except InvalidImageError as fault:
        return fault


def print_lines(predictions: Iterator[Prediction]) -> int:
    """Print one JSON object per line, and return the number of images without a prediction."""
    failed = 0
    for prediction in predictions:
        failed += "error" in prediction
        print(json.dumps(prediction), flush=True)
    return failed


def print_table(predictions: Iterator[Prediction], title: str) -> int:
    """Print predictions as a table and errors to standard error, and return the number of errors."""
    from convoy.reporting import report

    rows, failed = [], 0
    for prediction in predictions:
        image = escape_unprintable(str(prediction["image"]))
        if "error" in prediction:
            failed += 1
            print(f"{image} {prediction['error']}", file=sys.stderr)
        else:
            label = escape_unprintable(str(prediction["label"]))
            rows.append({"image": image, "label": label, "probability": prediction["probability"]})
    if rows:
        report.print_table(pd.DataFrame(rows), title)
    return failed


def escape_unprintable(name: str) -> str:
    """Escape the unprintable characters of a name, so that none of them reaches the terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)
