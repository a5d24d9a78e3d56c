"""MLflow runs: write each training run once, with its curves, results and files."""

import contextlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType
from mlflow.entities import Run as MlflowRun
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from convoy.core.config import SelectionMetric
from convoy.core.hashing import sha256
from convoy.tracking.run_record import FINGERPRINT_TAG, HistoryRow, RunRecord
from convoy.tracking.store import TrackingStore, upload_timeout
from convoy.tracking.tags import CHECKSUMS_TAG, RANK_TAG
from convoy.training.record import DatasetVersion

# Runs that are ranked. A page of MLflow's UI shows 100.
MAX_RANKED = 200
# Tag of a complete run: the hash of the results that it shows.
RESULTS_TAG = "convoy.results"
# Tag of a run that was logged while it trained: the machine name and the process ID.
PROCESS_TAG = "convoy.process"


@contextlib.contextmanager
def run_lock(store: TrackingStore, fingerprint: str, timeout: float) -> Iterator[None]:
    """Hold the lock with which only one process in a project folder writes a run.

    The holder does not need the lock that `open_store` takes. To avoid deadlocks, don't wait for that lock while
    holding this one.

    Args:
        store: Tracking store.
        fingerprint: Value of the run's tag `FINGERPRINT_TAG`.
        timeout: Seconds to wait for the lock.

    Raises:
        filelock.Timeout: If the lock is not free in time.
    """
    file = store.locks / f"run-{fingerprint[:12]}.lock"
    with FileLock(file, timeout):
        try:
            yield
        finally:
            # A process that waits for the lock notices that the file is gone.
            file.unlink(missing_ok=True)


