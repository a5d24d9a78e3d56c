"""Versions of the registered model, and the verdicts of the gate that are stored with them."""

import base64
import contextlib
import io
import json
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Map
from PIL import Image

from convoy.core.config import SelectionMetric
from convoy.core.hashing import sha256, verify_checksums
from convoy.inference.library_copy import copy_library
from convoy.tracking.run_record import FINGERPRINT_TAG
from convoy.tracking.store import TrackingStore, upload_timeout
from convoy.tracking.tags import CHECKSUMS_TAG, VERDICT

# Tag of a version with the hash of the inputs of its verdict.
VERDICT_KEY = "convoy.judged"
# Tag of a version with the fingerprint of the test images of that verdict.
TEST_IMAGES = "convoy.test_images"
# Prefix of the tag, followed by a metric such as accuracy, with the value of the metric on these images.
TEST_SCORE_PREFIX = "convoy.test_"
# Packages that a registered model requires.
SERVED_WITH = ("mlflow", "numpy", "pandas", "pillow", "pydantic", "safetensors", "simplejpeg", "torch")
# Files and packages of this library that are stored inside a registered model.
SERVED_BY = (
    "__init__.py",
    "core/__init__.py",
    "core/artifact_names.py",
    "core/config.py",
    "core/errors.py",
    "core/hashing.py",
    "core/renamed_settings.py",
    "data/__init__.py",
    "data/completeness.py",
    "data/image_io.py",
    "data/packed/__init__.py",
    "data/packed/dataset_info.py",
    "evaluation/__init__.py",
    "evaluation/calibration.py",
    "inference/__init__.py",
    "inference/image_text.py",
    "inference/predictor.py",
    "models",
    "recipe.py",
    "training/__init__.py",
    "training/record.py",
)


def find_version(store: TrackingStore, name: str, identity: str) -> ModelVersion | None:
    """Return the first version of a registered model that was created from the results `identity`, or `None`."""
    found = store.client.search_model_versions(f"name = '{name}' and tags.`{FINGERPRINT_TAG}` = '{identity}'")
    return min(found, key=lambda version: int(version.version), default=None)


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
    libraries: Sequence[str] = (),
) -> ModelVersion:
    """Log a model and create a version of it, with the sha256 of each of its files in the tag `CHECKSUMS_TAG`.

    Nothing is pickled: the model consists of Python code and of the given files. If another process has registered the
    same results in the meantime, its version is returned, and the own one is removed.

    Args:
        store: The MLflow store.
        name: The name of the registered model.
        run_id: The MLflow run of the training.
        identity: The identity of the training's results, by which `find_version` finds the version.
        model: The Python file that defines the model ("models from code").
        files: The artifacts of the model by their keys, such as the record, weights and calibration of a training run.
        code: The folder of this library, of which the parts in `SERVED_BY` are stored with the model.
        step: The step of the run that the model belongs to.
        libraries: Packages that build its network, which it requires besides those in `SERVED_WITH`.

    Raises:
        ConvoyError: If the files in the store differ from those that were uploaded.
    """
    artifacts = {file.name: sha256(file) for file in files.values()}
    # MLflow warns about missing type hints, which would rule out most of the accepted inputs. Filters can't silence it.
    with _temporary_folder(store) as scratch, warnings.catch_warnings(record=True):
        # The checksums by which the served model verifies its own files.
        hashes_file = Path(scratch, "hashes.json")
        hashes_file.write_text(json.dumps(artifacts))
        brought = Path(scratch, code.name)
        copy_library(code, SERVED_BY, brought)
        _fail_lost_models(store, run_id)
        # `mlflow.pyfunc.log_model` would need an active run and so change the status of a training run that has ended.
        made = mlflow.initialize_logged_model(
            "model",
            source_run_id=run_id,
            params=store.client.get_run(run_id).data.params,
            experiment_id=store.experiment.experiment_id,
        )
        with upload_timeout():
            logged = Model.log(
                artifact_path=None,
                flavor=mlflow.pyfunc,
                name="model",
                model_id=made.model_id,
                run_id=run_id,
                python_model=str(model),
                artifacts={key: str(file) for key, file in {**files, "hashes": hashes_file}.items()},
                code_paths=[str(brought)],
                pip_requirements=[f"{package}=={version(package)}" for package in (*SERVED_WITH, *libraries)],
                signature=_signature(),
                input_example=_example(),
                step=step,
            )
        stored = Path(mlflow.artifacts.download_artifacts(logged.model_uri, dst_path=str(Path(scratch, "stored"))))
        verify_checksums(stored / "artifacts", artifacts)
        hashes = {str(file.relative_to(stored)): sha256(file) for file in _files(stored)}
    tags = {FINGERPRINT_TAG: identity, CHECKSUMS_TAG: json.dumps(hashes)}
    registered = mlflow.register_model(logged.model_uri, name, tags=tags)
    first = find_version(store, name, identity)
    if first is None or first.version == registered.version:
        return registered
    store.client.delete_model_version(name, registered.version)
    store.client.delete_logged_model(logged.model_id)
    return first


