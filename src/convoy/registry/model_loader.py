"""Loading of registered versions, with each file first verified by its sha256 in MLflow's database.

Somebody who can write to the artifact storage, but not to MLflow's database, can neither change a prediction nor run
code.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from convoy.core.artifact_names import RECORD, TRAINING_HASHES, WEIGHTS
from convoy.core.errors import ConvoyError, describe_error
from convoy.core.hashing import sha256, verify_checksums
from convoy.tracking.runs import checksums_of
from convoy.tracking.store import NOT_FOUND_CODES, TrackingStore
from convoy.tracking.tags import CHECKSUMS_TAG
from convoy.training.record import TrainingRecord

if TYPE_CHECKING:
    from convoy.inference.predictor import Predictor

URI = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<version>[0-9]{1,9})|@(?P<alias>[^/@]+))")
# Files of a training run that another training run can start from.
START_FILES = (RECORD, WEIGHTS)
# Name of `TRAINING_HASHES` in models that were registered with a training record of format 1.
EARLIER_TRAINING_HASHES = "seen.txt"


def find(store: TrackingStore, uri: str) -> ModelVersion:
    """Find a registered version.

    Args:
        store: The MLflow store.
        uri: models:/NAME/VERSION or models:/NAME@ALIAS.

    Raises:
        ConvoyError: If the URI is malformed or the version does not exist.
    """
    match = URI.fullmatch(uri)
    if not match:
        raise ConvoyError(f"{uri}: no registered model; name one as models:/NAME@ALIAS or models:/NAME/VERSION")
    try:
        if match["alias"]:
            return store.client.get_model_version_by_alias(match["name"], match["alias"])
        return store.client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        if error.error_code not in NOT_FOUND_CODES:
            raise
        raise ConvoyError(f"MLflow has no {uri}: `convoy run` registers a model, its page shows the versions") from None


def fetch(version: ModelVersion, folder: Path, files: Iterable[str] = ()) -> None:
    """Download files of a version and verify their checksums, before anything parses their content.

    Args:
        version: The registered version.
        folder: The folder to download to.
        files: The paths of the files within the model; all files if empty.

    Raises:
        ConvoyError: If a file is missing or was changed.
    """
    uri = f"models:/{version.name}/{version.version}"
    try:
        hashes = json.loads(version.tags[CHECKSUMS_TAG])
        wanted = {file: hashes[file] for file in files or hashes}
    except (KeyError, ValueError, TypeError):
        raise ConvoyError(f"{uri} has no hashes of these files in its tag {CHECKSUMS_TAG}: register it again") from None
    for file in wanted:
        _download(f"{uri}/{file}", folder / file)
    try:
        verify_checksums(folder, wanted)
    except ConvoyError as error:
        raise ConvoyError(f"{uri}: {error}. Find out who changed it, and promote or train another") from None


class DownloadError(ConvoyError):
    """A file of a model is missing, or its storage can't be reached."""