def find_run(store: TrackingStore, fingerprint: str) -> MlflowRun | None:
    """Find the run with this fingerprint, and restore it if it was deleted.

    If two machines have created the run at the same time, the older one is kept and the other is deleted.

    Returns:
        The run, or None if there is none.
    """
    ours = [store.experiment.experiment_id]
    known = store.client.search_runs(ours, f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'", ViewType.ALL)
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


def start_run(store: TrackingStore, run: RunRecord, process: str, time_ms: int) -> str | None:
    """Create the MLflow run of a training that starts, or continue it if it exists.

    Args:
        store: Tracking store.
        run: Contents of the run.
        process: Value of the tag `PROCESS_TAG`.
        time_ms: Start time, in milliseconds since the epoch.

    Returns:
        The ID of the run, or None if the run has already finished.
    """
    client, found = store.client, find_run(store, run.tags[FINGERPRINT_TAG])
    if found is None:
        tags = {**run.provenance, **run.tags, PROCESS_TAG: process}
        found = client.create_run(store.experiment.experiment_id, time_ms, tags, run.name)
    elif found.info.status == "FINISHED" or RESULTS_TAG in found.data.tags:
        return None
    else:
        set_tags(store, found, {PROCESS_TAG: process})
        client.update_run(found.info.run_id, "RUNNING")
    _log_params_and_data(store, run, found)
    return found.info.run_id


def monitor_system(run_id: str) -> SystemMetricsMonitor:
    """Log the load of processor, memory, disk, network and GPU to a running run, until `finish` is called.

    A sample every 10 seconds took 0.16% of a processor (0.097 s in 61 s).
    """
    # It writes a warning of its own where the server is down, which the reporter has already reported.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
    monitor = SystemMetricsMonitor(run_id, resume_logging=True)
    monitor.start()
    return monitor


def is_synced(found: MlflowRun, status: str, results: str) -> bool:
    """Return whether a run has this status and shows exactly these results, with the checksums of its files."""
    tags = found.data.tags
    return found.info.status == status and tags.get(RESULTS_TAG) == results and CHECKSUMS_TAG in tags


def sync_run(store: TrackingStore, run: RunRecord, results: str, time_ms: int) -> str:
    """Write everything that the store does not have yet of a run that has ended.

    The tag `RESULTS_TAG` is written last. After an interruption, calling this again completes the run.

    Args:
        store: Tracking store.
        run: Contents of the run.
        results: Hash of the results, for the tag `RESULTS_TAG`.
        time_ms: End time, in milliseconds since the epoch.

    Returns:
        The ID of the run.
    """
    client, found, now = store.client, find_run(store, run.tags[FINGERPRINT_TAG]), _now_ms()
    found = found or client.create_run(store.experiment.experiment_id, now, {**run.provenance, **run.tags}, run.name)
    run_id = found.info.run_id
    # Set the status first: the training has ended even if this function is interrupted.
    if found.info.status != run.status:
        client.set_terminated(run_id, run.status, max(time_ms, found.info.start_time))
    _log_params_and_data(store, run, found)
    log_points(client, run_id, _missing_points(client, run, found, now))
    checksums = _upload_files(client, run, found)
    missing = {name: run.provenance[name] for name in run.provenance.keys() - found.data.tags}
    set_tags(store, found, {**missing, **run.tags, CHECKSUMS_TAG: json.dumps(checksums)})
    client.set_tag(run_id, RESULTS_TAG, results)
    return run_id


def _missing_points(client: MlflowClient, run: RunRecord, found: MlflowRun, now_ms: int) -> list[Metric]:
    """Return the points of metrics and curves that are not in MLflow yet."""
    keys = {point.key for row in run.history for point in curve_points(row, 0)} & found.data.metrics.keys()
    known = [point for key in sorted(keys) for point in client.get_metric_history(found.info.run_id, key)]
    last = max(known, key=lambda point: point.step, default=None)
    # Derive timestamps from the run. Two machines that write it at the same time then write identical points, which
    # MLflow stores once.
    since = last.timestamp - last.step if last else found.info.start_time
    metrics = {name: round_for_display(value) for name, value in run.metrics.items() if math.isfinite(value)}
    changed = {name: value for name, value in metrics.items() if found.data.metrics.get(name) != value}
    points = [Metric(key, changed[key], now_ms if key in found.data.metrics else since, 0) for key in changed]
    logged = {(point.key, point.step): point.value for point in known}
    curves = [point for row in run.history for point in curve_points(row, since + int(row["epoch"]))]
    return points + [point for point in curves if logged.get((point.key, point.step)) != point.value]


def _upload_files(client: MlflowClient, run: RunRecord, found: MlflowRun) -> dict[str, str]:
    """Upload the files of a run, and return their SHA-256 checksums by file name."""
    run_id = found.info.run_id
    sizes = {file.path: file.file_size for file in client.list_artifacts(run_id)}
    checksums, recorded = {file.name: sha256(file) for file in run.files}, checksums_of(found)
    for file in run.files:
        # Weights are large. They are not uploaded again if size and recorded checksum match.
        is_same = sizes.get(file.name) == file.stat().st_size and recorded.get(file.name) == checksums[file.name]
        if file.suffix != ".safetensors" or not is_same:
            with upload_timeout():
                client.log_artifact(run_id, str(file))
    return checksums


def checksums_of(found: MlflowRun) -> dict[str, str]:
    """Return the SHA-256 checksum of each file of a run by file name; empty if the tag is missing or invalid."""
    try:
        hashes = json.loads(found.data.tags[CHECKSUMS_TAG])
    except (KeyError, ValueError):
        return {}
    return hashes if isinstance(hashes, dict) else {}


def _log_params_and_data(store: TrackingStore, run: RunRecord, found: MlflowRun) -> None:
    """Log those parameters and the data of a run that are missing, as MLflow does not let them be changed."""
    missing = [Param(name, str(value)) for name, value in run.params.items() if name not in found.data.params]
    # A server accepts at most 100 parameters in one request.
    for start in range(0, len(missing), 100):
        store.client.log_batch(found.info.run_id, params=missing[start : start + 100])
    if not found.inputs or not found.inputs.dataset_inputs:
        store.client.log_inputs(found.info.run_id, datasets=[_dataset_input(run.data)])


def _dataset_input(data: DatasetVersion) -> DatasetInput:
    dataset = Dataset(
        name=data.name,
        digest=data.digest,
        source_type="local",
        source=json.dumps({"uri": data.source}),
        profile=json.dumps(dict(data.profile)),
    )
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, "training")])


def set_tags(store: TrackingStore, found: MlflowRun, tags: Mapping[str, str]) -> None:
    """Write the tags whose values differ from those of the run."""
    for name, value in tags.items():
        if found.data.tags.get(name) != value:
            store.client.set_tag(found.info.run_id, name, value)


