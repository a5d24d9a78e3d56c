"""The registry: versions of the registered model, and the aliases that say which of them is used."""

import base64
import contextlib
import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array
from PIL import Image

from convoy.hashing import sha256
from convoy.inference import predictor
from convoy.tracking.runs import HASHES, IDENTITY
from convoy.tracking.store import TrackingStore, uploading

VERDICT, JUDGED = "convoy.verdict", "convoy.judged"  # tags of a version: what the gate said, and of what
TEST_IMAGES, TEST_ACCURACY = "convoy.test_images", "convoy.test_accuracy"
SERVED_WITH = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "safetensors", "simplejpeg", "torch")
# the part of this library that a model brings with it, files and packages
SERVED_BY = (
    "__init__.py",
    "config.py",
    "data/__init__.py",
    "data/dataset_info.py",
    "data/image_io.py",
    "errors.py",
    "evaluation/__init__.py",
    "evaluation/calibration.py",
    "hashing.py",
    "inference/__init__.py",
    "inference/predictor.py",
    "models",
    "recipe.py",
)


def find_version(store: TrackingStore, name: str, identity: str) -> ModelVersion | None:
    """The version of a registered model that was made from these results."""
    found = store.client.search_model_versions(f"name = '{name}' and tags.`{IDENTITY}` = '{identity}'")
    return found[0] if found else None


def register(
    store: TrackingStore,
    *,
    name: str,
    run_id: str,
    identity: str,
    model: Path,
    files: Mapping[str, Path],
    code: Path,
    step: int,
) -> ModelVersion:
    """Log a model and make a version of it, whose tag HASHES says what each of its files must be.

    It is the Python file `model`, of the package `code` what SERVED_BY names, and `files`: record, weights and
    calibration of a training. No pickle. Raises ConvoyError where the store does not hold what was brought.
    """
    artifacts = {file.name: sha256(file) for file in files.values()}
    # MLflow asks for type hints that would bar most of the forms which serving takes, and no filter can stop it
    with _temporary_folder(store) as scratch, warnings.catch_warnings(record=True):
        hashes_file = Path(scratch, "hashes.json")  # by which the model checks itself where it is served
        hashes_file.write_text(json.dumps(artifacts))
        brought = Path(scratch, code.name)
        for part in SERVED_BY:
            (brought / part).parent.mkdir(parents=True, exist_ok=True)
            if (code / part).is_dir():
                shutil.copytree(code / part, brought / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(code / part, brought / part)
        _end_lost_models(store, run_id)
        # `mlflow.pyfunc.log_model` would need an active run, and so change the status of a training that is over
        made = mlflow.initialize_logged_model(
            "model",
            source_run_id=run_id,
            params=store.client.get_run(run_id).data.params,
            experiment_id=store.experiment.experiment_id,
        )
        with uploading():
            logged = Model.log(
                artifact_path=None,
                flavor=mlflow.pyfunc,
                name="model",
                model_id=made.model_id,
                run_id=run_id,
                python_model=str(model),
                artifacts={key: str(file) for key, file in {**files, "hashes": hashes_file}.items()},
                code_paths=[str(brought)],
                pip_requirements=[f"{package}=={version(package)}" for package in SERVED_WITH],
                signature=_signature(),
                input_example=_example(),
                step=step,
            )
        stored = Path(mlflow.artifacts.download_artifacts(logged.model_uri, dst_path=str(Path(scratch, "stored"))))
        predictor.check(stored / "artifacts", artifacts)
        hashes = {str(file.relative_to(stored)): sha256(file) for file in _files(stored)}
    tags = {IDENTITY: identity, HASHES: json.dumps(hashes)}
    return mlflow.register_model(logged.model_uri, name, tags=tags)


def _end_lost_models(store: TrackingStore, run_id: str) -> None:
    """Models of a run that are still pending are of a process that was killed: one at a time registers."""
    experiment = [store.experiment.experiment_id]
    for model in store.client.search_logged_models(experiment, f"source_run_id = '{run_id}'"):
        if model.status == LoggedModelStatus.PENDING:
            store.client.finalize_logged_model(model.model_id, LoggedModelStatus.FAILED)


@contextlib.contextmanager
def _temporary_folder(store: TrackingStore) -> Iterator[str]:
    """A folder in the project for files of a model's size, and for those that MLflow itself makes meanwhile."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(dir=store.scratch) as folder:
        tempfile.tempdir = folder
        try:
            yield folder
        finally:
            tempfile.tempdir = before


def _signature() -> ModelSignature:
    """Base64 texts of image files in, as HTTP brings them; a row for each out."""
    label, probability = ColSpec("string", "label"), ColSpec("double", "probability")
    probabilities = ColSpec(Array(DataType.double), "probabilities")
    signature = ModelSignature(Schema([ColSpec("string")]), Schema([label, probability, probabilities]))
    # else MLflow would make a table of every input, and arrays of pixels could not come from Python any more
    signature._is_signature_from_type_hint = True
    return signature


def _example() -> list[str]:
    """A grey square as a PNG. Not an image of the data, which whoever uses the model may not be allowed to see."""
    file = io.BytesIO()
    Image.new("L", (32, 32), 128).save(file, "PNG")
    return [base64.b64encode(file.getvalue()).decode()]


def _files(folder: Path) -> list[Path]:
    # MLflow writes a note of its own into what it downloads
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "registered_model_meta")


def cached_verdict(store: TrackingStore, name: str, version: int, key: str) -> str | None:
    """What the gate said of a version when all that a verdict depends on, hashed as `key`, was as it is now."""
    tags = store.client.get_model_version(name, str(version)).tags
    return tags.get(VERDICT) if tags.get(JUDGED) == key else None


def save_verdict(
    store: TrackingStore, name: str, version: int, key: str, said: str, test_images: str, accuracy: float
) -> None:
    """Write a verdict into the tags of the version, with the test images (their fingerprint) and its accuracy there."""
    told = [(VERDICT, said[:5000]), (TEST_IMAGES, test_images), (TEST_ACCURACY, f"{accuracy:.6f}")]
    for tag, value in [(JUDGED, ""), *told, (JUDGED, key)]:  # without the key the rest does not count
        store.client.set_model_version_tag(name, str(version), tag, value)
    store.client.update_model_version(name, str(version), said[:5000])  # which the version's page shows


def count_test_set_uses(store: TrackingStore, name: str, version: int, test_images: str) -> int:
    """How many versions were judged by these test images, this one included."""
    versions = store.client.search_model_versions(f"name = '{name}' and tags.`{TEST_IMAGES}` = '{test_images}'")
    return len({int(found.version) for found in versions} | {version})


def best_ever(store: TrackingStore, name: str, champions: Collection[int]) -> int | None:
    """Of these versions, as far as they are there and were judged, the one with the highest test accuracy then."""
    there = store.client.search_model_versions(f"name = '{name}'")
    judged = [found for found in there if int(found.version) in champions and TEST_ACCURACY in found.tags]
    best = max(judged, key=lambda found: float(found.tags[TEST_ACCURACY]), default=None)
    return int(best.version) if best else None


def log_file(store: TrackingStore, run_id: str, name: str, content: str) -> None:
    """A text among the artifacts of a run."""
    store.client.log_text(run_id, content, name)


def read_file(store: TrackingStore, run_id: str, name: str) -> str | None:
    """A text among the artifacts of a run; None where it is not there."""
    if name not in {file.path for file in store.client.list_artifacts(run_id)}:
        return None
    with tempfile.TemporaryDirectory(dir=store.scratch) as folder:
        return Path(store.client.download_artifacts(run_id, name, folder)).read_text()
