"""The served: registered versions as they are used, each file first held against the hash that the registry keeps.

Who can write where the files lie, but not into MLflow's database, can't change an answer and can't have code run.
"""

import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable
from pathlib import Path

import mlflow
import numpy as np
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from convoy import images, predictor
from convoy.config import ConvoyError
from convoy.predictor import Predictor
from convoy.registry import HASHES
from convoy.tracking import Store

URI = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<version>[0-9]+)|@(?P<alias>[^/@]+))")
AGREEMENT = 1e-4  # of probabilities: what machines and batch sizes may differ by
SECONDS = 600  # for a process that answers some hundred images


def find(store: Store, uri: str) -> ModelVersion:
    """The version that models:/NAME/VERSION or models:/NAME@ALIAS means. Raises ConvoyError where there is none."""
    match = URI.fullmatch(uri)
    if not match:
        raise ConvoyError(f"{uri}: no registered model; name one as models:/NAME@ALIAS or models:/NAME/VERSION")
    try:
        if match["alias"]:
            return store.client.get_model_version_by_alias(match["name"], match["alias"])
        return store.client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        if error.error_code not in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            raise
        raise ConvoyError(f"MLflow has no {uri}: `make repro` registers a model, its page shows the versions") from None


def fetch(version: ModelVersion, folder: Path, files: Iterable[str] = ()) -> None:
    """Bring files of a version into `folder`, all of them where none is named, and check them there.

    Raises ConvoyError, before anything in them was read as more than bytes, where one is missing or was changed.
    """
    uri = f"models:/{version.name}/{version.version}"
    try:
        hashes = json.loads(version.tags[HASHES])
        wanted = {file: hashes[file] for file in files or hashes}
    except (KeyError, ValueError, TypeError):
        raise ConvoyError(f"{uri} has no hashes of these files in its tag {HASHES}: register it again") from None
    for file in wanted:
        _download(f"{uri}/{file}", folder / file)
    try:
        predictor.check(folder, wanted)
    except ConvoyError as error:
        raise ConvoyError(f"{uri}: {error}. Find out who changed it, and promote or train another") from None


def _download(uri: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        try:
            Path(mlflow.artifacts.download_artifacts(uri, dst_path=scratch)).replace(target)
        except (MlflowException, OSError) as error:
            said = textwrap.shorten(str(error), 200)
            raise ConvoyError(f"{uri} is missing or can't be fetched ({said}); nothing of the model was used") from None


def load(version: ModelVersion) -> Predictor:
    """A version, rebuilt by the library at hand; of the model's own code nothing is brought here."""
    with tempfile.TemporaryDirectory() as scratch:
        fetch(version, Path(scratch), [f"artifacts/{file}" for file in predictor.FILES])
        return predictor.restore(Path(scratch, "artifacts"))


def seen(version: ModelVersion) -> list[str] | None:
    """The sha256 of the images that a version was trained and chosen with; None where nobody wrote them down."""
    file = "artifacts/seen.txt"
    if file not in json.loads(version.tags.get(HASHES, "{}")):
        return None
    with tempfile.TemporaryDirectory() as scratch:
        fetch(version, Path(scratch), [file])
        return Path(scratch, file).read_text().split()


def verify(version: ModelVersion, pixels: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference between recorded probabilities and those that a version answers, two ways.

    By the library at hand, and as `mlflow models serve` would: in a fresh process, with the model's own code, from
    image files as text. `pixels` (N, H, W, C) uint8 are as preprocessing left them, `expected` is (N, K).
    Raises ConvoyError where a file was changed, no answer comes, or an answer is not the recorded one.
    """
    uri = f"models:/{version.name}/{version.version}"
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model")
        fetch(version, model)
        ours = _compare(uri, predictor.restore(model / "artifacts").probabilities(pixels), expected)
        theirs = _compare(uri, _answers(uri, model, pixels, Path(scratch)), expected)
    return max(ours, theirs)


def _compare(uri: str, answered: np.ndarray, expected: np.ndarray) -> float:
    difference = float(np.abs(answered - expected).max()) if answered.shape == expected.shape else np.inf
    if not difference <= AGREEMENT:
        raise ConvoyError(
            f"{uri} does not answer as it was evaluated: probabilities differ by up to {difference:.2g}, more than "
            f"{AGREEMENT:g}; remove artifacts/evaluate and run `dvc repro` again"
        )
    return difference


def _answers(uri: str, model: Path, pixels: np.ndarray, scratch: Path) -> np.ndarray:
    """(N, K) of MLflow's own command, in a process where this library is what the model has brought with it."""
    request, answer = scratch / "request.json", scratch / "answer.json"
    request.write_text(json.dumps({"inputs": [_as_text(each) for each in pixels]}))
    command = [sys.executable, "-m", "mlflow", "models", "predict", "--env-manager", "local", "--content-type", "json"]
    command += ["--model-uri", str(model), "--input-path", str(request), "--output-path", str(answer)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        done = subprocess.run(
            command, cwd=scratch, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConvoyError(f"{uri} gave no answer in {SECONDS} s, in a process of its own") from None
    if done.returncode or not answer.exists():
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise ConvoyError(f"{uri} does not answer in a process of its own: {last[0]}")
    try:
        return np.array([row["probabilities"] for row in json.loads(answer.read_text())["predictions"]], float)
    except (KeyError, ValueError, TypeError) as error:
        raise ConvoyError(f"{uri} answers something else than probabilities ({error!r})") from None


def _as_text(pixels: np.ndarray) -> str:
    """The base64 of a PNG, which loses nothing."""
    file = io.BytesIO()
    images.as_image(pixels).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
