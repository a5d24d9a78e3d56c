"""Tracking: the one door to MLflow, for experiments and runs, each brought there once."""

import contextlib
import dataclasses
import getpass
import json
import logging
import math
import os
import platform
import re
import shutil
import sqlite3
import subprocess
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import mlflow
import requests
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, RunTag, ViewType
from mlflow.entities import Run as Found
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from convoy import database, views
from convoy.config import ConvoyError
from convoy.database import START_OVER
from convoy.disk import explain_full_disk, is_disk_error
from convoy.hashes import sha256

IDENTITY = "convoy.identity"  # tag of a run: the hash of the settings, data and code that define its training
RESULTS = "convoy.results"  # tag of a run that is whole: the hash of the results that it shows
ABSENT = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")  # codes of errors: no such alias; no such model
PATIENCE = "MLFLOW_HTTP_REQUEST_TIMEOUT"  # seconds
QUICK, SLOW = "20", "600"  # for what a server answers by itself; for what it may have to pass on
HASHES = "convoy.sha256"  # tag of a run and of a model version: the sha256 of every file of it, as JSON
PROCESS = "convoy.process"  # tag of a run that was seen training: the machine and the number of the process
CODE = ("src", "pipeline", "conf", "dvc.yaml")  # what a commit must hold for results to be made again
COLUMNS = [
    "metrics.best/val_accuracy",
    "metrics.best/val_loss",
    "metrics.best/epoch",
    "metrics.test/accuracy",
    "metrics.test/balanced_accuracy",
    "metrics.test/macro_f1",
    "metrics.test/log_loss",
    "metrics.parameters",
    "attributes.Models",
    "params.dataset",
    "params.init",
    "params.recipe.optimizer",
    "params.recipe.lr",
    "params.recipe.batch_size",
    "params.train.max_epochs",
    "params.seed",
    "tags.reproduction",
]
CURVES = ["val/accuracy", "val/loss", "train/loss"]
BARS = ["best/val_accuracy", "test/accuracy"]
SCATTERS = [("parameters", "test/accuracy")]


@dataclasses.dataclass(frozen=True)
class DataVersion:
    """The data that a model saw, as MLflow shall name it."""

    name: str
    digest: str  # at most 36 characters; name and digest together are the identity of the data in MLflow
    source: str  # where it came from, such as "data.dvc"
    profile: Mapping[str, int]  # what was counted: images, classes, train, val, test, ...


Row = Mapping[str, float]  # of an epoch: "epoch", from 1, and what the history has of it, such as "val_loss"


@dataclasses.dataclass(frozen=True)
class Run:
    """A training as MLflow shall show it, and its evaluation once there is one."""

    name: str
    params: Mapping[str, object]  # flat dotted names, the same for all architectures
    tags: Mapping[str, str]  # what is so now; IDENTITY among them
    origin: Mapping[str, str]  # tags that stay as they were first written: commit, who, why
    data: DataVersion
    history: Sequence[Row] = ()
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    files: Sequence[Path] = ()
    status: str = "RUNNING"  # or FINISHED or FAILED, as the training did


def run_in_training(record: Mapping[str, Any], tags: Mapping[str, str], origin: Mapping[str, str]) -> Run:
    """The run of a training that has begun; of its `record` all that is known by then."""
    settings, recipe, environment = record["settings"], dict(record["settings"]["recipe"]), record["environment"]
    shown = {f"recipe.{name}": recipe.pop(name) for name in ("optimizer", "lr", "batch_size")}
    augment = recipe.pop("augment")
    data = DataVersion(**record["data"])
    threads = f"{environment['threads']} thread{'s' * (environment['threads'] > 1)}"
    processes = f", {environment['processes']} processes" if environment["processes"] > 1 else ""
    versions = {name: environment[name] for name in ("python", "torch", "pytorch-lightning", "numpy")}
    return Run(
        name=record["architecture"],
        params={
            "model": record["architecture"],
            "model.numbers": _line({name: settings[name] for name in settings if name not in ("init", "recipe")}),
            "init": settings["init"],
            "dataset": data.name,
            "preprocess.size": record["task"]["size"],
            "seed": record["seed"],
            "train.max_epochs": record["train"]["max_epochs"],
            **shown,
            "recipe.augment": _line(augment),
            "recipe.others": _line(recipe),
        },
        tags={
            "mlflow.note.content": f"{record['architecture']} on {data.name}",
            **tags,
            IDENTITY: record["identity"],
            "data": f"{data.name}@{data.digest}",
            "hardware": f"{environment['device']}, {environment['instructions']}, {threads}, "
            f"{environment['precision']}{processes}",
            "software": ", ".join(f"{name} {version}" for name, version in versions.items()),
        },
        origin=origin,
        data=data,
    )