def _download(uri: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        try:
            Path(mlflow.artifacts.download_artifacts(uri, dst_path=scratch)).replace(target)
        except (MlflowException, OSError) as error:
            raise DownloadError(
                f"{uri} is missing or can't be fetched ({describe_error(error, 200)}); nothing of the model was used"
            ) from None


@contextlib.contextmanager
def temporary(name: str, parent: Path | None = None) -> Iterator[Path]:
    """Create a temporary folder, and replace its path by `name` in the message of any `ConvoyError`.

    Args:
        name: The origin of the files in the folder, such as a model URI.
        parent: The folder to create it in; the system's default if `None`.
    """
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        try:
            yield Path(folder)
        except ConvoyError as error:
            raise ConvoyError(str(error).replace(folder, name)) from error


def load(version: ModelVersion, folder: Path | None = None) -> "Predictor":
    """Load a version with the installed library, without downloading the code stored in the model.

    Args:
        version: The registered version.
        folder: The folder for temporary files, with room for a complete model.
    """
    # Imported here, because the import of torch takes seconds, and only this function needs it.
    from convoy.inference import predictor

    with temporary(f"models:/{version.name}/{version.version}", folder) as scratch:
        fetch(version, scratch, [f"artifacts/{file}" for file in predictor.PREDICTOR_FILES])
        return predictor.restore(scratch / "artifacts")


def fetch_weights(store: TrackingStore, name: str, architecture: str, init: str, folder: Path) -> str:
    """Download record.json and weights.safetensors of a training run, to start another training run from.

    Args:
        store: The MLflow store.
        name: The name of the registered model.
        architecture: The architecture to initialize.
        init: The id of a run, or "champion" for the champion if it has this architecture, otherwise the newest version
            that has.
        folder: The folder to download to. It remains empty if an error is raised.

    Returns:
        A description of the origin of the weights.

    Raises:
        ConvoyError: If there is no such run or version, or a file is missing or was changed.
    """
    with temporary(init, parent=folder) as scratch:
        try:
            if init == "champion":
                source, checked = _from_version(store, name, architecture, scratch)
            else:
                source, checked = _from_run(store, init, scratch)
        except ConvoyError as error:
            raise ConvoyError(f"model.{architecture}.init: {error}") from None
        for file in START_FILES:
            (checked / file).rename(folder / file)
    return source


def _from_version(store: TrackingStore, name: str, architecture: str, folder: Path) -> tuple[str, Path]:
    versions = store.client.search_model_versions(f"name = '{name}'")
    champion = store.client.get_registered_model(name).aliases.get("champion") if versions else None
    others = set()
    for found in sorted(versions, key=lambda each: (str(each.version) != str(champion), -int(each.version))):
        fetch(found, folder, [f"artifacts/{RECORD}"])
        theirs = TrainingRecord.load(folder / "artifacts" / RECORD).architecture
        if theirs == architecture:
            fetch(found, folder, [f"artifacts/{WEIGHTS}"])
            return f"version {found.version} of model {name}, of run {found.run_id}", folder / "artifacts"
        others.add(theirs)
    there = f"there are {', '.join(sorted(others))}" if others else "there is none at all"
    raise ConvoyError(
        f"MLflow has no version of model {name} of architecture {architecture} ({there}): set init: scratch"
    )


def _from_run(store: TrackingStore, run_id: str, folder: Path) -> tuple[str, Path]:
    try:
        hashes = checksums_of(store.client.get_run(run_id))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ConvoyError(f"MLflow has no run {run_id}: take the id from its page") from error
    held = {file.path for file in store.client.list_artifacts(run_id)}
    for file in START_FILES:
        if file not in held:
            raise ConvoyError(f"run {run_id} holds no {file}: take another run")
        if file not in hashes:
            raise ConvoyError(
                f"run {run_id} has no hashes of its files in its tag {CHECKSUMS_TAG}: `convoy sync` writes them for "
                "the current results; otherwise use another run, or the path of a file that you trust"
            )
        store.client.download_artifacts(run_id, file, str(folder))
        if sha256(folder / file) != hashes[file]:
            raise ConvoyError(
                f"{file} of run {run_id} is not what its training left; nothing of it was used. "
                "Find out who changed it, and take another run"
            )
    return f"run {run_id}", folder


def read_record(version: ModelVersion) -> TrainingRecord:
    """Download and return the training record of a version."""
    with tempfile.TemporaryDirectory() as scratch:
        file = f"artifacts/{RECORD}"
        fetch(version, Path(scratch), [file])
        return TrainingRecord.load(Path(scratch, file))


def all_training_hashes(store: TrackingStore, version: ModelVersion) -> list[str] | None:
    """Return the sha256 of all images that a version, or any training its initial weights come from, was trained on.

    Returns:
        The sha256 of the images, or `None` if they are unknown for one of the training runs.
    """
    record, own = read_record(version), training_hashes(version)
    before = training_hashes_of(store, version.name, record.earlier_data)
    return None if own is None or before is None else [*own, *before]


def training_hashes(version: ModelVersion) -> list[str] | None:
    """Return the sha256 of the images used to train and select a version, or `None` if they were not recorded."""
    recorded = json.loads(version.tags.get(CHECKSUMS_TAG, "{}"))
    names = [f"artifacts/{name}" for name in (TRAINING_HASHES, EARLIER_TRAINING_HASHES)]
    file = next((name for name in names if name in recorded), None)
    if file is None:
        return None
    with temporary(f"models:/{version.name}/{version.version}") as scratch:
        fetch(version, scratch, [file])
        return (scratch / file).read_text().split()


def training_hashes_of(store: TrackingStore, name: str, data: Sequence[str]) -> list[str] | None:
    """Return the sha256 of the training images of several preprocessed data sets.

    They are known for data sets that a version of the model `name` was trained on.

    Args:
        store: The MLflow store.
        name: The name of the registered model.
        data: The digests of the data sets.

    Returns:
        The sha256 of the images, or `None` if they are unknown for one of the data sets.
    """
    found: dict[str, list[str] | None] = {}
    for version in store.client.search_model_versions(f"name = '{name}'"):
        digest = store.client.get_run(str(version.run_id)).data.tags.get("data", "").rpartition("@")[2]
        if digest in data and not found.get(digest):
            found[digest] = training_hashes(version)
    lists = [found.get(digest) for digest in data]
    return None if None in lists else [image for images in lists for image in images or []]
