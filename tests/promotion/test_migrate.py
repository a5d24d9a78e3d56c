"""Migration to a server: runs and versions are copied unchanged and once, and it resumes after a kill."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from mlflow.entities.model_registry import ModelVersion

from convoy.core.errors import ConvoyError
from convoy.promotion import champion
from convoy.promotion.migrate import COMPLETE_TAG, SOURCE_TAG, migrate, open_embedded
from convoy.registry import model_loader
from convoy.registry import versions as registry
from convoy.tracking import run_record, runs
from convoy.tracking.database import local_path
from convoy.tracking.store import TrackingStore, open_store
from pipeline.migrate_mlflow import migrate_to_server
from promotion_fixtures import SimulatedKill, make_promotion
from registry_fixtures import LIBRARY, write_trained_files
from tracking_fixtures import DIGITS

NAME = "convoy"


@pytest.fixture(autouse=True)
def embedded_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def log_run(store: TrackingStore, name: str, **more: Any) -> str:
    """A run with a curve and a file, and its id."""
    file = store.locks / "record.json"
    file.write_text(f'"{name}"')
    history = [{"epoch": 1, "val_accuracy": 0.5, "val_loss": 1.5}, {"epoch": 2, "val_accuracy": 0.6, "val_loss": 1.2}]
    given = {"history": history, "metrics": {"test/accuracy": 0.6}, "files": [file], "status": "FINISHED"} | more
    tags = {run_record.FINGERPRINT_TAG: f"of {name}", "data": "digits@a99769f9303d"}
    # A server accepts no more than 100 parameters in a request.
    params = {"model": name, "recipe.lr": 0.1} | {f"model.widths.{number}": number for number in range(100)}
    run = run_record.RunRecord(name, params, tags, {"who": "ada"}, DIGITS, **given)
    return runs.sync_run(store, run, f"results of {name}", time_ms=2_000_000_000_000)


def register_version(store: TrackingStore, root: Path, run: str, seed: int) -> ModelVersion:
    files = write_trained_files(root / f"left {seed}", more={"fingerprint": str(seed)})
    given = {"name": NAME, "run_id": run, "identity": f"of {seed}", "files": files, "step": 2}
    return registry.register(store, **given, model=LIBRARY / "inference/pyfunc_model.py", code=LIBRARY)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with runs of all kinds, and a model with versions 1, 3 and 4, of which 3 is the champion."""
    root = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with open_store(root, NAME) as store:
            trained = [log_run(store, name) for name in ("lenet", "resnet", "vgg")]
            log_run(store, "alexnet", status="FAILED", metrics={"test/accuracy": float("nan")}, files=[])
            killed = store.client.create_run(
                store.experiment.experiment_id, 1_000, {run_record.FINGERPRINT_TAG: "k"}, "killed"
            )
            store.client.log_metric(killed.info.run_id, "epoch/val_loss", 0.5, 2_000, 1)
            store.client.set_terminated(killed.info.run_id, "KILLED", 3_000)
            for seed, run in enumerate([trained[0], trained[1], trained[1], trained[2]], start=1):
                register_version(store, root, run, seed)
            champion.set_champion(store, NAME, make_promotion(None, 1))
            champion.set_champion(store, NAME, make_promotion(1, 3))
            registry.save_verdict(store, NAME, 3, "key", "PROMOTE: better", "images", "accuracy", 0.5)
            store.client.update_registered_model(NAME, "which image it is")
            store.client.delete_model_version(NAME, "2")
    return root


@pytest.fixture
def server(tmp_path: Path, empty_database: Path) -> Iterator[TrackingStore]:
    """In a server's place another embedded store: both are reached through the same client."""
    shutil.copy(empty_database, tmp_path)
    with open_store(tmp_path, NAME) as store:
        yield store


@pytest.fixture
def source(project: Path, server: TrackingStore) -> TrackingStore:
    return open_embedded(project, NAME, server)


