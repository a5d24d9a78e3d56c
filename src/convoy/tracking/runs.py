"""MLflow runs: write each training once, with its curves, results and files."""

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

from convoy.core.hashing import sha256
from convoy.tracking.store import TrackingStore, uploading
from convoy.training.record import DatasetVersion, TrainingRecord

# Tag of a run: the hash of the settings, data and code that define its training.
IDENTITY = "convoy.identity"


# Tag of a complete run: the hash of the results that it shows.
RESULTS = "convoy.results"


# Tag of a run and of a model version: the SHA-256 checksums of all its files, as JSON.
HASHES = "convoy.sha256"


# Tag of a run that was logged while it trained: the machine name and the process ID.
PROCESS = "convoy.process"


# The metrics of an epoch: "epoch", counted from 1, and those in the history, such as "val_loss".
Row = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A training as shown in MLflow, with its evaluation once there is one."""

    name: str
    params: Mapping[str, object]  # flat dotted names, the same for all architectures
    tags: Mapping[str, str]  # tags that are updated; includes IDENTITY
    origin: Mapping[str, str]  # tags that are never overwritten: commit, who, why
    data: DatasetVersion
    history: Sequence[Row] = ()
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    files: Sequence[Path] = ()
    status: str = "RUNNING"  # RUNNING, FINISHED or FAILED


def run_in_training(record: TrainingRecord, tags: Mapping[str, str], origin: Mapping[str, str]) -> RunRecord:
    """Create the run of a training that has started.

    Args:
        record: Training record, with everything known when training starts.
        tags: Additional tags, which are updated.
        origin: Tags that are never overwritten.
    """
    settings, recipe, environment = record.settings, dict(record.settings["recipe"]), record.environment
    shown = {f"recipe.{name}": recipe.pop(name) for name in ("optimizer", "lr", "batch_size")}
    augment = recipe.pop("augment")
    data = record.data
    threads = f"{environment['threads']} thread{'s' * (environment['threads'] != 1)}"
    processes = f", {environment['processes']} processes" if environment["processes"] != 1 else ""
    versions = {name: environment[name] for name in ("python", "torch", "pytorch-lightning", "numpy")}
    return RunRecord(
        name=record.architecture,
        params={
            "model": record.architecture,
            "model.numbers": _line({name: settings[name] for name in settings if name not in ("init", "recipe")}),
            "init": settings["init"],
            "dataset": data.name,
            "preprocess.size": record.dataset_info.size,
            "seed": record.seed,
            "train.max_epochs": record.train.max_epochs,
            **shown,
            "recipe.augment": _line(augment),
            "recipe.others": _line(recipe),
        },
        tags={
            "mlflow.note.content": f"{record.architecture} on {data.name}",
            **tags,
            IDENTITY: record.fingerprint,
            "data": f"{data.name}@{data.digest}",
            "hardware": f"{environment['device']}, {environment['instructions']}, {threads}, "
            f"{environment['precision']}{processes}",
            "software": ", ".join(f"{name} {version}" for name, version in versions.items()),
        },
        origin=origin,
        data=data,
    )


def run_with_results(
    record: TrainingRecord,
    figures: Mapping[str, float],
    history: Sequence[Row],
    tags: Mapping[str, str],
    origin: Mapping[str, str],
    files: Sequence[Path],
) -> RunRecord:
    """Create the run of a training that has ended.

    Args:
        record: Complete training record.
        figures: Test metrics by name, logged as `test/<name>`.
        history: Metrics of each epoch.
        tags: Additional tags, which are updated.
        origin: Tags that are never overwritten.
        files: Files to upload as artifacts.
    """
    best, max_epochs, failure = record.best, record.train.max_epochs, record.failure
    weights = [file for file in files if file.suffix == ".safetensors"]
    note = ""
    if failure:
        note = f"failed in epoch {failure.epoch} of {max_epochs}, {failure.reason}"
    elif best:
        note = (
            f"{best.val_accuracy:.4f} in validation (epoch {best.epoch} of {max_epochs}), "
            f"{figures['accuracy']:.4f} on test images"
        )
    run = run_in_training(record, tags, origin)
    return dataclasses.replace(
        run,
        tags={**run.tags, "mlflow.note.content": f"{run.tags['mlflow.note.content']}: {note}"},
        metrics={
            **({f"best/{name}": getattr(best, name) for name in ("val_accuracy", "val_loss", "epoch")} if best else {}),
            **{f"test/{name}": value for name, value in figures.items()},
            "parameters": record.parameters,
            "multiply_adds": record.macs,
            **({"megabytes": sum(file.stat().st_size for file in weights) / 1e6} if weights else {}),
        },
        history=history,
        files=files,
        status="FAILED" if failure else "FINISHED",
    )


def _line(values: Mapping[str, Any]) -> str:
    """Format settings that are too many for one parameter each as one line.

    For example, `{"widths": [6, 16], "flip": False}` becomes "widths=[6,16] flip=false".
    """
    return " ".join(f"{name}={_short(value)}" for name, value in values.items())


def _short(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


@contextlib.contextmanager
def sole_writer(store: TrackingStore, identity: str, timeout: float) -> Iterator[None]:
    """Hold the lock with which only one process in a project folder writes a run.

    The holder does not need the lock that `open_store` takes. To avoid deadlocks, don't wait for that lock while
    holding this one.

    Args:
        store: Tracking store.
        identity: Value of the run's IDENTITY tag.
        timeout: Seconds to wait for the lock.

    Raises:
        filelock.Timeout: If the lock is not free in time.
    """
    file = store.locks / f"run-{identity[:12]}.lock"
    with FileLock(file, timeout):
        try:
            yield
        finally:
            # A process that waits for the lock notices that the file is gone.
            file.unlink(missing_ok=True)


def find(store: TrackingStore, identity: str) -> Found | None:
    """Find the run with this identity, and restore it if it was deleted.

    If two machines have created the run at the same time, the older one is kept and the other is deleted.

    Returns:
        The run, or None if there is none.
    """
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
    """Create the run of a training that starts, or continue it if it exists.

    Args:
        store: Tracking store.
        run: Contents of the run.
        process: Value of the PROCESS tag.
        moment: Start time, in milliseconds since the epoch.

    Returns:
        The ID of the run, or None if the run has already finished.
    """
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
    """Return whether a run has this status and shows exactly these results, with the checksums of its files."""
    return found.info.status == status and found.data.tags.get(RESULTS) == results and HASHES in found.data.tags


def sync_run(store: TrackingStore, run: RunRecord, results: str, moment: int) -> str:
    """Write everything that the store does not have yet of a run that has ended.

    The RESULTS tag is written last. After an interruption, calling this again completes the run.

    Args:
        store: Tracking store.
        run: Contents of the run.
        results: Hash of the results, for the RESULTS tag.
        moment: End time, in milliseconds since the epoch.

    Returns:
        The ID of the run.
    """
    client, found, now = store.client, find(store, run.tags[IDENTITY]), _now()
    found = found or client.create_run(store.experiment.experiment_id, now, {**run.origin, **run.tags}, run.name)
    run_id = found.info.run_id
    # Set the status first: the training has ended even if this function is interrupted.
    if found.info.status != run.status:
        client.set_terminated(run_id, run.status, max(moment, found.info.start_time))
    _define(store, run, found)
    keys = {point.key for row in run.history for point in curve_points(row, 0)} & found.data.metrics.keys()
    known = [point for key in sorted(keys) for point in client.get_metric_history(run_id, key)]
    last = max(known, key=lambda point: point.step, default=None)
    # Derive timestamps from the run. Two machines that write it at the same time then write identical points, which
    # MLflow stores once.
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
        # Weights are large. They are not uploaded again if size and recorded checksum match.
        same = held.get(file.name) == file.stat().st_size and recorded.get(file.name) == hashes[file.name]
        if file.suffix != ".safetensors" or not same:
            with uploading():
                client.log_artifact(run_id, str(file))
    missing = {name: run.origin[name] for name in run.origin.keys() - found.data.tags}
    set_tags(store, found, {**missing, **run.tags, HASHES: json.dumps(hashes)})
    client.set_tag(run_id, RESULTS, results)
    return run_id


def hashes_of(found: Found) -> dict[str, str]:
    """Return the SHA-256 checksum of each file of a run by file name; empty if its HASHES tag is missing or invalid."""
    try:
        hashes = json.loads(found.data.tags[HASHES])
    except (KeyError, ValueError):
        return {}
    return hashes if isinstance(hashes, dict) else {}


def _define(store: TrackingStore, run: RunRecord, found: Found) -> None:
    """Log those parameters and the data of a run that are missing, as MLflow does not let them be changed."""
    missing = [Param(name, str(value)) for name, value in run.params.items() if name not in found.data.params]
    if missing:
        store.client.log_batch(found.info.run_id, params=missing)
    if not found.inputs or not found.inputs.dataset_inputs:
        store.client.log_inputs(found.info.run_id, datasets=[_training_input(run.data)])


def _training_input(data: DatasetVersion) -> DatasetInput:
    dataset = Dataset(
        name=data.name,
        digest=data.digest,
        source_type="local",
        source=json.dumps({"uri": data.source}),
        profile=json.dumps(dict(data.profile)),
    )
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, "training")])


def set_tags(store: TrackingStore, found: Found, tags: Mapping[str, str]) -> None:
    """Write the tags whose values differ from those of the run."""
    for name, value in tags.items():
        if found.data.tags.get(name) != value:
            store.client.set_tag(found.info.run_id, name, value)


def curve_points(row: Row, moment: int) -> list[Metric]:
    """Return an epoch's points of all curves, with the epoch as their step.

    `val_accuracy` is named val/accuracy, because MLflow groups charts by prefix. Values that are not finite are left
    out.

    Args:
        row: Metrics of the epoch.
        moment: Timestamp of the points, in milliseconds since the epoch.
    """
    points = {name.replace("_", "/", 1): rounded(value) for name, value in row.items() if name != "epoch"}
    return [Metric(name, value, moment, int(row["epoch"])) for name, value in points.items() if math.isfinite(value)]


def shown_epochs(store: TrackingStore, run_id: str) -> set[int]:
    """Return the epochs that a run has points of."""
    return {point.step for point in store.client.get_metric_history(run_id, "val/loss")}


def log_points(client: MlflowClient, run_id: str, points: Sequence[Metric]) -> None:
    """Log points; MLflow stores a point with the same value, step and timestamp only once."""
    # A server accepts at most 1,000 points in one request.
    for start in range(0, len(points), 1000):
        client.log_batch(run_id, metrics=points[start : start + 1000])


def rounded(value: float) -> float:
    """Round a value to seven significant digits, as MLflow's tables show all digits."""
    return value if float(value).is_integer() else float(f"{value:.7g}")


