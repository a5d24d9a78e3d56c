"""The MLflow tracking store: open it, find or create the experiment, and explain errors."""

import contextlib
import dataclasses
import logging
import os
import re
import shutil
import sqlite3
import textwrap
from collections.abc import Iterator
from pathlib import Path

import mlflow
import requests
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException

from convoy.core.artifact_names import CHAMPION_NOTES
from convoy.core.disk import explain_full_disk, is_disk_error
from convoy.core.errors import ConvoyError
from convoy.tracking import database
from convoy.tracking.database import START_OVER, local_path

# MLflow's error codes for a missing alias and for a missing model.
NOT_FOUND_CODES = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")
# Environment variable for MLflow's request timeout in seconds, and its values for ordinary requests and for uploads.
REQUEST_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
REQUEST_TIMEOUT_S, UPLOAD_TIMEOUT_S = "20", "600"


@dataclasses.dataclass(frozen=True)
class TrackingStore:
    """An MLflow tracking store and this project's experiment in it."""

    client: MlflowClient
    experiment: Experiment
    address: str  # URL of its UI
    locks: Path  # folder of the lock files
    champion_notes: Path  # folder with a note about each registered model that has had a champion

    @property
    def scratch(self) -> Path:
        """Return the folder for large temporary files, such as models.

        Unlike TMPDIR it is on the project's own disk, and has as much space.
        """
        return self.locks / "mlflow"