def run_with_results(
    record: Mapping[str, Any],
    figures: Mapping[str, float],
    history: Sequence[Row],
    tags: Mapping[str, str],
    origin: Mapping[str, str],
    files: Sequence[Path],
) -> Run:
    """The run that the whole record and the history of a training and its evaluation's figures make."""
    best, max_epochs, failure = record["best"], record["train"]["max_epochs"], record["failure"]
    weights = [file for file in files if file.suffix == ".safetensors"]
    if failure:
        note = f"failed in epoch {failure['epoch']} of {max_epochs}, {failure['reason']}"
    else:
        note = (
            f"{best['val_accuracy']:.4f} in validation (epoch {best['epoch']} of {max_epochs}), "
            f"{figures['accuracy']:.4f} on test images"
        )
    run = run_in_training(record, tags, origin)
    return dataclasses.replace(
        run,
        tags={**run.tags, "mlflow.note.content": f"{run.tags['mlflow.note.content']}: {note}"},
        metrics={
            **{f"best/{name}": best[name] for name in ("val_accuracy", "val_loss", "epoch") if name in best},
            **{f"test/{name}": value for name, value in figures.items()},
            "parameters": record["parameters"],
            "multiply_adds": record["multiply_adds"],
            **({"megabytes": sum(file.stat().st_size for file in weights) / 1e6} if weights else {}),
        },
        history=history,
        files=files,
        status="FAILED" if failure else "FINISHED",
    )


def _line(values: Mapping[str, Any]) -> str:
    """{"widths": [6, 16], "flip": False} -> "widths=[6,16] flip=false": what is too much for a parameter each."""
    return " ".join(f"{name}={_short(value)}" for name, value in values.items())


