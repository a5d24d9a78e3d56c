"""Tracking: the one door to MLflow, for runs, models and aliases, each brought there once."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import requests
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, ViewType
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from convoy import views
from convoy.config import ConvoyError

IDENTITY = "convoy.identity"  # tag of a run and of a model version: the hash of the results that it shows
RECORD, WEIGHTS = "record.json", "weights.safetensors"  # what training leaves, as runs and model versions hold it
SERVED_WITH = (
    "mlflow",
    "numpy",
    "pandas",
    "pillow",
    "pydantic",
    "pytorch-lightning",
    "safetensors",
    "simplejpeg",
    "torch",
)
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


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished training with its evaluation, as MLflow shall show it."""

    name: str
    params: Mapping[str, object]  # flat dotted names
    metrics: Mapping[str, float]
    history: pd.DataFrame  # a row for each epoch: "epoch", then metrics by their names in MLflow
    tags: Mapping[str, str]  # IDENTITY among them
    files: Sequence[Path]
    data: DataVersion
    failed: bool


def describe(
    record: Mapping[str, Any],
    figures: Mapping[str, float],
    history: pd.DataFrame,
    tags: Mapping[str, str],
    files: Sequence[Path],
    data: DataVersion,
) -> Run:
    """The run that a training's record and history and its evaluation's figures make: the same names for all."""
    best, max_epochs, failure = record["best"], record["train"]["max_epochs"], record["failure"]
    note = f"{record['architecture']} on {record['task']['dataset']}: "
    if failure:
        note += f"failed in epoch {failure['epoch']} of {max_epochs}, {failure['reason']}"
    else:
        note += (
            f"{best['val_accuracy']:.4f} in validation (epoch {best['epoch']} of {max_epochs}), "
            f"{figures['accuracy']:.4f} on test images"
        )
    return Run(
        name=record["architecture"],
        params={
            "model": record["architecture"],
            "dataset": record["task"]["dataset"],
            "size": record["task"]["size"],
            "seed": record["seed"],
            "train.max_epochs": max_epochs,
            **_flat(record["settings"]["recipe"], "recipe"),
        },
        metrics={
            **{f"best/{name}": best[name] for name in ("val_accuracy", "val_loss", "epoch") if name in best},
            **{f"test/{name}": value for name, value in figures.items()},
            "parameters": record["parameters"],
        },
        history=history.rename(columns=_metric_name),
        tags={
            "mlflow.note.content": note,
            **tags,
            **{f"environment.{name}": str(value) for name, value in record["environment"].items()},
        },
        files=files,
        data=data,
        failed=failure is not None,
    )


