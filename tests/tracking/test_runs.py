"""Runs in MLflow: their data sets, parameters and errors."""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.entities import Run as Found
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT

from convoy.core.errors import ConvoyError
from convoy.tracking import run_record, runs, ui_views
from convoy.tracking import store as tracking
from convoy.tracking.run_record import RunRecord
from convoy.tracking.store import TrackingStore
from convoy.training.record import DatasetVersion
from record_factory import make_record
from tracking_fixtures import DIGITS

SETTINGS = {
    "widths": [6, 16],
    "batch_norm": True,
    "init": "scratch",
    "recipe": {"optimizer": "sgd", "lr": 0.05, "batch_size": 32, "warmup_fraction": 0.1, "augment": {"hflip": False}},
}
RECORD = make_record(architecture="vgg", settings=SETTINGS)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingStore]:
    """A store in a new folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with tracking.open_store(tmp_path_factory.mktemp("store"), "convoy") as store:
            yield store


def sync_run(store: TrackingStore, name: str, data: DatasetVersion) -> Found:
    run = RunRecord(
        name=name,
        params={"model": name},
        tags={run_record.FINGERPRINT_TAG: f"{name} {data.digest}"},
        provenance={},
        data=data,
        history=[{"epoch": 1, "val_accuracy": 0.5}, {"epoch": 2, "val_accuracy": 0.6}],
        metrics={"test/accuracy": 0.6, "test/f1": float("nan")},
        status="FINISHED",
    )
    return store.client.get_run(runs.sync_run(store, run, "results", time_ms=0))


def test_run_names_the_data_that_its_model_saw(store: TrackingStore) -> None:
    (found,) = sync_run(store, "lenet", DIGITS).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("digits", "a99769f9303d")
    assert json.loads(found.dataset.source) == {"uri": "data.dvc"}
    assert json.loads(found.dataset.profile) == {"images": 1797, "train": 1132, "val": 302, "test": 363}
    assert {tag.key: tag.value for tag in found.tags} == {"mlflow.data.context": "training"}


def test_runs_are_found_by_the_version_of_their_data(store: TrackingStore) -> None:
    newer = DatasetVersion("digits", "b1c2d3e4f5a6", "data.dvc", {"images": 1800}, split_seed=1)
    older = sync_run(store, "lenet", DIGITS).info.run_id
    runs = {sync_run(store, name, newer).info.run_id for name in ("lenet", "resnet")}
    found = store.client.search_runs([store.experiment.experiment_id], "dataset.digest = 'b1c2d3e4f5a6'")
    assert {run.info.run_id for run in found} == runs
    assert older not in runs


def test_concurrent_syncs_write_each_point_once(store: TrackingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write, later = MlflowClient.log_batch, runs._now_ms() + 60_000

    def meanwhile(client: MlflowClient, run_id: str, metrics: Sequence[Metric] = (), **named: Any) -> Any:
        if metrics:  # all is read by now; here the other one does the whole of it
            monkeypatch.setattr(MlflowClient, "log_batch", write)
            monkeypatch.setattr(runs, "_now_ms", lambda: later)
            sync_run(store, "googlenet", DIGITS)
        return write(client, run_id, metrics, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", meanwhile)
    found = sync_run(store, "googlenet", DIGITS)
    for name, points in (("epoch/val_accuracy", [(1, 0.5), (2, 0.6)]), ("test/accuracy", [(0, 0.6)])):
        history = store.client.get_metric_history(found.info.run_id, name)
        assert [(point.step, point.value) for point in history] == points


def test_experiment_created_concurrently_is_reused(store: TrackingStore) -> None:
    ours = store.experiment
    assert tracking._create_experiment(store.client, ours.name, None).experiment_id == ours.experiment_id


def test_nan_metrics_are_left_out(store: TrackingStore) -> None:
    assert set(sync_run(store, "lenet", DIGITS).data.metrics) == {"test/accuracy", "epoch/val_accuracy"}


def test_each_number_is_a_parameter_under_its_dotted_name() -> None:
    run = run_record.describe_training(RECORD, {}, {})
    found = {name: value for name, value in run.params.items() if name.startswith(("model.", "recipe."))}
    assert found == {
        "model.widths.0": 6,
        "model.widths.1": 16,
        "model.batch_norm": "true",
        "recipe.optimizer": "sgd",
        "recipe.lr": 0.05,
        "recipe.batch_size": 32,
        "recipe.warmup_fraction": 0.1,
        "recipe.augment.hflip": "false",
    }
    assert run.tags["hardware"] == "cpu, AVX512, 2 threads, bf16-mixed"


@pytest.mark.parametrize(
    ("value", "shown"), [(0.123456789, 0.1234568), (1.23456789e-7, 1.234568e-7), (12345678, 12345678), (2.0, 2.0)]
)
def test_metrics_have_seven_digits_and_counts_are_integers(value: float, shown: float) -> None:
    assert runs.round_for_display(value) == shown


def test_address_is_shown_without_user_name_and_password() -> None:
    assert tracking.remove_credentials("http://someone:secret@here:5000/a") == "http://here:5000/a"
    assert tracking.remove_credentials("http://here:5000/a@b") == "http://here:5000/a@b"


def test_mlflow_error_is_one_line_without_a_password() -> None:
    said = tracking.describe_mlflow_error(
        RuntimeError("no answer from http://someone:secret@here@host/api\n\nTraceback ...")
    )
    assert "secret" not in said
    assert "\n" not in said


def test_sqlite_uri_of_mlflow_names_the_embedded_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ("sqlite:///mlflow.db", f"sqlite:///{tmp_path / 'mlflow.db'}"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with tracking.open_store(tmp_path, "convoy") as store:
            assert store.experiment.artifact_location == (tmp_path / "mlartifacts/convoy").as_uri()
    assert (tmp_path / "mlflow.db").exists()


def test_copied_project_does_not_write_to_the_original(tmp_path: Path, embedded_store: None) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    with tracking.open_store(first, "convoy"):
        pass
    shutil.copytree(first, second)
    with (
        pytest.raises(ConvoyError, match=r"first/mlartifacts/convoy, not in .*second/mlartifacts/convoy, which MLflow"),
        tracking.open_store(second, "convoy"),
    ):
        pass


def test_deleted_experiment_is_restored_with_its_runs(tmp_path: Path, embedded_store: None) -> None:
    with tracking.open_store(tmp_path, "convoy") as store:
        run = store.client.create_run(store.experiment.experiment_id)
        store.client.delete_experiment(store.experiment.experiment_id)
    with tracking.open_store(tmp_path, "convoy") as store:
        assert store.client.get_experiment(store.experiment.experiment_id).lifecycle_stage == "active"
        assert [each.info.run_id for each in store.client.search_runs([store.experiment.experiment_id])] == [
            run.info.run_id
        ]


def test_damaged_database_is_one_line_with_the_fix(tmp_path: Path, embedded_store: None) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 500)
    with pytest.raises(ConvoyError) as raised, tracking.open_store(tmp_path, "convoy"):
        pass
    said = str(raised.value)
    assert (
        "mlflow.db fails: (sqlite3.DatabaseError) file is not a database. If mlflow.db is damaged, move mlflow.db, "
        in said
    )
    assert "\n" not in said


@pytest.mark.parametrize("uri", ["foo://x", "file:///x", "postgresql+asyncpg://someone:secret@127.0.0.1:9/x"])
def test_invalid_tracking_uri_is_one_line_with_the_fix(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConvoyError) as raised, tracking.open_store(tmp_path, "convoy"):
        pass
    assert re.search("MLflow at .* fails: .*correct MLFLOW_TRACKING_URI", str(raised.value))
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bucket_that_does_not_open_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    refused = pytest.raises(ConvoyError, match="fails: Unable to locate credentials")
    with refused, tracking.open_store(tmp_path, "convoy") as store:
        elsewhere = store.client.create_experiment("elsewhere", "s3://convoy/elsewhere")
        run = store.client.create_run(elsewhere)
        store.client.log_text(run.info.run_id, "text", "file.txt")


@pytest.mark.parametrize(("given", "waits"), [(None, "600"), ("7", "7")])
def test_upload_timeout_is_long_and_can_be_set(
    given: str | None, waits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv(tracking.REQUEST_TIMEOUT, raising=False)
    if given:
        monkeypatch.setenv(tracking.REQUEST_TIMEOUT, given)
    with tracking.open_store(tmp_path, "convoy"):
        before = MLFLOW_HTTP_REQUEST_TIMEOUT.get()
        with tracking.upload_timeout():
            assert int(waits) == MLFLOW_HTTP_REQUEST_TIMEOUT.get()
        assert MLFLOW_HTTP_REQUEST_TIMEOUT.get() == before < 60


def test_more_points_than_a_server_takes_at_a_time_come_in_parts(
    store: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(MlflowClient, "log_batch", lambda *_, metrics: sizes.append(len(metrics)))
    runs.log_points(store.client, "run", [Metric("loss", 0.5, 0, step) for step in range(2500)])
    assert sizes == [1000, 1000, 500]


def test_process_of_another_user_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_ours(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(tracking.os, "kill", not_ours)
    assert runs._is_alive(1)


def test_rank_follows_the_metric_and_breaks_ties_by_loss(store: TrackingStore) -> None:
    results = {"a": (0.9, 0.6, 0.3), "b": (0.8, 0.7, 0.2), "c": (0.8, 0.7, 0.1), "d": ()}
    client, experiment = store.client, store.experiment.experiment_id
    for name, values in results.items():
        run = client.create_run(experiment, run_name=name, tags={"data": "digits@1"})
        for metric, value in zip(("accuracy", "macro_f1", "loss"), values, strict=False):
            client.log_metric(run.info.run_id, f"validation/{metric}", value)

    def order(metric: Literal["accuracy", "macro_f1"]) -> str:
        runs.rank_runs(store, "digits@1", metric)
        ranked = client.search_runs([experiment], "tags.rank LIKE '%'", order_by=["tags.rank"])
        return "".join(run.info.run_name or "" for run in ranked)

    assert order("accuracy") == "acbd"
    assert order("macro_f1") == "cbad"


def test_views_show_only_settings_that_differ(store: TrackingStore) -> None:
    for lr, seed in (("0.1", "1"), ("0.05", "1")):
        run = store.client.create_run(store.experiment.experiment_id, tags={"data": "digits@2"})
        store.client.log_param(run.info.run_id, "recipe.lr", lr)
        store.client.log_param(run.info.run_id, "train.seed", seed)
    runs.rank_runs(store, "digits@2", "accuracy")
    experiment = store.experiment.experiment_id
    assert ui_views.list_different(store.client, experiment, ui_views.SETTINGS) == ["recipe.lr"]
