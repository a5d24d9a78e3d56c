"""Synchronizing MLflow: afterwards every run of the current results is there, complete and once."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, ViewType
from mlflow.exceptions import MlflowException
from PIL import Image

from convoy.core import config
from convoy.core.artifact_names import MANIFEST
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.reporting import report
from convoy.tracking import database, provenance, run_record, runs
from convoy.tracking.store import open_store
from convoy.training.record import TrainingRecord
from crash_injection import run_until_write
from pipeline.evaluate import evaluate
from pipeline.stage import Stage
from pipeline.sync_mlflow import find_result, sync_results
from pipeline.train import train
from small_project import ROOT, SMALL
from tracking_fixtures import copy_project, list_runs, make_client, make_trained_project, read_curve, sync

CURVES = ["epoch/lr", "epoch/train_accuracy", "epoch/train_loss", "epoch/val_accuracy", "epoch/val_loss"]


@pytest.fixture(autouse=True)
def started_by_hand(embedded_store: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_ACTOR", "GITHUB_EVENT_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def trained_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return make_trained_project(tmp_path_factory.mktemp("road") / "project", list(SMALL))


@pytest.fixture(scope="module")
def lenet_project(trained_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one architecture."""
    root = copy_project(trained_project, tmp_path_factory.mktemp("short") / "project")
    shutil.rmtree(root / "artifacts/train/resnet")
    shutil.rmtree(root / "artifacts/evaluate/resnet")
    config.compose(root, [*SMALL, "model=[lenet]"])
    return root


def load_record(root: Path, name: str) -> dict[str, Any]:
    return json.loads((root / f"artifacts/train/{name}/record.json").read_text())


def assert_complete(root: Path, names: tuple[str, ...] = ("lenet", "resnet")) -> None:
    """Every run once, each point of its curves once, and all files."""
    found = list_runs(root)
    assert [run.info.run_name for run in found] == list(names)
    for run in found:
        history = pd.read_csv(root / f"artifacts/train/{run.info.run_name}/history.csv")
        assert run.info.status == "FINISHED"
        assert run.data.tags[run_record.FINGERPRINT_TAG] == load_record(root, run.info.run_name)["fingerprint"]
        for name in CURVES:
            points = read_curve(root, run, name)
            assert [step for step, _ in points] == list(history["epoch"])
            assert [value for _, value in points] == pytest.approx(list(history[name.removeprefix("epoch/")]), abs=1e-6)
        assert run.data.metrics["test/accuracy"] <= 1
        assert len(run.inputs.dataset_inputs) == 1
        files = {file.path for file in make_client(root).list_artifacts(run.info.run_id)}
        assert {"record.json", "history.csv", "weights.safetensors", "per_class.csv", "confusion.png"} <= files


def test_runs_are_complete_and_a_second_sync_changes_nothing(trained_project: Path, tmp_path: Path) -> None:
    root = copy_project(trained_project, tmp_path / "project")
    ids = sync(root)
    assert_complete(root)
    assert ids == {run.info.run_name: run.info.run_id for run in list_runs(root)}
    before = (root / "mlflow.db").read_bytes()
    assert sync(root) == ids
    assert (root / "mlflow.db").read_bytes() == before


def test_runs_of_other_data_have_no_rank(trained_project: Path, tmp_path: Path) -> None:
    root = copy_project(trained_project, tmp_path / "project")
    sync(root)
    with open_store(root, "convoy") as store:
        older, newer = list_runs(root)
        store.client.set_tag(older.info.run_id, "data", "digits@before")
        runs.rank_runs(store, newer.data.tags["data"], "accuracy")
    assert [run.data.tags.get("rank") for run in list_runs(root)] == [None, "001"]


