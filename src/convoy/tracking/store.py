"""Tracking: the one door to MLflow, for experiments and runs, each brought there once."""

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
from urllib.parse import unquote, urlparse

import mlflow
import requests
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException

from convoy.disk import explain_full_disk, is_disk_error
from convoy.errors import ConvoyError
from convoy.tracking import database
from convoy.tracking.database import START_OVER

ABSENT = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")  # codes of errors: no such alias; no such model
PATIENCE = "MLFLOW_HTTP_REQUEST_TIMEOUT"  # seconds
QUICK, SLOW = "20", "600"  # for what a server answers by itself; for what it may have to pass on


# The store


@dataclasses.dataclass(frozen=True)
class TrackingStore:
    """An MLflow tracking store, and the experiment in it that is ours."""

    client: MlflowClient
    experiment: Experiment
    address: str  # where its UI answers
    locks: Path  # the folder of the locks
    champions: Path  # the folder of what this project itself remembers of its champions

    @property
    def scratch(self) -> Path:
        """The folder for temporary files of a model's size: unlike TMPDIR it has as much room as the project."""
        return self.locks / "mlflow"


@contextlib.contextmanager
def open_store(root: Path, experiment: str) -> Iterator[TrackingStore]:
    """The store that MLFLOW_TRACKING_URI names, or `root/mlflow.db` with the artifacts in `root/mlartifacts`.

    One process at a time in a project folder. Raises ConvoyError where a server can't be reached or refuses.
    """
    # MLflow's own defaults would wait for four minutes on a server that is down
    os.environ.setdefault(PATIENCE, QUICK)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false")  # nor for as long as a server may ask
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it would print a password that is in it
    embedded = f"sqlite:///{root / 'mlflow.db'}"
    uri = os.environ.get("MLFLOW_TRACKING_URI") or embedded
    if uri.startswith("sqlite:///") and root / uri.removeprefix("sqlite:///") == root / "mlflow.db":
        uri = embedded  # as MLflow's own commands are told where it is
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    mlflow.set_tracking_uri(uri)
    if uri == embedded:  # MLflow tells processes started from here; another project's store would be taken for a server
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    locks = root / "artifacts" / ".scratch"
    locks.mkdir(parents=True, exist_ok=True)
    try:
        # to search and then to create is not atomic, and two processes can't make the same database
        with FileLock(locks / "mlflow.lock"):
            if file := _sqlite_file(uri):
                database.prepare(file)
            client = _client()
            artifacts = (root / "mlartifacts" / experiment).as_uri() if uri == embedded else None
            ours = client.get_experiment_by_name(experiment)
            if ours is None:
                if artifacts:
                    database.check_owner(root / "mlflow.db")
                ours = _create_experiment(client, experiment, artifacts)
            if ours.lifecycle_stage != "active":  # it was deleted, and would hide every run
                client.restore_experiment(ours.experiment_id)
            if artifacts:
                _check_place(root, ours)
            address = without_login(uri).rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
            store = TrackingStore(client, ours, address, locks, root / "artifacts" / ".champions")
            # a process that was killed may have left some
            shutil.rmtree(store.scratch, ignore_errors=True)
            store.scratch.mkdir()
            yield store
            shutil.rmtree(store.scratch, ignore_errors=True)
    except Exception as error:
        file, is_of_mlflow = _sqlite_file(uri), _is_of_mlflow(error)
        # what a server says of a full disk is said of its own
        if (file or not is_of_mlflow) and (full := explain_full_disk(error, root)):
            raise ConvoyError(full) from error
        if not is_of_mlflow:
            raise
        fix = _how_to_fix(error, file) if file else "Start it, or mend MLFLOW_TRACKING_URI, and run this again"
        raise ConvoyError(f"{describe_error(error)}. {fix}") from error


@contextlib.contextmanager
def uploading() -> Iterator[None]:
    """For large files, which a server may first pass on to its bucket: it is waited for longer."""
    before = os.environ[PATIENCE]
    if before == QUICK:  # the user has not set it
        os.environ[PATIENCE] = SLOW
    try:
        yield
    finally:
        os.environ[PATIENCE] = before


def _sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite database; None for a server, and for a URI with more than a path in it."""
    path = uri.removeprefix("sqlite:///")
    return Path(path).absolute() if path not in (uri, "", ":memory:") and "?" not in path else None


def _how_to_fix(error: Exception, file: Path) -> str:
    """What to do about a database that MLflow can't work with."""
    said = str(error).lower()
    if is_disk_error(error):
        return f"The disk that {file.name} is on fails or is full: see to it (`df -h`), and run this again"
    if "database is locked" in said:
        return f"Another process is writing to {file.name}: wait for it or end it, and run this again"
    if "readonly database" in said or "unable to open database file" in said:
        return f"Let this user read and write {file.name} and the folder that it is in, and run this again"
    if file.name != "mlflow.db":
        return "Mend MLFLOW_TRACKING_URI, and run this again"
    return f"If mlflow.db is damaged, {START_OVER}"


def _check_place(root: Path, experiment: Experiment) -> None:
    """Raises ConvoyError where the embedded store was copied or moved: it would write into the files of the first."""
    there = local(experiment.artifact_location).resolve()
    here = (root / "mlflow.db").resolve().parent / "mlartifacts" / experiment.name  # the database may be a link
    if there != here.resolve():
        raise ConvoyError(
            f"mlflow.db has its files in {there}, not in {here}: MLflow can't move them. Put the project back there, "
            f"or else {START_OVER}"
        )


def local(uri: str) -> Path:
    """What a file:// address names."""
    return Path(unquote(urlparse(uri).path))


def _client() -> MlflowClient:
    try:
        return MlflowClient()
    except ImportError as error:  # of what speaks with a database
        raise MlflowException(str(error)) from error


def _is_of_mlflow(error: Exception) -> bool:
    """Whether it, its server, its database or its bucket failed; what speaks with these two is slow to import."""
    known = isinstance(error, MlflowException | requests.RequestException | sqlite3.Error)
    return known or type(error).__module__.startswith(("sqlalchemy.", "botocore.", "boto3."))


def _create_experiment(client: MlflowClient, name: str, artifacts: str | None) -> Experiment:
    try:
        return client.get_experiment(client.create_experiment(name, artifacts))
    except MlflowException as error:
        made = client.get_experiment_by_name(name) if error.error_code == "RESOURCE_ALREADY_EXISTS" else None
        if made is None:
            raise
        return made  # by another machine, at this moment


def describe_error(error: BaseException) -> str:
    """What to say where MLflow failed with `error`: one line, and no user name and password in it."""
    said = str(error).partition("[SQL:")[0] or repr(error)
    return without_login(f"MLflow at {mlflow.get_tracking_uri()} fails: {textwrap.shorten(said, 300)}")


def without_login(text: str) -> str:
    """The addresses in a text without user name and password."""
    return re.sub(r"//[^/\s]*@", "//", text)


# Runs


# Where a run comes from


# Views
