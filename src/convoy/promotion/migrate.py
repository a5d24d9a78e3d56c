"""Migration of runs and model versions from an embedded MLflow store to a server, each of them exactly once."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric, Param, Run, ViewType
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from convoy.core.errors import ConvoyError
from convoy.core.hashing import verify_checksums
from convoy.promotion import champion
from convoy.tracking import database, runs
from convoy.tracking.database import local_path
from convoy.tracking.run_record import FINGERPRINT_TAG
from convoy.tracking.runs import RESULTS_TAG
from convoy.tracking.store import TrackingStore, upload_timeout
from convoy.tracking.tags import CHECKSUMS_TAG

# Tag of a copied run, model or version that holds its original id or number.
SOURCE_TAG = "convoy.moved_from"
# Tag of what was copied completely: "true" for a run, the last copied version for the registered model.
COMPLETE_TAG = "convoy.moved"


def open_embedded(root: Path, experiment: str, server: TrackingStore) -> TrackingStore:
    """Open the embedded store in `root/mlflow.db`, while `server` is open in the same project.

    Args:
        root: The folder of the project.
        experiment: The name of the MLflow experiment.
        server: The open store of the server.

    Raises:
        ConvoyError: If there is no `mlflow.db`, it does not contain the experiment, or its artifacts are elsewhere.
    """
    file, artifacts = root / "mlflow.db", (root / "mlartifacts" / experiment).as_uri()
    if not file.exists():
        raise ConvoyError(f"there is no mlflow.db in {root}, and so nothing to move")
    database.prepare(file)
    client = MlflowClient(f"sqlite:///{file}", f"sqlite:///{file}")
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise ConvoyError(f"mlflow.db has no experiment {experiment}, which is what params.yaml calls register.name")
    if found.artifact_location != artifacts:
        raise ConvoyError(f"the files of mlflow.db are in {found.artifact_location}, not in {artifacts}: put them back")
    return TrackingStore(client, found, server.address, server.locks, server.champion_notes)


def migrate(source: TrackingStore, server: TrackingStore, name: str) -> Iterator[str]:
    """Copy all runs, and all versions of the model `name`, to the server.

    Runs get new ids, with the old ones in the tag `SOURCE_TAG`. Versions keep their numbers. An interrupted migration
    continues when it is run again.

    Args:
        source: The embedded store.
        server: The store of the server.
        name: The name of the registered model.

    Yields:
        A message for each run and version that was copied, and for each that was skipped for a reason to report.

    Raises:
        ConvoyError: If the versions can't keep their numbers on the server, or the files of a version were changed.
    """
    champion.complete_pending(source, name)
    runs.mark_killed_runs(source)
    _check_no_conflict(source, server, name)
    there = {run.data.tags[SOURCE_TAG]: run for run in _runs(server, ViewType.ALL) if SOURCE_TAG in run.data.tags}
    own = {
        run.data.tags[FINGERPRINT_TAG]: run
        for run in _runs(server)
        if run.data.tags.keys() >= {FINGERPRINT_TAG, RESULTS_TAG}
    }
    ids = {}
    for run in _runs(source):
        found = there.get(run.info.run_id) or own.get(run.data.tags.get(FINGERPRINT_TAG, ""))
        if run.info.status == "RUNNING":
            yield f"run {run.info.run_name} is left out, it is training on another machine: move again afterwards"
        elif found and (COMPLETE_TAG in found.data.tags or SOURCE_TAG not in found.data.tags):
            ids[run.info.run_id] = found.info.run_id
        else:
            ids[run.info.run_id] = _copy_run(source, server, run, found)
            yield f"run {run.info.run_name} of {run.data.tags.get('data', 'unknown data')}"
    yield from _copy_versions(source, server, name, ids)


def _runs(store: TrackingStore, view: int = ViewType.ACTIVE_ONLY) -> Iterator[Run]:
    """Iterate over the runs of a store, oldest first."""
    token = None
    while token != "":
        experiment = [store.experiment.experiment_id]
        page = store.client.search_runs(experiment, "", view, 1000, ["attributes.start_time"], token)
        yield from page
        token = page.token or ""


def _copy_run(source: TrackingStore, server: TrackingStore, run: Run, found: Run | None) -> str:
    """Copy a run, or what is missing of it on the server, and return its id there."""
    client, old = server.client, run.info.run_id
    if found is None:
        tags = {**run.data.tags, SOURCE_TAG: old}
        found = client.create_run(server.experiment.experiment_id, run.info.start_time, tags, run.info.run_name)
    new = found.info.run_id
    # Set the status first: the training has ended even if the copy is interrupted.
    client.set_terminated(new, run.info.status, run.info.end_time)
    params = [Param(key, value) for key, value in run.data.params.items()]
    # A server accepts at most 100 parameters per request.
    for start in range(0, len(params), 100):
        client.log_batch(new, params=params[start : start + 100])
    points = [point for key in run.data.metrics for point in source.client.get_metric_history(old, key)]
    runs.log_points(client, new, [Metric(each.key, each.value, each.timestamp, each.step) for each in points])
    if run.inputs and run.inputs.dataset_inputs:
        client.log_inputs(new, datasets=run.inputs.dataset_inputs)
    if (folder := local_path(run.info.artifact_uri)).is_dir():
        with upload_timeout():
            client.log_artifacts(new, str(folder))
    client.set_tag(new, COMPLETE_TAG, "true")
    return new


# Versions


def _versions(store: TrackingStore, name: str) -> dict[int, ModelVersion]:
    """Return the versions of the model by their numbers, in ascending order."""
    found = {int(each.version): each for each in store.client.search_model_versions(f"name = '{name}'")}
    return dict(sorted(found.items()))


def _check_no_conflict(source: TrackingStore, server: TrackingStore, name: str) -> None:
    """Raise `ConvoyError` if the server has versions of its own, so that the copied ones can't keep their numbers."""
    if COMPLETE_TAG in _tags(server, name) or not _versions(source, name):
        return
    if own := [number for number, each in _versions(server, name).items() if SOURCE_TAG not in each.tags]:
        raise ConvoyError(
            f"{server.address} has a model {name} already, with a version {own[0]} of its own, and the versions here "
            "would not keep their numbers: nothing was moved. Rename or delete it there, and run this again"
        )