def lacks(store: TrackingStore, run_id: str, metric: str) -> bool:
    """Return whether a run lacks a metric."""
    return metric not in store.client.get_run(run_id).data.metrics


def add_timings(store: TrackingStore, run_id: str, timings: Mapping[str, float], hardware: str) -> None:
    """Log the latency of a run's model, and the hardware on which it was measured.

    No output of a stage holds these, because they differ in each measurement.

    Args:
        store: Tracking store.
        run_id: ID of the run.
        timings: Latencies in milliseconds by name, logged as `latency/<name>`.
        hardware: Description of the hardware, for the tag `latency.hardware`.
    """
    points = [Metric(f"latency/{name}", round(value, 3), _now(), 0) for name, value in timings.items()]
    store.client.log_batch(run_id, metrics=points, tags=[RunTag("latency.hardware", hardware)])


def mark_killed_runs(store: TrackingStore) -> None:
    """Mark running runs as killed if their process on this machine no longer exists."""
    for run in store.client.search_runs([store.experiment.experiment_id], "attributes.status = 'RUNNING'"):
        machine, _, process = run.data.tags.get(PROCESS, "").rpartition(" ")
        if machine == platform.node() and process.isdecimal() and not _is_alive(int(process)):
            store.client.set_terminated(run.info.run_id, "KILLED")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # The process exists, and belongs to another user.
    except PermissionError:
        return True
    return True


def _now() -> int:
    return int(time.time() * 1000)