def rank_runs(store: TrackingStore, data: str, metric: SelectionMetric) -> None:
    """Give the runs of the current data the tag `RANK_TAG`, best in validation first, and no other run.

    MLflow's UI sorts by one column, and would otherwise mix runs of all versions of the data. Ties are broken as in the
    leaderboard of a terminal.

    Args:
        store: Tracking store.
        data: Value of the tag `data` of the current data.
        metric: Metric on the validation images to rank by.
    """
    experiment, is_current = [store.experiment.experiment_id], f"tags.data = '{data}'"
    found = store.client.search_runs(experiment, is_current, max_results=MAX_RANKED)

    def key(run: MlflowRun) -> tuple[float, float, str]:
        metrics = run.data.metrics
        score, loss = metrics.get(f"validation/{metric}", -math.inf), metrics.get("validation/loss", math.inf)
        return -score, loss, run.info.run_name or ""

    for position, run in enumerate(sorted(found, key=key), 1):
        set_tags(store, run, {RANK_TAG: f"{position:03}"})
    for run in store.client.search_runs(experiment, f"tags.{RANK_TAG} LIKE '%' AND tags.data != '{data}'"):
        store.client.delete_tag(run.info.run_id, RANK_TAG)


def curve_points(row: HistoryRow, time_ms: int) -> list[Metric]:
    """Return an epoch's points of all curves, with the epoch as their step.

    `val_accuracy` is named epoch/val_accuracy: MLflow groups charts by prefix, in alphabetical order, and a page should
    begin with the curves. Values that are not finite are left out.

    Args:
        row: Metrics of the epoch.
        time_ms: Timestamp of the points, in milliseconds since the epoch.
    """
    points = {f"epoch/{name}": round_for_display(value) for name, value in row.items() if name != "epoch"}
    return [Metric(name, value, time_ms, int(row["epoch"])) for name, value in points.items() if math.isfinite(value)]


def logged_epochs(store: TrackingStore, run_id: str) -> set[int]:
    """Return the epochs that a run has points of."""
    return {point.step for point in store.client.get_metric_history(run_id, "epoch/val_loss")}


def log_points(client: MlflowClient, run_id: str, points: Sequence[Metric]) -> None:
    """Log points; MLflow stores a point with the same value, step and timestamp only once."""
    # A server accepts at most 1,000 points in one request.
    for start in range(0, len(points), 1000):
        client.log_batch(run_id, metrics=points[start : start + 1000])


def round_for_display(value: float) -> float:
    """Round a value to seven significant digits, as MLflow's tables show all digits."""
    return value if float(value).is_integer() else float(f"{value:.7g}")


def log_latencies(store: TrackingStore, run_id: str, latencies: Mapping[str, float], hardware: str) -> None:
    """Log the latency of a run's model, and the hardware on which it was measured.

    No output of a stage holds these, because they differ in each measurement.

    Args:
        store: Tracking store.
        run_id: ID of the run.
        latencies: Latencies in milliseconds by name, logged as `latency/<name>`.
        hardware: Description of the hardware, for the tag `latency.hardware`.
    """
    points = [Metric(f"latency/{name}", round(value, 3), _now_ms(), 0) for name, value in latencies.items()]
    store.client.log_batch(run_id, metrics=points, tags=[RunTag("latency.hardware", hardware)])


def read_latencies(store: TrackingStore, run_id: str) -> dict[str, float | str]:
    """Return what `log_latencies` has logged: latencies by name, and the `hardware`; empty if there are none."""
    data, prefix = store.client.get_run(run_id).data, "latency/"
    found = {name.removeprefix(prefix): value for name, value in data.metrics.items() if name.startswith(prefix)}
    return {**found, "hardware": data.tags.get("latency.hardware", "")} if found else {}


def name_process() -> str:
    """Return the value of the tag `PROCESS_TAG` for this process: its machine and its ID."""
    return f"{platform.node()} {os.getpid()}"


def mark_killed_runs(store: TrackingStore) -> None:
    """Mark running runs as killed if their process on this machine no longer exists."""
    for run in store.client.search_runs([store.experiment.experiment_id], "attributes.status = 'RUNNING'"):
        machine, _, process = run.data.tags.get(PROCESS_TAG, "").rpartition(" ")
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


def _now_ms() -> int:
    return int(time.time() * 1000)
