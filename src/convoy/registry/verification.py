"""Verification of a registered version: it must predict as it was evaluated, in every way that it can be run."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from mlflow.entities.model_registry import ModelVersion

from convoy.core.errors import ConvoyError
from convoy.data import image_io
from convoy.inference import onnx_export, predictor
from convoy.registry import model_loader

# Largest accepted difference of a probability between machines and batch sizes.
TOLERANCE = 1e-4
# Time limit of the process that predicts a few hundred images.
PREDICT_TIMEOUT_S = 600  # seconds
# Loads a model and predicts. MLflow's own command line does the same, and takes two seconds more to start.
PREDICT = """
import json, pathlib, sys
from mlflow.pyfunc import load_model
model, request, answer = sys.argv[1:]
predictions = load_model(model).predict(json.loads(pathlib.Path(request).read_text())["inputs"])
pathlib.Path(answer).write_text(json.dumps({"predictions": predictions.to_dict("records")}))
"""


def verify(version: ModelVersion, pixels: np.ndarray, expected: np.ndarray, folder: Path | None = None) -> float:
    """Compare the predictions of a version with the recorded ones, in every way that the model can be run.

    The model is run with the installed library, with its ONNX file if it has one, and as `mlflow models serve` would:
    in a fresh process, with the code stored in the model, on image files encoded as text.

    Args:
        version: The registered version.
        pixels: (N, H, W, C) uint8 preprocessed images.
        expected: (N, K) recorded probabilities.
        folder: The folder for temporary files, with room for a complete model.

    Returns:
        The largest absolute difference of a probability.

    Raises:
        ConvoyError: If a file was changed, the model can't be run, or its predictions differ from the recorded ones by
            more than `TOLERANCE`.
    """
    uri = f"models:/{version.name}/{version.version}"
    with model_loader.temporary(uri, folder) as model, model_loader.temporary(uri, folder) as scratch:
        model_loader.fetch(version, model)
        ours = _compare(uri, predictor.restore(model / "artifacts").probabilities(pixels), expected)
        theirs = _compare(uri, _predict_in_subprocess(uri, model, pixels, scratch), expected)
        onnx = model / "artifacts" / onnx_export.ONNX_FILE
        exported = (
            _check(f"{uri} by {onnx.name}", onnx_export.max_difference(onnx, pixels, expected))
            if onnx.exists()
            else 0.0
        )
    return max(ours, theirs, exported)


def _compare(uri: str, answered: np.ndarray, expected: np.ndarray) -> float:
    return _check(uri, onnx_export.max_absolute_difference(answered, expected))


def _check(uri: str, difference: float) -> float:
    if not difference <= TOLERANCE:
        raise ConvoyError(
            f"{uri} does not answer as it was evaluated: probabilities differ by up to {difference:.2g}, more than "
            f"{TOLERANCE:g}. If it is the model of that evaluation, remove artifacts/evaluate and run `convoy run`"
        )
    return difference


def _predict_in_subprocess(uri: str, model: Path, pixels: np.ndarray, scratch: Path) -> np.ndarray:
    """Predict in a process that uses the library stored in the model; return (N, K)."""
    request, answer = scratch / "request.json", scratch / "answer.json"
    request.write_text(json.dumps({"inputs": [_encode_png(each) for each in pixels]}))
    command = [sys.executable, "-c", PREDICT, str(model), str(request), str(answer)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command,
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PREDICT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConvoyError(f"{uri} gave no answer in {PREDICT_TIMEOUT_S} s, in a process of its own") from None
    if done.returncode or not answer.exists():
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ConvoyError(f"{uri} does not answer in a process of its own: {last[0]}")
    try:
        rows = [row["probabilities"] for row in json.loads(answer.read_text())["predictions"]]
        # Models that were registered earlier give a list.
        return np.array([list(row.values()) if isinstance(row, dict) else row for row in rows], float)
    except (KeyError, ValueError, TypeError) as error:
        raise ConvoyError(f"{uri} answers something else than probabilities ({error!r})") from None


def _encode_png(pixels: np.ndarray) -> str:
    """Encode pixels losslessly as the base64 text of a PNG file."""
    file = io.BytesIO()
    image_io.as_image(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
