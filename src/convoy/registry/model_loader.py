"""Served models: registered versions as they are used, each file first checked by the hash in MLflow's database.

Who can write where the files lie, but not into MLflow's database, can't change an answer and can't have code run.
"""

import base64
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from convoy.data import image_io as images
from convoy.errors import ConvoyError
from convoy.hashing import sha256
from convoy.inference import onnx_export, predictor
from convoy.inference.predictor import Predictor
from convoy.tracking.runs import HASHES, hashes_of
from convoy.tracking.store import ABSENT, TrackingStore

URI = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<version>[0-9]{1,9})|@(?P<alias>[^/@]+))")
START = (predictor.RECORD, predictor.WEIGHTS)  # of a training, for another to start from
AGREEMENT = 1e-4  # of probabilities: what machines and batch sizes may differ by
SECONDS = 600  # for a process that answers some hundred images


def find(store: TrackingStore, uri: str) -> ModelVersion:
    """The version that models:/NAME/VERSION or models:/NAME@ALIAS means. Raises ConvoyError where there is none."""
    match = URI.fullmatch(uri)
    if not match:
        raise ConvoyError(f"{uri}: no registered model; name one as models:/NAME@ALIAS or models:/NAME/VERSION")
    try:
        if match["alias"]:
            return store.client.get_model_version_by_alias(match["name"], match["alias"])
        return store.client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        if error.error_code not in ABSENT:
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


class NotFetched(ConvoyError):
    """A file of a model is missing, or what keeps it can't be reached."""