@contextlib.contextmanager
def open_store(root: Path, experiment: str) -> Iterator[TrackingStore]:
    """Open the tracking store, and create the experiment if it does not exist.

    The store is the one that MLFLOW_TRACKING_URI names. If that is not set, it is the embedded store: the database
    `root/mlflow.db`, with the artifacts in `root/mlartifacts`. A lock lets only one process at a time in a project
    folder open its store.

    Args:
        root: Project folder.
        experiment: Name of the experiment.

    Yields:
        The store.

    Raises:
        ConvoyError: If the server can't be reached or refuses, if the database can't be used, or if MLflow fails
            while the store is open.
    """
    # With MLflow's defaults, requests to a server that is down fail only after four minutes.
    os.environ.setdefault(REQUEST_TIMEOUT, REQUEST_TIMEOUT_S)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    # A server may ask to wait for any time with a Retry-After header.
    os.environ.setdefault("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # The URL may contain a password.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    embedded = f"sqlite:///{root / 'mlflow.db'}"
    uri = os.environ.get("MLFLOW_TRACKING_URI") or embedded
    # The user may have named the embedded store in MLFLOW_TRACKING_URI, as MLflow's own commands need it.
    if uri.startswith("sqlite:///") and root / uri.removeprefix("sqlite:///") == root / "mlflow.db":
        uri = embedded
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    mlflow.set_tracking_uri(uri)
    # `set_tracking_uri` also sets the variable for child processes. There another project would take this store, which
    # is not its own embedded one, for a shared one.
    if uri == embedded:
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    locks = root / "artifacts" / ".scratch"
    locks.mkdir(parents=True, exist_ok=True)
    try:
        # Searching for an experiment and then creating it is not atomic, nor is creating the database.
        with FileLock(locks / "mlflow.lock"):
            if file := _sqlite_file(uri):
                database.prepare(file)
            client = _client()
            artifacts = (root / "mlartifacts" / experiment).as_uri() if uri == embedded else None
            found = client.get_experiment_by_name(experiment)
            if found is None:
                if artifacts:
                    database.check_owner(root / "mlflow.db")
                found = _create_experiment(client, experiment, artifacts)
            # A deleted experiment would hide all its runs.
            if found.lifecycle_stage != "active":
                client.restore_experiment(found.experiment_id)
            if artifacts:
                _check_location(root, found)
            address = remove_credentials(uri).rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
            store = TrackingStore(client, found, address, locks, root / CHAMPION_NOTES)
            # A killed process may have left temporary files.
            shutil.rmtree(store.scratch, ignore_errors=True)
            store.scratch.mkdir()
            yield store
            shutil.rmtree(store.scratch, ignore_errors=True)
    except Exception as error:
        file, is_mlflow_error = _sqlite_file(uri), _is_mlflow_error(error)
        # If a server reports a full disk, it is the server's disk, not ours.
        if (file or not is_mlflow_error) and (full := explain_full_disk(error, root)):
            raise ConvoyError(full) from error
        if not is_mlflow_error:
            raise
        fix = _suggest_fix(error, file) if file else "Start it, or correct MLFLOW_TRACKING_URI, and run this again"
        raise ConvoyError(f"{describe_mlflow_error(error)}. {fix}") from error


@contextlib.contextmanager
def upload_timeout() -> Iterator[None]:
    """Use a longer request timeout for large files, which a server may first have to pass on to its bucket."""
    before = os.environ[REQUEST_TIMEOUT]
    # Any other value was set by the user.
    if before == REQUEST_TIMEOUT_S:
        os.environ[REQUEST_TIMEOUT] = UPLOAD_TIMEOUT_S
    try:
        yield
    finally:
        os.environ[REQUEST_TIMEOUT] = before


def _sqlite_file(uri: str) -> Path | None:
    """Return the file of a SQLite database, or None for a server or a URI with more than a path in it."""
    path = uri.removeprefix("sqlite:///")
    return Path(path).absolute() if path not in (uri, "", ":memory:") and "?" not in path else None


def _suggest_fix(error: Exception, file: Path) -> str:
    """Return how to fix a database that MLflow can't work with, for the message."""
    message = str(error).lower()
    if is_disk_error(error):
        return f"The disk that {file.name} is on is full or fails: check it (`df -h`), and run this again"
    if "database is locked" in message:
        return f"Another process is writing to {file.name}: wait for it or stop it, and run this again"
    if "readonly database" in message or "unable to open database file" in message:
        return f"Give this user read and write access to {file.name} and to its folder, and run this again"
    if file.name != "mlflow.db":
        return "Correct MLFLOW_TRACKING_URI, and run this again"
    return f"If mlflow.db is damaged, {START_OVER}"


def _check_location(root: Path, experiment: Experiment) -> None:
    """Raise ConvoyError if the embedded store was copied or moved, as it would write into the original's files."""
    recorded = local_path(experiment.artifact_location).resolve()
    # The database may be a symbolic link.
    actual = (root / "mlflow.db").resolve().parent / "mlartifacts" / experiment.name
    if recorded != actual.resolve():
        raise ConvoyError(
            f"mlflow.db has its files in {recorded}, not in {actual}, which MLflow can't move. Move the project back, "
            f"or {START_OVER}"
        )


def _client() -> MlflowClient:
    try:
        return MlflowClient()
    # The driver of a database may not be installed.
    except ImportError as error:
        raise MlflowException(str(error)) from error


def _is_mlflow_error(error: Exception) -> bool:
    """Return whether an error comes from MLflow, its server, its database or its bucket."""
    known = isinstance(error, MlflowException | requests.RequestException | sqlite3.Error)
    # Compare names of modules, as SQLAlchemy and boto3 are slow to import.
    return known or type(error).__module__.startswith(("sqlalchemy.", "botocore.", "boto3."))


def _create_experiment(client: MlflowClient, name: str, artifacts: str | None) -> Experiment:
    try:
        return client.get_experiment(client.create_experiment(name, artifacts))
    except MlflowException as error:
        created = client.get_experiment_by_name(name) if error.error_code == "RESOURCE_ALREADY_EXISTS" else None
        if created is None:
            raise
        # Another machine has created it in the meantime.
        return created


def describe_mlflow_error(error: BaseException) -> str:
    """Describe an error of MLflow in one line, without any user name and password."""
    message = str(error).partition("[SQL:")[0] or repr(error)
    return remove_credentials(f"MLflow at {mlflow.get_tracking_uri()} fails: {textwrap.shorten(message, 300)}")


def remove_credentials(text: str) -> str:
    """Remove user names and passwords from the URLs in a text."""
    return re.sub(r"//[^/\s]*@", "//", text)