def test_runs_have_their_settings_metrics_and_tags(trained_project: Path, tmp_path: Path) -> None:
    root = copy_project(trained_project, tmp_path / "project")
    (root / "requirements.lock").write_text("torch==1\n")
    sync(root)
    lenet, resnet = list_runs(root)
    recipe = load_record(root, "resnet")["settings"]["recipe"]
    assert resnet.data.params["recipe.weight_decay"] == str(recipe["weight_decay"])
    assert resnet.data.params["recipe.augment.mixup"] == str(recipe["augment"]["mixup"])
    assert resnet.data.params["model.widths.3"] == str(load_record(root, "resnet")["settings"]["widths"][3])
    assert (lenet.data.params["split.seed"], lenet.data.params["train.seed"]) == ("1", "1")
    assert lenet.data.params["recipe.lr"] == str(load_record(root, "lenet")["settings"]["recipe"]["lr"])
    assert lenet.data.params["init"] == "scratch"
    assert set(lenet.data.metrics) == set(resnet.data.metrics)
    assert lenet.data.metrics["parameters"] == load_record(root, "lenet")["parameters"]
    assert lenet.data.metrics["multiply_adds"] == load_record(root, "lenet")["macs"]
    assert lenet.data.metrics["megabytes"] == pytest.approx(4e-6 * lenet.data.metrics["parameters"], rel=0.05)
    best = max(lenet, resnet, key=lambda run: run.data.metrics["kept/val_accuracy"])
    assert {run.data.tags["rank"] for run in (lenet, resnet)} == {"001", "002"}
    assert best.data.tags["rank"] == "001"
    assert lenet.data.tags["reproduction"] == resnet.data.tags["reproduction"]
    assert lenet.data.tags["data"] == "digits@" + load_record(root, "lenet")["data"]["digest"]
    assert lenet.data.tags["hardware"].startswith("cpu, ")
    assert lenet.data.tags["lock"] == sha256(root / "requirements.lock")[:12]
    assert lenet.data.tags["why"] == "manual"
    assert lenet.data.tags["who"] == lenet.data.tags["mlflow.user"]
    assert lenet.data.tags["mlflow.runColor"] == report.architecture_colour("lenet")
    assert lenet.data.metrics["test/accuracy_low"] <= lenet.data.metrics["test/accuracy"]


def test_deleted_database_is_recreated_with_every_run(trained_project: Path, tmp_path: Path) -> None:
    root = copy_project(trained_project, tmp_path / "project")
    (root / "mlflow.db").unlink()
    sync(root)
    assert_complete(root)