def _tags(store: TrackingStore, name: str) -> Mapping[str, str]:
    found = store.client.search_registered_models(f"name = '{name}'")
    return found[0].tags if found else {}


def _copy_versions(source: TrackingStore, server: TrackingStore, name: str, runs: Mapping[str, str]) -> Iterator[str]:
    client, ours = server.client, _versions(source, name)
    if not ours:
        return
    if last := _tags(server, name).get(COMPLETE_TAG):
        if later := [number for number in ours if number > int(last)]:
            yield f"model {name} was moved before: its versions from {later[0]} on were made here since, and stay here"
        return
    model = source.client.get_registered_model(name)
    # Suppresses the error for a model that exists already. Any other problem is raised by the next call.
    with contextlib.suppress(MlflowException):
        client.create_registered_model(name, description=model.description)
    for number, theirs in _versions(server, name).items():
        # An interrupted migration may leave a placeholder that reserved the number of a deleted version.
        if theirs.tags[SOURCE_TAG] != str(number):
            client.delete_model_version(name, str(number))
    there = _versions(server, name)
    for number, version in ours.items():
        if number not in there:
            _copy_version(source, server, version, runs.get(version.run_id or ""))
            yield f"version {number} of {name}"
    for tag, value in model.tags.items():
        client.set_registered_model_tag(name, tag, value)
    for alias, number in model.aliases.items():
        client.set_registered_model_alias(name, alias, str(number))
    client.set_registered_model_tag(name, COMPLETE_TAG, str(max(ours)))


def _copy_version(source: TrackingStore, server: TrackingStore, version: ModelVersion, run: str | None) -> None:
    """Copy a version under its own number.

    Deleted versions before it are created and deleted again, so that the server reaches that number.
    """
    client, name, number, made = server.client, version.name, int(version.version), 0
    model, tags = _copy_model(source, server, version, run), {**version.tags, SOURCE_TAG: str(version.version)}
    words = version.description
    while made < number:
        created = client.create_model_version(name, f"models:/{model}", run, tags, None, words, model_id=model)
        made = int(created.version)
        if made != number:
            client.delete_model_version(name, str(made))
    if made > number:
        raise ConvoyError(
            f"{server.address} gave the number {number} of model {name} away before: delete that model there, and run "
            "this again"
        )


def _copy_model(source: TrackingStore, server: TrackingStore, version: ModelVersion, run: str | None) -> str:
    """Copy the files of a version as a model of its run, verify them in both stores, and return the model's id."""
    client, experiment = server.client, server.experiment.experiment_id
    kind, _, old = (version.source or "").partition(":/")
    if (kind, old[:2]) != ("models", "m-"):
        raise ConvoyError(f"version {version.version} is not of this pipeline: delete it here, and run this again")
    model, hashes = source.client.get_logged_model(old), json.loads(version.tags.get(CHECKSUMS_TAG, "{}"))
    folder = local_path(model.artifact_location)
    try:
        verify_checksums(folder, hashes)
    except ConvoyError as error:
        raise ConvoyError(f"version {version.version}: {error}. Find out who changed it, or delete it here") from None
    made = next(iter(client.search_logged_models([experiment], f"tags.`{SOURCE_TAG}` = '{old}'")), None)
    if made is None:
        tags = {**model.tags, SOURCE_TAG: old}
        made = client.create_logged_model(experiment, model.name, run, tags, model.params, model.model_type)
    if made.status == LoggedModelStatus.READY:
        return made.model_id
    with upload_timeout():
        client.log_model_artifacts(made.model_id, str(folder))
    with tempfile.TemporaryDirectory(dir=server.scratch) as scratch:
        uri = f"models:/{made.model_id}"
        verify_checksums(Path(mlflow.artifacts.download_artifacts(uri, dst_path=scratch)), hashes)
    if run and version.run_id and made.model_id not in _outputs(server, run):
        points = [Metric(one.key, one.value, one.timestamp, one.step, made.model_id) for one in model.metrics or []]
        runs.log_points(client, run, points)
        client.log_outputs(run, [LoggedModelOutput(made.model_id, _outputs(source, version.run_id)[old])])
    client.finalize_logged_model(made.model_id, LoggedModelStatus.READY)
    return made.model_id


def _outputs(store: TrackingStore, run: str) -> dict[str, int]:
    """Return the step of each model of a run, by the model's id."""
    outputs = store.client.get_run(run).outputs
    return {each.model_id: each.step for each in outputs.model_outputs} if outputs else {}