def _fail_lost_models(store: TrackingStore, run_id: str) -> None:
    """Mark the pending models of a run as failed.

    It was left by a killed process; if another machine is about to register it, that one makes it ready again.
    """
    experiment = [store.experiment.experiment_id]
    for model in store.client.search_logged_models(experiment, f"source_run_id = '{run_id}'"):
        if model.status == LoggedModelStatus.PENDING:
            store.client.finalize_logged_model(model.model_id, LoggedModelStatus.FAILED)


@contextlib.contextmanager
def _temporary_folder(store: TrackingStore) -> Iterator[str]:
    """Create a temporary folder with room for a complete model, which MLflow's own temporary files use as well."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(dir=store.scratch) as folder:
        tempfile.tempdir = folder
        try:
            yield folder
        finally:
            tempfile.tempdir = before


def _signature() -> ModelSignature:
    """Return the signature, from the base64 texts of image files, as sent by HTTP, to one row per image."""
    label, probability = ColSpec("string", "label"), ColSpec("double", "probability")
    probabilities = ColSpec(Map(DataType.double), "probabilities")
    signature = ModelSignature(Schema([ColSpec("string")]), Schema([label, probability, probabilities]))
    # Without this MLflow converts every input to a table, so that arrays of pixels could not be passed from Python.
    signature._is_signature_from_type_hint = True
    return signature


def _example() -> list[str]:
    """Return the base64 text of a grey square as a PNG, as the data's own images may be confidential."""
    file = io.BytesIO()
    Image.new("L", (32, 32), 128).save(file, "PNG")
    return [base64.b64encode(file.getvalue()).decode()]


def _files(folder: Path) -> list[Path]:
    # MLflow adds the file `registered_model_meta` to its downloads.
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "registered_model_meta")


def cached_verdict(store: TrackingStore, name: str, version: int, key: str) -> str | None:
    """Return the stored verdict of a version, or `None` if it was not reached with the inputs hashed as `key`."""
    tags = store.client.get_model_version(name, str(version)).tags
    return tags.get(VERDICT) if tags.get(VERDICT_KEY) == key else None


def save_verdict(
    store: TrackingStore,
    name: str,
    version: int,
    key: str,
    summary: str,
    test_images: str,
    metric: SelectionMetric,
    score: float,
) -> None:
    """Store the verdict of the gate in the tags of a version.

    Args:
        store: The MLflow store.
        name: The name of the registered model.
        version: The evaluated version.
        key: The hash of all inputs of the verdict.
        summary: The summary of the verdict.
        test_images: The fingerprint of the test images.
        metric: The metric that the gate compares.
        score: Its value on the test images, in [0, 1].
    """
    tags = [(VERDICT, summary[:5000]), (TEST_IMAGES, test_images), (f"{TEST_SCORE_PREFIX}{metric}", f"{score:.6f}")]
    # The key is cleared first and written last, so that an interrupted update leaves no valid verdict.
    for tag, value in [(VERDICT_KEY, ""), *tags, (VERDICT_KEY, key)]:
        store.client.set_model_version_tag(name, str(version), tag, value)
    # The description is shown on the version's page.
    store.client.update_model_version(name, str(version), summary[:5000])


def count_test_set_uses(store: TrackingStore, name: str, version: int, test_images: str) -> int:
    """Return how many versions were evaluated on these test images, including `version`."""
    versions = store.client.search_model_versions(f"name = '{name}' and tags.`{TEST_IMAGES}` = '{test_images}'")
    return len({int(found.version) for found in versions} | {version})


def best_ever(store: TrackingStore, name: str, champions: Collection[int], metric: SelectionMetric) -> int | None:
    """Return the version with the highest recorded test metric among `champions`, or `None` if there is none.

    Versions that were deleted or never evaluated by this metric are ignored.
    """
    tag, there = f"{TEST_SCORE_PREFIX}{metric}", store.client.search_model_versions(f"name = '{name}'")
    evaluated = [found for found in there if int(found.version) in champions and tag in found.tags]
    best = max(evaluated, key=lambda found: float(found.tags[tag]), default=None)
    return int(best.version) if best else None


def log_file(store: TrackingStore, run_id: str, name: str, content: str) -> None:
    """Write a text file to the artifacts of a run."""
    store.client.log_text(run_id, content, name)


def read_file(store: TrackingStore, run_id: str, name: str) -> str | None:
    """Read a text file from the artifacts of a run, or return `None` if it does not exist."""
    if name not in {file.path for file in store.client.list_artifacts(run_id)}:
        return None
    with tempfile.TemporaryDirectory(dir=store.scratch) as folder:
        return Path(store.client.download_artifacts(run_id, name, folder)).read_text()