def list_runs(store: TrackingStore, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    return list(store.client.search_runs([store.experiment.experiment_id], run_view_type=view))


def list_versions(store: TrackingStore) -> dict[int, ModelVersion]:
    return {int(each.version): each for each in store.client.search_model_versions(f"name = '{NAME}'")}


def drop_tags(tags: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in tags.items() if name not in (SOURCE_TAG, COMPLETE_TAG)}


def describe_run(store: TrackingStore, run: Run) -> dict[str, Any]:
    """All that MLflow tells of a run, but for its id and that of its model."""
    histories = [store.client.get_metric_history(run.info.run_id, name) for name in sorted(run.data.metrics)]
    folder = local_path(run.info.artifact_uri)
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    outputs = run.outputs.model_outputs if run.outputs else []
    registered = {version.source for version in list_versions(store).values()}
    return {
        "info": (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time),
        "params": run.data.params,
        "tags": drop_tags(run.data.tags),
        "points": [(each.key, str(each.value), each.step, each.timestamp) for points in histories for each in points],
        "data": [each.to_dictionary() for each in run.inputs.dataset_inputs],
        "files": {str(file.relative_to(folder)): file.read_bytes() for file in files},
        "models": [each.step for each in outputs if f"models:/{each.model_id}" in registered],
    }


def assert_migrated(source: TrackingStore, server: TrackingStore, tmp_path: Path) -> None:
    """Every run and every version as it was, once."""
    there = {run.data.tags[SOURCE_TAG]: run for run in list_runs(server)}
    assert len(list_runs(server, ViewType.ALL)) == len(there)
    assert set(there) == {run.info.run_id for run in list_runs(source)}
    for run in list_runs(source):
        assert describe_run(server, there[run.info.run_id]) == describe_run(source, run)

    old, new = list_versions(source), list_versions(server)
    assert sorted(new) == sorted(old) == [1, 3, 4]
    assert old[3].description == "PROMOTE: better"
    for number, version in new.items():
        assert version.description == old[number].description
        assert drop_tags(version.tags) == old[number].tags
        assert version.run_id == there[old[number].run_id].info.run_id
        model_loader.fetch(version, tmp_path / f"version {number}")  # against its hashes
        mine, theirs = (find_logged_model(store, each[number]) for store, each in ((source, old), (server, new)))
        assert (theirs.name, theirs.params, drop_tags(theirs.tags)) == (mine.name, mine.params, mine.tags)
        assert {(each.key, each.value, each.step) for each in theirs.metrics} == {
            (each.key, each.value, each.step) for each in mine.metrics
        }
    models = [store.client.get_registered_model(NAME) for store in (source, server)]
    assert models[0].aliases == models[1].aliases == {"champion": 3, "previous": 1}
    assert models[0].tags == drop_tags(models[1].tags)
    assert models[0].description == models[1].description == "which image it is"
    assert champion.audit_log(server, NAME).equals(champion.audit_log(source, NAME))
    assert [each.name for each in server.client.search_registered_models()] == [NAME]


def find_logged_model(store: TrackingStore, version: ModelVersion) -> Any:
    return store.client.get_logged_model(version.source.removeprefix("models:/"))


def test_runs_and_versions_are_copied_once_and_unchanged(
    source: TrackingStore, server: TrackingStore, tmp_path: Path
) -> None:
    said = list(migrate(source, server, NAME))
    assert sorted(said) == [
        "run alexnet of digits@a99769f9303d",
        "run killed of unknown data",
        *(f"run {name} of digits@a99769f9303d" for name in ("lenet", "resnet", "vgg")),
        *(f"version {number} of convoy" for number in (1, 3, 4)),
    ]
    assert_migrated(source, server, tmp_path)
    before = (tmp_path / "mlflow.db").read_bytes()
    assert list(migrate(source, server, NAME)) == []
    assert (tmp_path / "mlflow.db").read_bytes() == before


WRITES = ["create_run", "log_batch", "log_inputs", "log_artifacts", "set_terminated", "set_tag", "create_logged_model"]
WRITES += ["log_model_artifacts", "log_outputs", "finalize_logged_model", "create_registered_model"]
WRITES += ["create_model_version", "delete_model_version", "set_registered_model_tag", "set_registered_model_alias"]


@pytest.mark.parametrize("answered", [False, True])
def test_migration_killed_between_two_writes_is_resumed(
    answered: bool, source: TrackingStore, server: TrackingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 0

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def dies(*given: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0 and not answered:
                raise SimulatedKill
            answer = call(*given, **named)
            if left < 0:
                raise SimulatedKill
            return answer

        return dies

    for name in WRITES:
        monkeypatch.setattr(MlflowClient, name, dying(getattr(MlflowClient, name)))
    for writes in range(1, 60):
        left = writes
        try:
            list(migrate(source, server, NAME))
            break
        except SimulatedKill:
            pass
    assert writes > 8
    left = 10**9
    assert_migrated(source, server, tmp_path)


def test_placeholder_versions_are_deleted(
    source: TrackingStore, server: TrackingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise SimulatedKill

    with monkeypatch.context() as patch, pytest.raises(SimulatedKill):
        patch.setattr(MlflowClient, "delete_model_version", dies)
        list(migrate(source, server, NAME))
    assert sorted(list_versions(server)) == [1, 2]
    list(migrate(source, server, NAME))
    assert_migrated(source, server, tmp_path)


def test_server_with_its_own_versions_is_refused(source: TrackingStore, server: TrackingStore) -> None:
    server.client.create_registered_model(NAME)
    server.client.create_model_version(NAME, source=str(source.locks))
    with pytest.raises(
        ConvoyError, match=r"has a model convoy already, with a version 1 of its own.*nothing was moved"
    ):
        list(migrate(source, server, NAME))
    assert list_runs(server) == []


def test_run_that_the_server_already_has_is_not_copied(source: TrackingStore, server: TrackingStore) -> None:
    own = log_run(server, "lenet")
    list(migrate(source, server, NAME))
    assert [run.info.run_id for run in list_runs(server) if run.info.run_name == "lenet"] == [own]
    assert list_versions(server)[1].run_id == own


def test_champion_is_managed_by_the_server_after_migration(
    source: TrackingStore, server: TrackingStore, project: Path
) -> None:
    list(migrate(source, server, NAME))
    champion.set_champion(server, NAME, make_promotion(3, 4))
    newer = source.client.create_model_version(NAME, source.experiment.artifact_location)
    try:
        said = list(migrate(source, server, NAME))
    finally:
        source.client.delete_model_version(NAME, newer.version)
    assert said == ["model convoy was moved before: its versions from 5 on were made here since, and stay here"]
    assert champion.current_version(server, NAME) == 4


def test_running_training_is_excluded_until_it_ends(source: TrackingStore, server: TrackingStore) -> None:
    begun = source.client.create_run(source.experiment.experiment_id, run_name="training").info.run_id
    try:
        said = list(migrate(source, server, NAME))
        assert "run training is left out, it is training on another machine: move again afterwards" in said
        assert "training" not in {run.info.run_name for run in list_runs(server)}
        source.client.set_terminated(begun)
        assert list(migrate(source, server, NAME)) == ["run training of unknown data"]
    finally:
        source.client.delete_run(begun)


def test_modified_model_is_not_migrated(source: TrackingStore, server: TrackingStore, project: Path) -> None:
    logged = find_logged_model(source, list_versions(source)[3])
    weights = local_path(logged.artifact_location) / "artifacts/weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    try:
        with pytest.raises(
            ConvoyError, match=r"version 3: .*weights\.safetensors of the model was changed since it was registered"
        ):
            list(migrate(source, server, NAME))
    finally:
        weights.write_bytes(whole)
    assert "champion" not in server.client.get_registered_model(NAME).aliases
    assert list(list_versions(server)) == [1]


def test_missing_embedded_store_or_files_are_reported(server: TrackingStore, tmp_path: Path, project: Path) -> None:
    with pytest.raises(ConvoyError, match=r"there is no mlflow\.db in "):
        open_embedded(tmp_path / "nowhere", NAME, server)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(project / "mlflow.db", elsewhere)
    with pytest.raises(ConvoyError, match=r"mlartifacts/convoy, not in .*: put them back"):
        open_embedded(elsewhere, NAME, server)
    with pytest.raises(ConvoyError, match="has no experiment another"):
        open_embedded(project, "another", server)


@pytest.mark.parametrize("address", [None, "sqlite:///mlflow.db"])
def test_missing_server_address_is_reported(
    address: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(ConvoyError, match=r"^set the target: export MLFLOW_TRACKING_URI=http://server:5000$"):
        migrate_to_server(tmp_path)