def _short(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


# The store


@dataclasses.dataclass(frozen=True)
class Store:
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
def store(root: Path, experiment: str) -> Iterator[Store]:
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
            store = Store(client, ours, address, locks, root / "artifacts" / ".champions")
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
        raise ConvoyError(f"{fails(error)}. {fix}") from error


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


def fails(error: BaseException) -> str:
    """What to say where MLflow failed with `error`: one line, and no user name and password in it."""
    said = str(error).partition("[SQL:")[0] or repr(error)
    return without_login(f"MLflow at {mlflow.get_tracking_uri()} fails: {textwrap.shorten(said, 300)}")


def without_login(text: str) -> str:
    """The addresses in a text without user name and password."""
    return re.sub(r"//[^/\s]*@", "//", text)


# Runs


@contextlib.contextmanager
def sole_writer(store: Store, identity: str, timeout: float) -> Iterator[None]:
    """One process at a time in a project folder writes the run of this identity.

    Who holds it may do without `store`'s lock; nobody waits for that one while holding this. Raises filelock.Timeout
    after so many seconds.
    """
    file = store.locks / f"run-{identity[:12]}.lock"
    with FileLock(file, timeout):
        try:
            yield
        finally:
            file.unlink(missing_ok=True)  # who waits for it notices


def find(store: Store, identity: str) -> Found | None:
    """The run of this identity. One that was deleted is taken back; of two, by machines that met, the elder stays."""
    ours = [store.experiment.experiment_id]
    known = store.client.search_runs(ours, f"tags.`{IDENTITY}` = '{identity}'", ViewType.ALL)
    found = sorted(known, key=lambda run: (run.info.lifecycle_stage != "active", run.info.start_time, run.info.run_id))
    if not found:
        return None
    first, *others = found
    if first.info.lifecycle_stage != "active":
        store.client.restore_run(first.info.run_id)
    for other in others:
        if other.info.lifecycle_stage == "active":
            store.client.delete_run(other.info.run_id)
    return first


def begin(store: Store, run: Run, process: str, moment: int) -> str | None:
    """The id of the run that a training begins at `moment` (ms) or goes on with; None where that is finished."""
    client, found = store.client, find(store, run.tags[IDENTITY])
    if found is None:
        tags = {**run.origin, **run.tags, PROCESS: process}
        found = client.create_run(store.experiment.experiment_id, moment, tags, run.name)
    elif found.info.status == "FINISHED" or RESULTS in found.data.tags:
        return None
    else:
        set_tags(store, found, {PROCESS: process})
        client.update_run(found.info.run_id, "RUNNING")
    _define(store, run, found)
    return found.info.run_id


def is_level(found: Found, status: str, results: str) -> bool:
    """Whether a run shows these very results, and says what its files must be."""
    return found.info.status == status and found.data.tags.get(RESULTS) == results and HASHES in found.data.tags


def level(store: Store, run: Run, results: str, moment: int) -> str:
    """Write all that the store does not have yet of a run that ended at `moment` (ms), and return its id.

    RESULTS is written last, so that whatever ends this, to do it again completes it.
    """
    client, found, now = store.client, find(store, run.tags[IDENTITY]), _now()
    found = found or client.create_run(store.experiment.experiment_id, now, {**run.origin, **run.tags}, run.name)
    run_id = found.info.run_id
    # the training is over, also where this is stopped before all of it is there
    if found.info.status != run.status:
        client.set_terminated(run_id, run.status, max(moment, found.info.start_time))
    _define(store, run, found)
    keys = {point.key for row in run.history for point in curve_points(row, 0)} & found.data.metrics.keys()
    known = [point for key in sorted(keys) for point in client.get_metric_history(run_id, key)]
    last = max(known, key=lambda point: point.step, default=None)
    # of two machines that do this at once each writes the same moments, so that every point is one
    since = last.timestamp - last.step if last else found.info.start_time
    figures = {name: rounded(value) for name, value in run.metrics.items() if math.isfinite(value)}
    changed = {name: value for name, value in figures.items() if found.data.metrics.get(name) != value}
    points = [Metric(key, changed[key], now if key in found.data.metrics else since, 0) for key in changed]
    there = {(point.key, point.step): point.value for point in known}
    curves = [point for row in run.history for point in curve_points(row, since + int(row["epoch"]))]
    points += [point for point in curves if there.get((point.key, point.step)) != point.value]
    log_points(client, run_id, points)
    held = {file.path: file.file_size for file in client.list_artifacts(run_id)}
    hashes, recorded = {file.name: sha256(file) for file in run.files}, hashes_of(found)
    for file in run.files:
        # weights are large: those which are there, and were these when they came, stay
        same = held.get(file.name) == file.stat().st_size and recorded.get(file.name) == hashes[file.name]
        if file.suffix != ".safetensors" or not same:
            with uploading():
                client.log_artifact(run_id, str(file))
    missing = {name: run.origin[name] for name in run.origin.keys() - found.data.tags}
    set_tags(store, found, {**missing, **run.tags, HASHES: json.dumps(hashes)})
    client.set_tag(run_id, RESULTS, results)
    return run_id


def hashes_of(found: Found) -> dict[str, str]:
    """The sha256 of each file of a run, by its name; of none where its tag HASHES does not say."""
    try:
        hashes = json.loads(found.data.tags[HASHES])
    except (KeyError, ValueError):
        return {}
    return hashes if isinstance(hashes, dict) else {}


def _define(store: Store, run: Run, found: Found) -> None:
    """The parameters and the data of a run, as far as they are not there: MLflow lets nobody change them."""
    missing = [Param(name, str(value)) for name, value in run.params.items() if name not in found.data.params]
    if missing:
        store.client.log_batch(found.info.run_id, params=missing)
    if not found.inputs or not found.inputs.dataset_inputs:
        store.client.log_inputs(found.info.run_id, datasets=[_training_input(run.data)])


def _training_input(data: DataVersion) -> DatasetInput:
    dataset = Dataset(
        name=data.name,
        digest=data.digest,
        source_type="local",
        source=json.dumps({"uri": data.source}),
        profile=json.dumps(dict(data.profile)),
    )
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, "training")])


def set_tags(store: Store, found: Found, tags: Mapping[str, str]) -> None:
    """Write those tags that differ."""
    for name, value in tags.items():
        if found.data.tags.get(name) != value:
            store.client.set_tag(found.info.run_id, name, value)