def _download(uri: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        try:
            Path(mlflow.artifacts.download_artifacts(uri, dst_path=scratch)).replace(target)
        except (MlflowException, OSError) as error:
            said = textwrap.shorten(str(error), 200)
            raise NotFetched(f"{uri} is missing or can't be fetched ({said}); nothing of the model was used") from None


@contextlib.contextmanager
def temporary(name: str, parent: Path | None = None) -> Iterator[Path]:
    """A temporary folder with files of `name`, which a ConvoyError that is raised meanwhile names in its place."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        try:
            yield Path(folder)
        except ConvoyError as error:
            raise ConvoyError(str(error).replace(folder, name)) from error


def load(version: ModelVersion, folder: Path | None = None) -> Predictor:
    """A version, rebuilt by the library at hand; of the model's own code nothing is brought here.

    `folder` is for temporary files of the model's size.
    """
    with temporary(f"models:/{version.name}/{version.version}", folder) as scratch:
        fetch(version, scratch, [f"artifacts/{file}" for file in predictor.FILES])
        return predictor.restore(scratch / "artifacts")


def fetch_weights(store: TrackingStore, name: str, architecture: str, init: str, folder: Path) -> str:
    """Bring record.json and weights.safetensors of a training into `folder`; returns whose they are, in words.

    `init` is the id of a run, or "champion": the champion among the versions of the registered model `name`, where it
    is of this architecture, else the newest version that is. Raises ConvoyError, with nothing in `folder`, where there
    is none, and where a file was changed.
    """
    with temporary(init, parent=folder) as scratch:
        try:
            if init == "champion":
                source, checked = _from_version(store, name, architecture, scratch)
            else:
                source, checked = _from_run(store, init, scratch)
        except ConvoyError as error:
            raise ConvoyError(f"model.{architecture}.init: {error}") from None
        for file in START:
            (checked / file).rename(folder / file)
    return source


def _from_version(store: TrackingStore, name: str, architecture: str, folder: Path) -> tuple[str, Path]:
    versions = store.client.search_model_versions(f"name = '{name}'")
    champion = store.client.get_registered_model(name).aliases.get("champion") if versions else None
    others = set()
    for found in sorted(versions, key=lambda each: (str(each.version) != str(champion), -int(each.version))):
        fetch(found, folder, [f"artifacts/{predictor.RECORD}"])
        theirs = json.loads((folder / "artifacts" / predictor.RECORD).read_text())["architecture"]
        if theirs == architecture:
            fetch(found, folder, [f"artifacts/{predictor.WEIGHTS}"])
            return f"version {found.version} of model {name}, of run {found.run_id}", folder / "artifacts"
        others.add(theirs)
    there = f"there are {', '.join(sorted(others))}" if others else "there is none at all"
    raise ConvoyError(
        f"MLflow has no version of model {name} of architecture {architecture} ({there}): set init: scratch"
    )


def _from_run(store: TrackingStore, run_id: str, folder: Path) -> tuple[str, Path]:
    try:
        hashes = hashes_of(store.client.get_run(run_id))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ConvoyError(f"MLflow has no run {run_id}: take the id from its page") from error
    held = {file.path for file in store.client.list_artifacts(run_id)}
    for file in START:
        if file not in held:
            raise ConvoyError(f"run {run_id} holds no {file}: take another run")
        if file not in hashes:
            raise ConvoyError(
                f"run {run_id} has no hashes of its files in its tag {HASHES}: `make sync` writes them for the results "
                "that are there; else take another run, or the path of a file that you trust"
            )
        store.client.download_artifacts(run_id, file, str(folder))
        if sha256(folder / file) != hashes[file]:
            raise ConvoyError(
                f"{file} of run {run_id} is not what its training left; nothing of it was used. "
                "Find out who changed it, and take another run"
            )
    return f"run {run_id}", folder


def read_record(version: ModelVersion) -> dict[str, Any]:
    """The record of the training of a version."""
    with tempfile.TemporaryDirectory() as scratch:
        file = f"artifacts/{predictor.RECORD}"
        fetch(version, Path(scratch), [file])
        return json.loads(Path(scratch, file).read_text())


def seen_ever(store: TrackingStore, version: ModelVersion) -> list[str] | None:
    """The sha256 of the images of the training of a version and of all that led to its first weights; None where it is
    not known of one of them."""
    record, own = read_record(version), training_hashes(version)
    data, lineage = record.get("data", {}).get("digest"), record.get("init", {}).get("lineage", [])
    before = training_hashes_of(store, version.name, [digest for digest in lineage if digest != data])
    return None if own is None or before is None else [*own, *before]


def training_hashes(version: ModelVersion) -> list[str] | None:
    """The sha256 of the images that a version was trained and chosen with; None where nobody wrote them down."""
    file = "artifacts/seen.txt"
    if file not in json.loads(version.tags.get(HASHES, "{}")):
        return None
    with temporary(f"models:/{version.name}/{version.version}") as scratch:
        fetch(version, scratch, [file])
        return (scratch / file).read_text().split()


def training_hashes_of(store: TrackingStore, name: str, data: Sequence[str]) -> list[str] | None:
    """The same of all trainings on some data, given by their digests; None where it is not known of one of them.

    It is known of data that a version of the model `name` was trained on.
    """
    found: dict[str, list[str] | None] = {}
    for version in store.client.search_model_versions(f"name = '{name}'"):
        digest = store.client.get_run(str(version.run_id)).data.tags.get("data", "").rpartition("@")[2]
        if digest in data and not found.get(digest):
            found[digest] = training_hashes(version)
    lists = [found.get(digest) for digest in data]
    return None if None in lists else [image for images in lists for image in images or []]


def verify(version: ModelVersion, pixels: np.ndarray, expected: np.ndarray, folder: Path | None = None) -> float:
    """The largest difference between recorded probabilities and those that a version answers, in every way it can.

    By the library at hand; by its ONNX file, if it has one; and as `mlflow models serve` would: in a fresh process,
    with the model's own code, from image files as text. `pixels` (N, H, W, C) uint8 are as preprocessing left them,
    `expected` is (N, K). `folder` is for temporary files of the model's size.
    Raises ConvoyError where a file was changed, no answer comes, or an answer is not the recorded one.
    """
    uri = f"models:/{version.name}/{version.version}"
    with temporary(uri, folder) as model, temporary(uri, folder) as scratch:
        fetch(version, model)
        ours = _compare(uri, predictor.restore(model / "artifacts").probabilities(pixels), expected)
        theirs = _compare(uri, _predict_in_subprocess(uri, model, pixels, scratch), expected)
        onnx = model / "artifacts" / onnx_export.FILE
        exported = (
            _check(f"{uri} by {onnx.name}", onnx_export.max_difference(onnx, pixels, expected))
            if onnx.exists()
            else 0.0
        )
    return max(ours, theirs, exported)


def _compare(uri: str, answered: np.ndarray, expected: np.ndarray) -> float:
    return _check(uri, onnx_export.difference(answered, expected))


def _check(uri: str, difference: float) -> float:
    if not difference <= AGREEMENT:
        raise ConvoyError(
            f"{uri} does not answer as it was evaluated: probabilities differ by up to {difference:.2g}, more than "
            f"{AGREEMENT:g}. If it is the model of that evaluation, remove artifacts/evaluate and run `dvc repro` again"
        )
    return difference


def _predict_in_subprocess(uri: str, model: Path, pixels: np.ndarray, scratch: Path) -> np.ndarray:
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