def _metric_name(column: str) -> str:
    """val_accuracy -> val/accuracy, so that MLflow draws the metrics of a split in one section."""
    split, _, figure = column.partition("_")
    return f"{split}/{figure}" if figure else column


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """{"augment": {"flip": True}} -> {"recipe.augment.flip": True}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}"
        flat |= _flat(value, name) if isinstance(value, Mapping) else {name: value}
    return flat


@dataclasses.dataclass(frozen=True)
class Store:
    """An MLflow tracking store, and the experiment in it that is ours."""

    client: MlflowClient
    experiment: Experiment
    address: str  # where its UI answers


@contextlib.contextmanager
def store(root: Path, experiment: str) -> Iterator[Store]:
    """The store that MLFLOW_TRACKING_URI names, or `root/mlflow.db` with the artifacts in `root/mlartifacts`.

    One process at a time in a project folder. Raises ConvoyError where a server can't be reached or refuses.
    """
    # MLflow's own defaults would wait for four minutes on a server that is down
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    embedded = f"sqlite:///{root / 'mlflow.db'}"
    uri = os.environ.get("MLFLOW_TRACKING_URI") or embedded
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    mlflow.set_tracking_uri(uri)
    client = MlflowClient()
    lock = root / "artifacts" / ".scratch" / "mlflow.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        # to search and then to create is not atomic, and two processes can't make the same database
        with FileLock(lock):
            found = client.get_experiment_by_name(experiment)
            artifacts = (root / "mlartifacts" / experiment).as_uri() if uri == embedded else None
            ours = found or client.get_experiment(client.create_experiment(experiment, artifacts))
            address = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
            yield Store(client, ours, address)
    except (MlflowException, requests.RequestException) as error:
        said = f"MLflow at {uri} fails: {textwrap.shorten(str(error), 300)}"
        said = re.sub(r"//[^/@\s]*@", "//", said)  # no user name and password
        raise ConvoyError(f"{said}. Start it, or mend MLFLOW_TRACKING_URI, and run this again") from error


def find_run(store: Store, identity: str) -> str | None:
    """The id of the finished run that shows these results. What a killed process left of one is removed."""
    experiments = [store.experiment.experiment_id]
    for run in store.client.search_runs(experiments, f"tags.`{IDENTITY}` = '{identity}'", ViewType.ACTIVE_ONLY):
        if run.info.status in ("FINISHED", "FAILED"):  # as its training did
            return run.info.run_id
        store.client.delete_run(run.info.run_id)
    return None


def create_run(store: Store, run: Run) -> str:
    """Write a whole run, and return its id. It counts as finished only after the last of it has arrived."""
    client = store.client
    tags = {**resolve_tags(), **run.tags}
    info = client.create_run(store.experiment.experiment_id, tags=tags, run_name=run.name).info
    metrics = [Metric(name, round(value, 6), info.start_time, 0) for name, value in run.metrics.items()]
    for row in run.history.to_dict("records"):
        epoch = int(row.pop("epoch"))
        metrics += [Metric(str(name), round(value, 6), info.start_time, epoch) for name, value in row.items()]
    client.log_inputs(info.run_id, datasets=[_training_input(run.data)])
    client.log_batch(info.run_id, params=[Param(name, str(value)) for name, value in run.params.items()])
    for start in range(0, len(metrics), 1000):  # what a server takes at a time
        client.log_batch(info.run_id, metrics=metrics[start : start + 1000])
    for file in run.files:
        client.log_artifact(info.run_id, str(file))
    client.set_terminated(info.run_id, "FAILED" if run.failed else "FINISHED")
    return info.run_id


def _training_input(data: DataVersion) -> DatasetInput:
    dataset = Dataset(
        name=data.name,
        digest=data.digest,
        source_type="local",
        source=json.dumps({"uri": data.source}),
        profile=json.dumps(dict(data.profile)),
    )
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, "training")])


def find_version(store: Store, name: str, identity: str) -> ModelVersion | None:
    """The version of a registered model that was made from these results."""
    found = store.client.search_model_versions(f"name = '{name}' and tags.`{IDENTITY}` = '{identity}'")
    return found[0] if found else None


def register(
    store: Store,
    *,
    name: str,
    run_id: str,
    identity: str,
    model: Path,
    files: Mapping[str, Path],
    code: Path,
    step: int,
) -> ModelVersion:
    """Log a model (its Python file `model`, the package `code` and `files`, no pickle) and make a version of it."""
    # MLflow asks for type hints that would bar most of the forms which serving takes, and no filter can stop it
    with mlflow.start_run(run_id=run_id), warnings.catch_warnings(record=True):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(model),
            artifacts={key: str(file) for key, file in files.items()},
            code_paths=[str(code)],
            pip_requirements=[f"{package}=={version(package)}" for package in SERVED_WITH],
            step=step,
        )
    return mlflow.register_model(logged.model_uri, name, tags={IDENTITY: identity})


def fetch_weights(store: Store, name: str, architecture: str, init: str, folder: Path) -> str:
    """Bring record.json and weights.safetensors of a training into `folder`; returns whose they are, in words.

    `init` is the id of a run, or "champion": the champion among the versions of the registered model `name`, where it
    is of this architecture, else the newest version that is. Raises ConvoyError where there is none.
    """
    if init == "champion":
        return _fetch_version(store, name, architecture, folder)
    try:
        store.client.get_run(init)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ConvoyError(f"model.{architecture}.init: MLflow has no run {init}: take the id from its page") from error
    held = {file.path for file in store.client.list_artifacts(init)}
    for file in (RECORD, WEIGHTS):
        if file not in held:
            raise ConvoyError(f"model.{architecture}.init: run {init} holds no {file}: take another run")
        store.client.download_artifacts(init, file, str(folder))
    return f"run {init}"


def _fetch_version(store: Store, name: str, architecture: str, folder: Path) -> str:
    versions = store.client.search_model_versions(f"name = '{name}'")
    champion = store.client.get_registered_model(name).aliases.get("champion") if versions else None
    others = set()
    for found in sorted(versions, key=lambda each: (str(each.version) != str(champion), -int(each.version))):
        artifacts = f"models:/{name}/{found.version}/artifacts"
        record = json.loads(_download(f"{artifacts}/{RECORD}", folder).read_text())
        if record["architecture"] == architecture:
            _download(f"{artifacts}/{WEIGHTS}", folder)
            return f"version {found.version} of model {name}, of run {found.run_id}"
        others.add(record["architecture"])
    there = f"there are {', '.join(sorted(others))}" if others else "there is none at all"
    raise ConvoyError(
        f"model.{architecture}.init: MLflow has no version of model {name} of architecture {architecture} ({there}): "
        "set init: scratch"
    )


def _download(uri: str, folder: Path) -> Path:
    """One file, brought into `folder` under its own name."""
    return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder))).rename(folder / Path(uri).name)


def set_alias(store: Store, name: str, alias: str, version: ModelVersion) -> bool:
    """Point an alias at a version; False where it did already."""
    try:
        # MLflow hands out version numbers now as text, now as int
        if int(store.client.get_model_version_by_alias(name, alias).version) == int(version.version):
            return False
    except MlflowException as error:
        if error.error_code not in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
            raise
    store.client.set_registered_model_alias(name, alias, version.version)
    return True


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