def curve_points(row: Row, moment: int) -> list[Metric]:
    """An epoch's points of the curves, at its step; val_accuracy as val/accuracy: MLflow makes sections of prefixes."""
    points = {name.replace("_", "/", 1): rounded(value) for name, value in row.items() if name != "epoch"}
    return [Metric(name, value, moment, int(row["epoch"])) for name, value in points.items() if math.isfinite(value)]


def shown_epochs(store: Store, run_id: str) -> set[int]:
    """The epochs whose points a run has."""
    return {point.step for point in store.client.get_metric_history(run_id, "val/loss")}


def log_points(client: MlflowClient, run_id: str, points: Sequence[Metric]) -> None:
    """Write points; the same one twice, moment included, is one."""
    for start in range(0, len(points), 1000):  # what a server takes at a time
        client.log_batch(run_id, metrics=points[start : start + 1000])


def rounded(value: float) -> float:
    """To seven digits, as MLflow's tables show all that there are."""
    return value if float(value).is_integer() else float(f"{value:.7g}")


def lacks(store: Store, run_id: str, metric: str) -> bool:
    """Whether a run has no such metric."""
    return metric not in store.client.get_run(run_id).data.metrics


def add_timings(store: Store, run_id: str, timings: Mapping[str, float], hardware: str) -> None:
    """Write into a run how long its model took, as `latency/<name>`, and on which hardware. No output holds that."""
    points = [Metric(f"latency/{name}", round(value, 3), _now(), 0) for name, value in timings.items()]
    store.client.log_batch(run_id, metrics=points, tags=[RunTag("latency.hardware", hardware)])


def end_lost_runs(store: Store) -> None:
    """Runs that count as running, though their process on this machine has gone, were killed."""
    for run in store.client.search_runs([store.experiment.experiment_id], "attributes.status = 'RUNNING'"):
        machine, _, process = run.data.tags.get(PROCESS, "").rpartition(" ")
        if machine == platform.node() and process.isdecimal() and not _is_alive(int(process)):
            store.client.set_terminated(run.info.run_id, "KILLED")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def _now() -> int:
    return int(time.time() * 1000)


# Where a run comes from


def origin(root: Path) -> dict[str, str]:
    """The tags that say where a run comes from: commit, packages, who and why. None says a secret."""
    lock, experiment, head = root / "requirements.lock", os.environ.get("DVC_EXP_NAME", ""), commit(root)
    scheduled = os.environ.get("GITHUB_EVENT_NAME") == "schedule"
    tags = {
        "commit": head,
        "lock": sha256(lock)[:12] if lock.exists() else "",
        "who": who(root),
        "why": "scheduled" if scheduled else "tuning" if experiment else "manual",
        "experiment": experiment,
        "mlflow.user": who(root),  # as MLflow calls them, for its columns User, Version and Source
        "mlflow.source.git.commit": head.partition(" ")[0],
        "mlflow.source.name": "pipeline/train.py",
        "mlflow.source.type": "LOCAL",
    }
    return {name: value for name, value in tags.items() if value}


def who(root: Path = Path()) -> str:
    """The name of the person in git, who started the workflow on GitHub, or of the account."""
    name = os.environ.get("GITHUB_ACTOR") or _git(root, "config", "user.name")
    with contextlib.suppress(OSError, KeyError):  # an account without a name, as in a container
        name = name or getpass.getuser()
    return name or "unknown"


def commit(root: Path = Path()) -> str:
    """The commit of the project in `root`, and whether code or settings differ from it; "" where git knows none."""
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", *CODE) if head else ""
    return f"{head} with changes" if changes else head


def _git(root: Path, *command: str) -> str:
    try:
        asked = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""


# Views


def save_views(store: Store) -> tuple[str, str]:
    """The links to two views of the experiment in MLflow's UI: the leaderboard, and the curves of all runs."""
    client, experiment = store.client, store.experiment.experiment_id
    best_first = "metrics.best/val_accuracy"
    table = views.save_table(client, experiment, "leaderboard", COLUMNS, best_first)
    charts = views.save_charts(client, experiment, "curves", CURVES, BARS, SCATTERS, best_first)
    note = f"[Leaderboard]({table[1:]}) · [Curves]({charts[1:]}) · all trained architectures, best in validation first"
    if store.experiment.tags.get("mlflow.note.content") != note:
        client.set_experiment_tag(experiment, "mlflow.note.content", note)
    return store.address + table, store.address + charts