@pytest.mark.parametrize("classes", [2, 300])
def test_confusion_plot_of_many_classes_has_a_limited_size(classes: int, tmp_path: Path) -> None:
    names = [f"a class called {number}" for number in range(classes)]
    predictions = pd.DataFrame({"actual": names, "predicted": names[::-1]})
    report.draw_confusion(predictions, names, "resnet on test images", tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        assert 400 < min(picture.size) <= max(picture.size) < 1500


def test_sync_killed_at_any_time_is_completed_by_the_next(
    lenet_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_project(lenet_project, tmp_path / "project")
    monkeypatch.setattr(report, "draw_confusion", lambda *given: given[-1].write_bytes(b"picture"))
    left = 0

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def dies(*given: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise MlflowException("the server has died")
            answer = call(*given, **named)
            left -= 1
            if left == 0:
                raise MlflowException("the server has died and could not say that it was done")
            return answer

        return dies

    for name in ("create_run", "log_batch", "log_inputs", "log_artifact", "set_tag", "set_terminated"):
        monkeypatch.setattr(MlflowClient, name, dying(getattr(MlflowClient, name)))
    died = 0
    for moment in range(1, 100):
        left = moment
        try:
            sync(root)
            break
        except ConvoyError as error:
            assert "MLflow at sqlite:" in str(error)
            died += 1
        sync(root)
        assert_complete(root, ("lenet",))
        (run,) = list_runs(root)
        make_client(root).delete_tag(run.info.run_id, run_record.FINGERPRINT_TAG)  # as if there had been none
        make_client(root).delete_run(run.info.run_id)
    assert died > 20


@pytest.mark.parametrize("where", ["log_batch", "log_inputs", "log_artifact", "set_tag"])
def test_training_run_is_finished_even_if_sync_then_fails(
    where: str, lenet_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_project(lenet_project, tmp_path / "project")

    def fail(*_: Any, **__: Any) -> None:
        raise MlflowException("the server has died")

    with monkeypatch.context() as patch, pytest.raises(ConvoyError, match="the server has died"):
        patch.setattr(MlflowClient, where, fail)
        sync(root)
    (run,) = list_runs(root)
    assert run.info.status == "FINISHED"
    assert run.info.end_time
    sync(root)
    assert_complete(root, ("lenet",))


@pytest.mark.slow
def test_killed_first_sync_is_completed_by_the_next(
    lenet_project: Path, tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tables of a new database copied, so that each write is one of ours; those of MLflow's come below."""
    monkeypatch.setattr(report, "draw_confusion", lambda *given: given[-1].write_bytes(b"picture"))
    monkeypatch.setattr(database, "_migrate", lambda file: shutil.copy(empty_database, file))
    for number in range(1, 1000, 5):
        root = copy_project(lenet_project, tmp_path / str(number))
        (root / "mlflow.db").unlink()
        killed = run_until_write(lambda root=root: sync(root), number)  # type: ignore[misc]
        sync(root)
        assert_complete(root, ("lenet",))
        assert not (root / "mlflow.db.new").exists()
        if not killed:
            break
    assert number > 100


@pytest.mark.slow
def test_killed_store_creation_is_completed_by_the_next(tmp_path: Path) -> None:
    def create() -> None:
        with open_store(tmp_path, "convoy"):
            pass

    # the first writes and every twentieth; what one kill leaves, the next process finds
    numbers = [*range(1, 20), *range(20, 10_000, 20)]
    for number in numbers:
        if not run_until_write(create, number):
            break
        assert not (tmp_path / "mlflow.db").exists() or database._is_current(tmp_path / "mlflow.db")
    assert number > 400
    create()
    assert not (tmp_path / "mlflow.db.new").exists()
    assert make_client(tmp_path).get_experiment_by_name("convoy")


def test_run_of_a_killed_reporter_is_completed(lenet_project: Path, tmp_path: Path) -> None:
    root = copy_project(lenet_project, tmp_path / "project")
    record = TrainingRecord.load(root / "artifacts/train/lenet/record.json")
    with open_store(root, "convoy") as store:
        run = run_record.describe_training(record, {}, {"why": "scheduled", "commit": "abc"})
        begun = runs.start_run(store, run, "elsewhere 1", 1_000)
        assert begun
        first = pd.read_csv(root / "artifacts/train/lenet/history.csv").to_dict("records")[0]
        runs.log_points(store.client, begun, runs.curve_points(first, 2_000))  # type: ignore[arg-type]
    assert list_runs(root)[0].info.status == "RUNNING"
    assert sync(root) == {"lenet": begun}
    assert_complete(root, ("lenet",))
    assert [point.timestamp for point in make_client(root).get_metric_history(begun, "epoch/val_loss")].count(
        2_000
    ) == 1
    (found,) = list_runs(root)
    assert found.info.start_time == 1_000
    assert found.info.end_time == int((root / "artifacts/train/lenet" / MANIFEST).stat().st_mtime * 1000)
    assert (found.data.tags["why"], found.data.tags["commit"]) == ("scheduled", "abc")  # of when it was trained


def test_new_evaluation_of_a_training_updates_its_run(lenet_project: Path, tmp_path: Path) -> None:
    root = copy_project(lenet_project, tmp_path / "project")
    (run_id,) = sync(root).values()
    folder = root / "artifacts/evaluate/lenet"
    table = pd.read_csv(folder / "intervals.csv")
    table.loc[table["metric"] == "accuracy", "value"] = 0.125
    table.to_csv(folder / "intervals.csv", index=False)
    marks = json.loads((folder / MANIFEST).read_text()) | {"intervals.csv": sha256(folder / "intervals.csv")}
    (folder / MANIFEST).write_text(json.dumps(marks))
    assert list(sync(root).values()) == [run_id]
    (found,) = list_runs(root)
    assert found.data.metrics["test/accuracy"] == 0.125
    assert "0.1250 on test images" in found.data.tags["mlflow.note.content"]
    assert_complete(root, ("lenet",))


def test_different_weights_replace_the_old_ones(lenet_project: Path, tmp_path: Path) -> None:
    root = copy_project(lenet_project, tmp_path / "project")
    (run_id,) = sync(root).values()
    (tmp_path / "stored").mkdir()
    folder = root / "artifacts/train/lenet"
    weights = folder / "weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    marks = json.loads((folder / MANIFEST).read_text()) | {weights.name: sha256(weights)}
    (folder / MANIFEST).write_text(json.dumps(marks))
    assert list(sync(root).values()) == [run_id]
    stored = Path(make_client(root).download_artifacts(run_id, "", str(tmp_path / "stored")))
    assert (stored / weights.name).read_bytes() == weights.read_bytes()
    assert runs.checksums_of(list_runs(root)[0]) == {file.name: sha256(file) for file in stored.iterdir()}


def test_run_from_before_there_were_hashes_gets_them(lenet_project: Path, tmp_path: Path) -> None:
    root = copy_project(lenet_project, tmp_path / "project")
    (run_id,) = sync(root).values()
    make_client(root).delete_tag(run_id, runs.CHECKSUMS_TAG)
    assert list(sync(root).values()) == [run_id]
    assert runs.checksums_of(list_runs(root)[0])["weights.safetensors"]


def test_deleted_run_is_restored_and_the_older_of_two_is_kept(lenet_project: Path, tmp_path: Path) -> None:
    root = copy_project(lenet_project, tmp_path / "project")
    (run_id,) = sync(root).values()
    make_client(root).delete_run(run_id)
    assert list_runs(root) == []
    assert list(sync(root).values()) == [run_id]
    # another machine with the same results made one at the same moment
    make_client(root).create_run("1", tags={run_record.FINGERPRINT_TAG: load_record(root, "lenet")["fingerprint"]})
    assert list(sync(root).values()) == [run_id]
    assert_complete(root, ("lenet",))
    assert len(list_runs(root, ViewType.ALL)) == 2


@pytest.mark.slow
def test_concurrent_syncs_create_each_run_once(trained_project: Path, tmp_path: Path) -> None:
    root = copy_project(trained_project, tmp_path / "project")
    command, environment = [sys.executable, "-m", "pipeline.cli", "sync"], os.environ | {"PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all("MLflow shows 2 runs" in words for words in said)
    assert_complete(root)


def test_run_of_a_dead_local_process_is_marked_killed(lenet_project: Path, tmp_path: Path) -> None:
    root = copy_project(lenet_project, tmp_path / "project")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    asked = make_client(root)
    here, there = os.uname().nodename, "another-machine"
    for name, process in (("1 gone", f"{here} {gone.pid}"), ("2 alive", f"{here} {os.getpid()}")):
        asked.create_run("1", run_name=name, tags={runs.PROCESS_TAG: process})
    asked.create_run("1", run_name="3 elsewhere", tags={runs.PROCESS_TAG: f"{there} {gone.pid}"})
    sync(root)
    assert [run.info.status for run in list_runs(root)] == ["KILLED", "RUNNING", "RUNNING", "FINISHED"]


def test_evaluation_of_an_earlier_training_is_not_logged(lenet_project: Path, tmp_path: Path) -> None:
    root = copy_project(lenet_project, tmp_path / "project")
    train, path = "train@lenet:\n    outs:\n    - path: artifacts/train/lenet\n", "artifacts/train/lenet"
    lock = "schema: '2.0'\nstages:\n  {}      md5: {}\n  evaluate@lenet:\n    deps:\n    - path: {}\n      md5: {}\n"
    (root / "dvc.lock").write_text(lock.format(train, "new.dir", path, "old.dir"))
    with pytest.raises(ConvoyError, match="its evaluation belongs to an earlier training run: run `convoy run`"):
        find_result(Stage(root, "register"), "lenet")
    (root / "dvc.lock").write_text(lock.format(train, "new.dir", path, "new.dir"))
    assert find_result(Stage(root, "register"), "lenet").trained == root / path


@pytest.mark.parametrize("text", ["<<<<<<< HEAD\nschema: '2.0'\n=======\n", "stages"])
def test_unreadable_dvc_lock_is_reported(text: str, lenet_project: Path, tmp_path: Path) -> None:
    root = copy_project(lenet_project, tmp_path / "project")
    (root / "dvc.lock").write_text(text)
    with pytest.raises(ConvoyError, match=r"dvc\.lock can't be read: resolve the merge conflict, and run `convoy run`"):
        find_result(Stage(root, "register"), "lenet")


def test_missing_project_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match=r"^params\.yaml is missing"):
        sync_results(tmp_path)
    assert not list(tmp_path.iterdir())


def test_failed_training_is_logged_with_the_same_parameters(trained_project: Path, tmp_path: Path) -> None:
    root = copy_project(trained_project, tmp_path / "project")
    for folder in ("train", "evaluate"):
        shutil.rmtree(root / "artifacts" / folder / "lenet")
    config.compose(root, [*SMALL, "model.lenet.recipe.lr=1e30"])
    Stage(root, "train", "lenet").run(train)
    Stage(root, "evaluate", "lenet").run(evaluate)
    sync(root)
    lenet, resnet = list_runs(root)
    assert (lenet.info.status, resnet.info.status) == ("FAILED", "FINISHED")
    recipes = [{name for name in run.data.params if name.startswith("recipe.")} for run in (lenet, resnet)]
    assert recipes[0] == recipes[1]
    assert "failed in epoch " in lenet.data.tags["mlflow.note.content"]


def test_trigger_tag_names_what_started_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance.provenance_tags(tmp_path)["why"] == "manual"
    monkeypatch.setenv("DVC_EXP_NAME", "bold-idea")
    assert provenance.provenance_tags(tmp_path)["why"] == "tuning"
    assert provenance.provenance_tags(tmp_path)["experiment"] == "bold-idea"
    monkeypatch.setenv("GITHUB_EVENT_NAME", "schedule")
    monkeypatch.setenv("GITHUB_ACTOR", "someone")
    assert (provenance.provenance_tags(tmp_path)["why"], provenance.provenance_tags(tmp_path)["who"]) == (
        "scheduled",
        "someone",
    )


def test_commit_tag_marks_uncommitted_changes(tmp_path: Path) -> None:
    def git(*command: str) -> None:
        person = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]
        subprocess.run(["git", *person, *command], cwd=tmp_path, check=True, capture_output=True)

    assert provenance.git_commit(tmp_path) == ""
    git("init")
    (tmp_path / "conf").mkdir()
    for name in ("conf/config.yaml", "dvc.lock"):
        (tmp_path / name).write_text("seed: 1\n")
    git("add", ".")
    git("commit", "--message", "first")
    clean = provenance.git_commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "dvc.lock").write_text("seed: 2\n")
    assert provenance.git_commit(tmp_path) == clean
    (tmp_path / "conf/config.yaml").write_text("seed: 2\n")
    assert provenance.git_commit(tmp_path) == f"{clean} with changes"


def test_same_point_again_is_one_point(lenet_project: Path, tmp_path: Path) -> None:
    root = copy_project(lenet_project, tmp_path / "project")
    (run_id,) = sync(root).values()
    for _ in range(2):
        runs.log_points(make_client(root), run_id, [Metric("extra", 0.5, 1_000, 7)])
    assert read_curve(root, list_runs(root)[0], "extra") == [(7, 0.5)]
