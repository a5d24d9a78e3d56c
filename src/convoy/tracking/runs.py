"""Runs: each training in MLflow, written once, with its curves, results and files."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType
from mlflow.entities import Run as Found
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from convoy.hashing import sha256
from convoy.tracking.store import TrackingStore, uploading

IDENTITY = "convoy.identity"  # tag of a run: the hash of the settings, data and code that define its training


RESULTS = "convoy.results"  # tag of a run that is whole: the hash of the results that it shows


HASHES = "convoy.sha256"  # tag of a run and of a model version: the sha256 of every file of it, as JSON


PROCESS = "convoy.process"  # tag of a run that was seen training: the machine and the number of the process


@dataclasses.dataclass(frozen=True)
class DataVersion:
    """The data that a model saw, as MLflow shall name it."""

    name: str
    digest: str  # at most 36 characters; name and digest together are the identity of the data in MLflow
    source: str  # where it came from, such as "data.dvc"
    profile: Mapping[str, int]  # what was counted: images, classes, train, val, test, ...


Row = Mapping[str, float]  # of an epoch: "epoch", from 1, and what the history has of it, such as "val_loss"


@dataclasses.dataclass(frozen=True)
class RunRecord:
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


def run_in_training(record: Mapping[str, Any], tags: Mapping[str, str], origin: Mapping[str, str]) -> RunRecord:
    """The run of a training that has begun; of its `record` all that is known by then."""
    settings, recipe, environment = record["settings"], dict(record["settings"]["recipe"]), record["environment"]
    shown = {f"recipe.{name}": recipe.pop(name) for name in ("optimizer", "lr", "batch_size")}
    augment = recipe.pop("augment")
    data = DataVersion(**record["data"])
    threads = f"{environment['threads']} thread{'s' * (environment['threads'] > 1)}"
    processes = f", {environment['processes']} processes" if environment["processes"] > 1 else ""
    versions = {name: environment[name] for name in ("python", "torch", "pytorch-lightning", "numpy")}
    return RunRecord(
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
) -> RunRecord:
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


@contextlib.contextmanager
def sole_writer(store: TrackingStore, identity: str, timeout: float) -> Iterator[None]:
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


def find(store: TrackingStore, identity: str) -> Found | None:
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


def start_run(store: TrackingStore, run: RunRecord, process: str, moment: int) -> str | None:
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


def is_synced(found: Found, status: str, results: str) -> bool:
    """Whether a run shows these very results, and says what its files must be."""
    return found.info.status == status and found.data.tags.get(RESULTS) == results and HASHES in found.data.tags


def sync_run(store: TrackingStore, run: RunRecord, results: str, moment: int) -> str:
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


def _define(store: TrackingStore, run: RunRecord, found: Found) -> None:
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


def set_tags(store: TrackingStore, found: Found, tags: Mapping[str, str]) -> None:
    """Write those tags that differ."""
    for name, value in tags.items():
        if found.data.tags.get(name) != value:
            store.client.set_tag(found.info.run_id, name, value)


def curve_points(row: Row, moment: int) -> list[Metric]:
    """An epoch's points of the curves, at its step; val_accuracy as val/accuracy: MLflow makes sections of prefixes."""
    points = {name.replace("_", "/", 1): rounded(value) for name, value in row.items() if name != "epoch"}
    return [Metric(name, value, moment, int(row["epoch"])) for name, value in points.items() if math.isfinite(value)]


def shown_epochs(store: TrackingStore, run_id: str) -> set[int]:
    """The epochs whose points a run has."""
    return {point.step for point in store.client.get_metric_history(run_id, "val/loss")}


def log_points(client: MlflowClient, run_id: str, points: Sequence[Metric]) -> None:
    """Write points; the same one twice, moment included, is one."""
    for start in range(0, len(points), 1000):  # what a server takes at a time
        client.log_batch(run_id, metrics=points[start : start + 1000])


def rounded(value: float) -> float:
    """To seven digits, as MLflow's tables show all that there are."""
    return value if float(value).is_integer() else float(f"{value:.7g}")


def lacks(store: TrackingStore, run_id: str, metric: str) -> bool:
    """Whether a run has no such metric."""
    return metric not in store.client.get_run(run_id).data.metrics


def add_timings(store: TrackingStore, run_id: str, timings: Mapping[str, float], hardware: str) -> None:
    """Write into a run how long its model took, as `latency/<name>`, and on which hardware. No output holds that."""
    points = [Metric(f"latency/{name}", round(value, 3), _now(), 0) for name, value in timings.items()]
    store.client.log_batch(run_id, metrics=points, tags=[RunTag("latency.hardware", hardware)])


def mark_killed_runs(store: TrackingStore) -> None:
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
