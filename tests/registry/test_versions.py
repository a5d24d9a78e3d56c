"""Registering: how it changes the run of the model, and where it writes."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException

from convoy.core.artifact_names import TRAINING_HASHES
from convoy.core.errors import ConvoyError
from convoy.registry import model_loader, versions
from convoy.tracking.store import TrackingStore, open_store
from crash_injection import run_until_write
from registry_fixtures import LIBRARY, write_trained_files


@pytest.fixture
def root(tmp_path: Path, empty_database: Path, embedded_store: None) -> Path:
    """A project with a finished run, and what its training left."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(empty_database, folder)
    write_trained_files(folder / "left")
    with open_store(folder, "convoy") as store:
        run = store.client.create_run(store.experiment.experiment_id)
        store.client.log_metric(run.info.run_id, "val/accuracy", 0.5, step=1)
        store.client.log_param(run.info.run_id, "seed", "1")
        store.client.set_terminated(run.info.run_id, "FINISHED", run.info.start_time + 7)
    return folder


def read_run(client: MlflowClient, experiment: str) -> tuple[str, str, int]:
    (found,) = client.search_runs([experiment])
    return found.info.run_id, found.info.status, found.info.end_time - found.info.start_time


def register_trained(root: Path) -> None:
    with open_store(root, "convoy") as store:
        register_in(store, root)


def register_in(store: TrackingStore, root: Path) -> None:
    versions.register(
        store,
        name="convoy",
        run_id=read_run(store.client, store.experiment.experiment_id)[0],
        identity="made here",
        model=LIBRARY / "inference/pyfunc_model.py",
        files={file.stem: file for file in sorted((root / "left").iterdir())},
        code=LIBRARY,
        step=1,
    )


def assert_run_is_finished(root: Path) -> None:
    with open_store(root, "convoy") as store:
        assert read_run(store.client, store.experiment.experiment_id)[1:] == ("FINISHED", 7)


def make_failing(error: BaseException) -> Callable[..., None]:
    def fails(*_: object, **__: object) -> None:
        raise error

    return fails


@pytest.mark.parametrize("error", [MlflowException("it has died"), KeyboardInterrupt(), SystemExit(143)])
@pytest.mark.parametrize("where", ["log_outputs", "log_model_artifacts", "create_registered_model", "verify_checksums"])
def test_failure_in_registering_leaves_the_run_finished(
    where: str, error: BaseException, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises((ConvoyError, KeyboardInterrupt, SystemExit)):
        patch.setattr(
            versions if where == "verify_checksums" else MlflowClient, where, make_failing(error), raising=True
        )
        register_trained(root)
    assert_run_is_finished(root)


@pytest.mark.parametrize("write", [5, 20, 40])
def test_kill_in_registering_leaves_the_run_finished(write: int, root: Path) -> None:
    assert run_until_write(lambda: register_trained(root), write)
    assert_run_is_finished(root)
    register_trained(root)
    assert_run_is_finished(root)
    with open_store(root, "convoy") as store:
        models = store.client.search_logged_models([store.experiment.experiment_id])
        assert [model.status for model in models].count(LoggedModelStatus.READY) >= 1
        assert LoggedModelStatus.PENDING not in [model.status for model in models]


def test_results_that_another_registers_too_stay_one_version(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify_checksums = versions.verify_checksums
    with open_store(root, "convoy") as store:

        def register_too(*arguments: object) -> None:
            monkeypatch.setattr(versions, "verify_checksums", verify_checksums)
            register_in(store, root)

        monkeypatch.setattr(versions, "verify_checksums", register_too)
        register_in(store, root)
        (version,) = store.client.search_model_versions("name = 'convoy'")
        (model,) = store.client.search_logged_models([store.experiment.experiment_id])
        assert model.status == LoggedModelStatus.READY
        assert (version.version, version.source) == (1, f"models:/{model.model_id}")


def test_registered_model_belongs_to_its_run(root: Path) -> None:
    register_trained(root)
    assert_run_is_finished(root)
    with open_store(root, "convoy") as store:
        run_id = read_run(store.client, store.experiment.experiment_id)[0]
        (model,) = store.client.search_logged_models([store.experiment.experiment_id])
        assert (model.name, model.source_run_id, model.params) == ("model", run_id, {"seed": "1"})
        assert [(point.key, point.value, point.step) for point in model.metrics or []] == [("val/accuracy", 0.5, 1)]
        assert [each.model_id for each in store.client.get_run(run_id).outputs.model_outputs] == [model.model_id]
        assert store.client.get_model_version("convoy", "1").run_id == run_id


@pytest.mark.parametrize("name", [TRAINING_HASHES, "seen.txt"])
def test_training_hashes_are_read_under_both_names(name: str, root: Path) -> None:
    (root / "left" / name).write_text("0123\n4567\n")
    register_trained(root)
    with open_store(root, "convoy") as store:
        assert model_loader.training_hashes(store.client.get_model_version("convoy", "1")) == ["0123", "4567"]


def test_no_model_is_written_where_temporary_files_are(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], tempfile.mkdtemp
    (tmp_path / "small").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "small"))

    def make_and_tell(*given: str, **named: str) -> str:
        made.append(make(*given, **named))
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_tell)
    register_trained(root)
    with open_store(root, "convoy") as store:
        version = store.client.get_model_version("convoy", "1")
        model_loader.load(version, store.scratch)
    assert len(made) >= 3
    assert not [folder for folder in made if Path(folder).is_relative_to(tmp_path / "small")]
    assert not list((root / "artifacts/.scratch").glob("*/"))  # nor is anything left
