"""`convoy tune`: it reads no test image, resumes, compares honestly, and says what is wrong before it trains."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from convoy.core.errors import ConvoyError
from pipeline import conf_files
from pipeline.tune import TuneOptions, tune
from pipeline.tuner import COMPARED_SEEDS, TrialTrainer
from small_project import ROOT, make_project, run_stages

OVERRIDES = ("model=[lenet]", "train.max_epochs=2", "trainer.threads=1", "model.lenet.recipe.lr=0.0001")
OPTIONS = TuneOptions(trials=3, ranges=("recipe.lr=log:0.00005:0.05",))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with prepared images, without the files of the test images."""
    root = make_project(tmp_path_factory.mktemp("prepared") / "project", OVERRIDES)
    run_stages(root, until="preprocess")
    for file in (root / "artifacts/preprocess").glob("test_*"):
        file.unlink()
    return root


@pytest.fixture(scope="module")
def tuned(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project after a search."""
    root = shutil.copytree(prepared, tmp_path_factory.mktemp("tuned") / "project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_ROOT"):
            patch.delenv(name, raising=False)
        tune(root, "lenet", OVERRIDES, OPTIONS)
    return root


def read_result(root: Path) -> dict:
    return json.loads((root / "artifacts/tune/lenet/result.json").read_text())


def test_search_ends_with_a_comparison_without_test_images(tuned: Path) -> None:
    result = read_result(tuned)
    table = pd.read_csv(tuned / "artifacts/tune/lenet/trials.csv")
    trials = table[table["run"].str.startswith("trial")]
    assert len(trials) == 3
    assert trials.iloc[0]["recipe.lr"] == result["present"]["recipe.lr"] == 0.0001
    best = trials[trials["state"] == "complete"].sort_values("val_accuracy").iloc[-1]
    assert best["val_accuracy"] == result["best_epoch"]["val_accuracy"]
    assert result["seeds"] == [2, 3, 4]
    compared = table[~table["run"].str.startswith("trial")]
    assert sorted(compared["seed"]) == [2, 2, 3, 3, 4, 4]
    tried = compared[compared["recipe.lr"] == result["tuned"]["recipe.lr"]]
    assert list(tried.sort_values("seed")["val_accuracy"]) == result["scores"]["tuned"]
    assert (tuned / "artifacts/tune/lenet/history.png").stat().st_size > 1000
    assert not list((tuned / "artifacts/.cache/tuning").glob("checkpoints/*"))


def test_mlflow_shows_trials_below_the_search_with_curves(tuned: Path) -> None:
    client = MlflowClient(f"sqlite:///{tuned / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("convoy-tuning")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    (search,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    children = [run for run in runs if run is not search]
    assert len(children) == 3 + 2 * COMPARED_SEEDS
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {search.info.run_id}
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    for run in children:
        curve = client.get_metric_history(run.info.run_id, "epoch/val_accuracy")
        assert run.data.metrics["kept/val_accuracy"] == pytest.approx(max(point.value for point in curve), rel=1e-6)
    assert read_result(tuned)["conclusion"] in search.data.tags["mlflow.note.content"]
    assert {"history.png", "trials.csv"} <= {file.path for file in client.list_artifacts(search.info.run_id)}


def test_same_search_again_trains_nothing(
    tuned: Path, embedded_store: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tuned)
    before = read_result(tuned)
    monkeypatch.setattr(TrialTrainer, "train", None)
    tune(tuned, "lenet", OVERRIDES, OPTIONS)
    assert read_result(tuned) == before
    assert before["conclusion"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("architecture", "overrides", "ranges", "problem"),
    [
        ("lennet", [], [], "did you mean lenet?"),
        ("lenet", ["preprocess.size=64"], [], r"other settings \(preprocess.size\): run `convoy run` first"),
        ("lenet", [], ["recipe.lr"], "--param recipe.lr: write a setting and its range"),
        ("lenet", [], ["recipe.momentum=uniform:0:1.5"], "model.lenet.recipe.momentum=1.5"),
    ],
)
def test_wrong_search_is_refused_before_it_trains(
    prepared: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    overrides: list[str],
    ranges: list[str],
    problem: str,
) -> None:
    monkeypatch.chdir(prepared)
    with pytest.raises(ConvoyError, match=problem):
        tune(prepared, architecture, [*OVERRIDES, *overrides], TuneOptions(ranges=ranges))


def test_tuned_settings_are_written_with_comments_kept(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    values = {"model.resnet.recipe.lr": 0.0432, "model.resnet.recipe.weight_decay": 1.23e-05}
    conf_files.write_values(tmp_path, values)
    before, after = ((root / "conf/model/resnet.yaml").read_text().splitlines() for root in (ROOT, tmp_path))
    (changed,) = (line for line in before if line not in after)
    assert changed.startswith("    lr: 0.1 # maximum learning rate; 0.01 to 0.3")
    added = [line for line in after if line not in before]
    assert added[0] == changed.replace("0.1", "0.0432", 1)
    assert added[1].startswith("    weight_decay: 1.23e-05 #")
    assert len(added) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_search_loses_at_most_the_running_trial(
    prepared: Path, tmp_path: Path, embedded_store: None, number: signal.Signals
) -> None:
    root = shutil.copytree(prepared, tmp_path / "project")
    command = [sys.executable, "-m", "pipeline.cli", "tune", "lenet", *OVERRIDES, "train.max_epochs=40"]
    command += ["--trials", "5", "--param", OPTIONS.ranges[0], "--jobs", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        lines = [process.stdout.readline(), process.stdout.readline()]
        time.sleep(0.5)
        process.send_signal(number)
        lines += process.stdout.read().splitlines()
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)

    resumed = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    shown = [line for line in [*lines, *resumed.stdout.splitlines()] if line.startswith("trial ")]
    assert len(shown) == 5, "no trial was shown, and so trained to its end, twice"
    assert read_result(root)["trials"] == 5
