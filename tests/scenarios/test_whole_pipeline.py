"""The whole pipeline: from images in folders to a champion, and its error messages."""

import errno
import json
import re
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from convoy.core import config
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.models.base import Classifier
from convoy.tracking.store import open_store
from pipeline import dvc_state
from pipeline.check_settings import check_settings
from pipeline.leaderboard import print_summary
from pipeline.register import register
from pipeline.report import report
from pipeline.run import check_repository
from pipeline.stage import RANKS, Stage
from pipeline.train import train
from small_project import ROOT, SMALL, copy_without_mlflow, make_project, run_stages


@pytest.fixture(autouse=True)
def embedded_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)


@pytest.fixture(scope="module")
def finished_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose stages have all run once."""
    root = make_project(tmp_path_factory.mktemp("road") / "a project")  # a path may hold a space
    run_stages(root, with_report=True)
    return root


def list_runs(root: Path) -> pd.DataFrame:
    with open_store(root, "convoy") as store:
        return mlflow.search_runs([store.experiment.experiment_id]).set_index("tags.mlflow.runName").sort_index()


def find_champion(root: Path) -> str:
    with open_store(root, "convoy") as store:
        return str(store.client.get_model_version_by_alias("convoy", "champion").version)


def test_leaderboard_lists_models_by_validation_accuracy(finished_project: Path) -> None:
    table = pd.read_csv(finished_project / "artifacts/register/leaderboard.csv")
    assert set(table["model"]) == {"lenet", "resnet"}
    assert table["val_accuracy"].is_monotonic_decreasing
    assert {"test_accuracy", "test_balanced_accuracy", "test_macro_f1", "test_log_loss"} <= set(table.columns)


def test_each_run_has_its_curves_settings_and_metrics(finished_project: Path) -> None:
    table = list_runs(finished_project)
    assert list(table.index) == ["lenet", "resnet"]
    assert set(table["status"]) == {"FINISHED"}
    for name in table.index:
        record = json.loads((finished_project / f"artifacts/train/{name}/record.json").read_text())
        history = pd.read_csv(finished_project / f"artifacts/train/{name}/history.csv")
        run = table.loc[name]
        assert run["metrics.kept/val_accuracy"] == pytest.approx(record["best"]["val_accuracy"], abs=1e-6)
        assert run["params.recipe.lr"] == str(record["settings"]["recipe"]["lr"])
        with open_store(finished_project, "convoy") as store:
            curve = store.client.get_metric_history(run["run_id"], "epoch/val_loss")
            files = {file.path for file in store.client.list_artifacts(run["run_id"])}
        assert [point.step for point in curve] == list(history["epoch"])
        assert [point.value for point in curve] == pytest.approx(list(history["val_loss"]), abs=1e-6)
        assert {"confusion.png", "data_card.html", "per_class.csv", "record.json", "report.html"} <= files


def test_all_runs_have_the_same_metrics_and_parameters(finished_project: Path) -> None:
    table = list_runs(finished_project).filter(regex=r"^(metrics|params)\.")
    # only the best network in validation is timed with a batch
    timed = table.filter(regex=r"^metrics\.latency/batch").notna()
    assert timed.sum().unique().tolist() == [1]
    # a network's own settings, such as its widths, are parameters of its runs alone
    own = table.filter(regex=r"^params\.model\.").columns
    assert table.drop(columns=[*timed.columns, *own]).notna().all().all()


def test_report_shows_the_metrics_and_asks_for_nothing(finished_project: Path) -> None:
    page = (finished_project / "artifacts/report/index.html").read_text()
    shown = dict(re.findall(r'data-metric="([^"]+)">([\d.]+)<', page))
    for name in ("lenet", "resnet"):
        metrics = json.loads((finished_project / f"artifacts/evaluate/{name}/metrics.json").read_text())
        for metric in ("accuracy", "macro_f1", "log_loss"):
            assert shown[f"{name}/{metric}"] == f"{metrics[f'test_{metric}']:.4f}"
    assert "could not be drawn" not in page
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"|url\((?!#)', page) == []
    figures = re.findall(r'role="img" aria-label="([^"]*)"|<img src="[^"]*" alt="([^"]*)"', page)
    assert len(figures) > 8
    assert all(any(texts) for texts in figures), "each has alternative text"


def test_drawing_the_report_again_gives_the_same_bytes(finished_project: Path) -> None:
    manifest = finished_project / "artifacts/report/manifest.json"
    before = manifest.read_bytes()
    Stage(finished_project, "report").run(report)
    assert manifest.read_bytes() == before


def test_champion_predicts_images_as_the_evaluation_did(finished_project: Path) -> None:
    best = pd.read_csv(finished_project / "artifacts/register/leaderboard.csv")["model"][0]
    recorded = pd.read_parquet(finished_project / f"artifacts/evaluate/{best}/predictions.parquet")
    prepared = pd.read_parquet(finished_project / "artifacts/preprocess/images.parquet").query("split == 'test'")
    pictures = [np.asarray(Image.open(finished_project / path)) for path in prepared["path"]]
    with open_store(finished_project, "convoy"):
        model = mlflow.pyfunc.load_model("models:/convoy@champion")
    answer = model.predict(pictures)
    assert list(answer["label"]) == list(recorded["predicted"])
    expected = recorded.filter(regex="^probability_").to_numpy()
    answered = np.array([list(row.values()) for row in answer["probabilities"]])
    np.testing.assert_allclose(answered, expected, atol=1e-5)


def test_registering_the_same_results_again_changes_nothing(finished_project: Path) -> None:
    before, version, database = (
        list_runs(finished_project),
        find_champion(finished_project),
        (finished_project / "mlflow.db").read_bytes(),
    )
    outputs = {file: file.read_bytes() for file in (finished_project / "artifacts/register").iterdir()}
    Stage(finished_project, "register").run(register)
    pd.testing.assert_frame_equal(list_runs(finished_project), before)
    assert find_champion(finished_project) == version
    assert {file: file.read_bytes() for file in (finished_project / "artifacts/register").iterdir()} == outputs
    assert (finished_project / "mlflow.db").read_bytes() == database


def test_run_left_by_a_killed_register_is_completed(finished_project: Path) -> None:
    lenet = list_runs(finished_project).loc["lenet", "run_id"]
    with open_store(finished_project, "convoy") as store:
        store.client.update_run(lenet, status="RUNNING")
    Stage(finished_project, "register").run(register)
    after = list_runs(finished_project)
    assert list(after.index) == ["lenet", "resnet"]
    assert set(after["status"]) == {"FINISHED"}
    assert after.loc["lenet", "run_id"] == lenet


def test_experiment_leaves_the_champion_as_it_is(
    finished_project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def aliases() -> dict[str, str]:
        with open_store(finished_project, "convoy") as store:
            return store.client.get_registered_model("convoy").aliases

    before = aliases()
    monkeypatch.setenv("DVC_EXP_NAME", "bold-idea")
    with open_store(finished_project, "convoy") as store:
        store.client.delete_registered_model_alias("convoy", "champion")
    Stage(finished_project, "register").run(register)
    assert "bold-idea" in capsys.readouterr().out
    assert "champion" not in aliases()
    with open_store(finished_project, "convoy") as store:
        store.client.set_registered_model_alias("convoy", "champion", str(before["champion"]))


def test_experiment_in_a_temporary_copy_logs_to_the_project(
    finished_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    for name in ("artifacts", "dvc.yaml", "params.yaml"):
        (shutil.copytree if (finished_project / name).is_dir() else shutil.copy)(finished_project / name, copy / name)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "project"))
    monkeypatch.setenv("DVC_EXP_NAME", "elsewhere")
    Stage(copy, "register").run(register)
    assert not (copy / "mlflow.db").exists()
    assert list(list_runs(tmp_path / "project").index) == ["lenet", "resnet"]


def test_summary_shows_the_leaderboard_and_the_next_commands(
    finished_project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_summary(finished_project)
    said = capsys.readouterr().out
    assert "lenet" in said
    assert "resnet" in said
    assert "convoy ui" in said
    assert "/#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=TABLE&viewStateShareKey=" in said


def test_without_results_there_is_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match=r"^there are no results yet: run `convoy run`$"):
        print_summary(make_project(tmp_path))


def test_training_is_bit_identical_in_another_folder(finished_project: Path, tmp_path: Path) -> None:
    again = make_project(tmp_path / "another" / "place")
    run_stages(again, until="evaluate")
    for mark in sorted(again.glob("artifacts/**/manifest.json")):
        assert mark.read_bytes() == (finished_project / mark.relative_to(again)).read_bytes(), mark


def test_each_run_names_the_data_that_its_model_saw(finished_project: Path) -> None:
    profile = json.loads((finished_project / "artifacts/preprocess/data.json").read_text())["profile"]
    assert profile["train"] + profile["val"] + profile["test"] == profile["images"] == 90
    names = list(list_runs(finished_project)["run_id"])
    with open_store(finished_project, "convoy") as store:
        for run in names:
            (found,) = store.client.get_run(run).inputs.dataset_inputs
            assert found.dataset.name == "digits"
            assert json.loads(found.dataset.source) == {"uri": "data.dvc"}
            assert json.loads(found.dataset.profile) == profile


# Data that grow


@pytest.mark.slow
def test_new_class_is_appended_and_a_removed_one_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_project(tmp_path / "project", [*SMALL, "model=[lenet]", "train.max_epochs=1"])
    run_stages(root, until="preprocess")
    first = (root / "artifacts/preprocess/task.json").read_text()
    assert "changed:" not in capsys.readouterr().out
    (root / "data/lying").rename(root / "data/drooping")
    run_stages(root)

    said = capsys.readouterr().out
    assert "changed: new classes: 'drooping'" in said
    assert "changed: classes without images now: 'lying'; they keep their labels" in said
    assert "note: class 'lying' has no image: it stays in the class list, but no network can learn it" in said
    assert "new classes: 'drooping'" in (root / "artifacts/fetch/card.md").read_text().replace("&#39;", "'")
    before = json.loads(first)["classes"]
    assert json.loads((root / "artifacts/preprocess/task.json").read_text())["classes"] == [*before, "drooping"]
    assert find_champion(root) == "1"  # and all the stages can live with a class without images


def test_same_data_gives_the_same_card(tmp_path: Path) -> None:
    root = make_project(tmp_path / "project")
    run_stages(root, until="fetch")
    Image.new("L", (12, 12), 7).save(root / "data/lying/new.png")
    run_stages(root, until="fetch")
    card, lock = (root / "artifacts/fetch/card.md").read_bytes(), (root / "data.lock").read_bytes()
    run_stages(root, until="fetch")
    assert (root / "artifacts/fetch/card.md").read_bytes() == card
    assert (root / "data.lock").read_bytes() == lock


def test_test_images_that_are_given_for_training_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_project(tmp_path / "project")
    for number, file in enumerate(sorted((root / "data").rglob("*.png"))):
        given = root / "data" / ("train", "test")[number % 2] / file.parent.name / file.name
        given.parent.mkdir(parents=True, exist_ok=True)
        file.rename(given)
    run_stages(root, until="preprocess")
    assert "test images of the last run" not in capsys.readouterr().out
    (file,) = list((root / "data/test").rglob("*.png"))[:1]
    file.rename(root / "data/train" / file.relative_to(root / "data/test"))
    run_stages(root, until="preprocess")
    assert "note: 1 test images of the last run are now used for training" in capsys.readouterr().out


def test_images_that_reached_no_output_are_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_project(tmp_path / "project")
    run_stages(root, until="fetch")
    lock = (root / "data.lock").read_bytes()
    (root / "data/mistaken").mkdir()
    Image.new("L", (12, 12), 7).save(root / "data/mistaken/1.png")

    def fail(stage: Stage) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Stage, "_publish", fail)
        run_stages(root, until="fetch")
    assert (root / "data.lock").read_bytes() == lock
    run_stages(root, until="fetch")
    assert b"mistaken" in (root / "data.lock").read_bytes()


def test_excluded_images_are_reported_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_project(tmp_path / "project")
    (root / "data/lying/torn.png").write_bytes((root / "data/lying/00.png").read_bytes()[:60])
    (root / "data/lying/again.png").write_bytes((root / "data/lying/00.png").read_bytes())
    run_stages(root, until="fetch")
    said = capsys.readouterr().out
    assert "left out: data/lying/torn.png can't be decoded: " in said
    assert (
        "digits: 90 images of 3 classes (leaning, lying, standing), 1 left out, 1 exact copies merged; see art" in said
    )
    assert pd.read_csv(root / "artifacts/fetch/quarantine.csv")["path"].tolist() == ["data/lying/torn.png"]


def test_many_invalid_images_are_listed_completely_in_a_file(tmp_path: Path) -> None:
    root = make_project(tmp_path / "project")
    for number in range(60):
        (root / f"data/lying/torn{number:02}.png").write_bytes(b"torn")
    with pytest.raises(ConvoyError) as refusal:
        run_stages(root, until="fetch")
    first, *named, more, last = str(refusal.value).splitlines()
    assert first.startswith("60 of 150 images can't be used, more than fetch.max_invalid_fraction=0.05 allows")
    assert [line.split()[0] for line in named] == [f"data/lying/torn{number:02}.png" for number in range(50)]
    assert (more, last) == ("  10 more", "The complete list is artifacts/rejected.csv")
    assert len(pd.read_csv(root / "artifacts/rejected.csv")) == 60
    for file in (root / "data/lying").glob("torn*"):
        file.unlink()
    run_stages(root, until="fetch")
    assert not (root / "artifacts/rejected.csv").exists()


def test_source_archive_without_git_says_which_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match=r"is not a git repository, which DVC needs\. Run `git init"):
        check_repository(tmp_path)


@pytest.mark.parametrize("place", [".git/HEAD", ".git", "../.git/HEAD"], ids=["clone", "worktree", "subfolder"])
def test_git_repository_is_found_in_each_of_its_forms(place: str, tmp_path: Path) -> None:
    root = tmp_path / "project"
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).touch()
    check_repository(root)


def test_project_without_git_may_set_no_scm(tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = True\n")
    check_repository(tmp_path)


def test_data_dvc_that_holds_no_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.dvc").write_text("")
    with pytest.raises(ConvoyError, match=r"data\.dvc is not a YAML mapping: restore it by `git checkout data\.dvc`"):
        dvc_state.read_yaml(tmp_path / "data.dvc")


def test_unreachable_mlflow_server_is_one_clear_line(finished_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://someone:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConvoyError, match=r"MLflow at http://127.0.0.1:9 fails: .*MLFLOW_TRACKING_URI") as raised:
        Stage(finished_project, "register").run(register)
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+train.max_epoch=3", "train.max_epoch: unknown key; did you mean max_epochs?"),
        ("train.max_epochs=0", "train.max_epochs=0: input should be greater than or equal to 1"),
        ("train.max_epochs=soon", "train.max_epochs='soon': input should be a valid integer"),
        ("trainer.accelerator=cuda", "trainer.accelerator='cuda': input should be 'auto', 'cpu' or 'gpu'"),
        ("preprocess.size=16", "preprocess.size=16: input should be greater than or equal to 32"),
        ("preprocess.test_fraction=1.5", "preprocess.test_fraction=1.5: input should be less than 1"),
        ("split.seed=-1", "split.seed=-1: input should be greater than or equal to 0"),
        (f"train.seed={2**63}", f"train.seed={2**63}: input should be less than {2**63}"),
        ("trainer.devices=0", "trainer.devices=0: input should be greater than or equal to 1, or 'all'"),
        ("model.lenet.recipe.momentum=1.0", "model.lenet.recipe.momentum=1.0: input should be less than 1"),
        ("model.resnet.recipe.lr=-0.1", "model.resnet.recipe.lr=-0.1: input should be greater than 0"),
        ("+model.lenet.recipe.momentun=0.9", "model.lenet.recipe.momentun: unknown key; did you mean momentum?"),
        ("~model.lenet.recipe.lr", "model.lenet.recipe.lr: missing; set it in conf/"),
        ("+model.lenett.c1=6", "model.lenett: no such architecture; did you mean lenet?"),
        ("+tarin.max_epochs=3", "conf/: tarin: unknown section; did you mean train?"),
        ("register.gate.min_accuracy=.nan", "register.gate.min_accuracy="),
        ("register.name=a/b", "register.name='a/b': value error, it names folders"),
        ("model.lenet.init=champoin", "model.lenet.init='champoin'"),
        ("register.name=''", "register.name='': value error, it names folders"),
    ],
)
def test_wrong_setting_is_refused_before_anything_runs(
    finished_project: Path, tmp_path: Path, override: str, said: str
) -> None:
    root = make_project(tmp_path / "project", [*SMALL, override])
    with pytest.raises(ConvoyError) as raised:
        check_settings(config.load(root / "params.yaml"))
    assert said in str(raised.value)


def test_several_machines_are_not_started_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    root = make_project(tmp_path / "project", [*SMALL, "trainer.num_nodes=2"])
    run_stages(root, until="preprocess")
    with pytest.raises(ConvoyError, match=r"trainer\.num_nodes=2: start it on each machine by torchrun"):
        Stage(root, "train", "lenet").run(train)


def test_failed_training_is_marked_and_the_others_continue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_project(tmp_path / "project", [*SMALL, "model.resnet.recipe.lr=1e30"])
    run_stages(root)
    shown = capsys.readouterr()
    assert "resnet failed in epoch 1, step " in shown.err
    assert "Lower model.resnet.recipe.lr" in shown.err
    assert "lenet is now the champion" in shown.out

    with open_store(root, "convoy") as store:
        runs = {run.info.run_name: run for run in store.client.search_runs([store.experiment.experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == {"lenet": "FINISHED", "resnet": "FAILED"}
    assert ": failed in epoch 1 of 3" in runs["resnet"].data.tags["mlflow.note.content"]
    table = pd.read_csv(root / "artifacts/register/leaderboard.csv")
    assert table["model"].tolist() == ["lenet", "resnet"]
    assert table["test_accuracy"].isna().tolist() == [False, True]

    print_summary(root)
    shown = capsys.readouterr().out
    assert "failed" in shown
    best, epoch = table.loc[0, ["val_accuracy", "epoch"]]
    assert re.search(rf"^lenet +{best:.4f} +\d\.\d{{4}} +{epoch:.0f} ", shown, re.MULTILINE)
    Stage(root, "register").run(register)  # the failed run is not brought twice
    with open_store(root, "convoy") as store:
        assert len(store.client.search_runs([store.experiment.experiment_id])) == 2


def test_weights_have_the_permissions_of_the_record(finished_project: Path) -> None:
    trained = finished_project / "artifacts/train/lenet"
    assert (trained / "weights.safetensors").stat().st_mode == (trained / "record.json").stat().st_mode


def test_full_disk_is_reported_with_the_message_of_the_system(finished_project: Path, tmp_path: Path) -> None:
    root = shutil.copytree(finished_project, tmp_path / "project")

    def train_on_a_full_disk(stage: Stage) -> None:
        (stage.scratch / "weights.safetensors").symlink_to("/dev/full")
        train(stage)

    with pytest.raises(OSError, match="No space left on device"):
        Stage(root, "train", "lenet").run(train_on_a_full_disk)


def test_training_starts_from_the_champion_or_a_run(
    finished_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    winner = pd.read_csv(finished_project / "artifacts/register/leaderboard.csv")["model"][0]
    run = list_runs(finished_project).loc[winner, "run_id"]
    for init in ("champion", run):
        root = tmp_path / init
        shutil.copytree(finished_project / "artifacts/preprocess", root / "artifacts/preprocess")
        shutil.copytree(finished_project / "conf", root / "conf")
        shutil.copy(finished_project / "dvc.yaml", root)
        config.compose(root, [*SMALL, f"model.{winner}.init={init}", "train.max_epochs=1"])
        monkeypatch.setenv("DVC_ROOT", str(finished_project))
        Stage(root, "train", winner).run(train)
        record = json.loads((root / f"artifacts/train/{winner}/record.json").read_text())
        assert record["initial_weights"]["init"] == init
        assert record["initial_weights"]["head"] == "kept"
        assert record["initial_weights"]["sha256"] == sha256(
            finished_project / f"artifacts/train/{winner}/weights.safetensors"
        )


def test_nothing_is_registered_if_every_training_fails(tmp_path: Path) -> None:
    root = make_project(tmp_path / "project", ["model=[lenet]", "model.lenet.recipe.lr=1e30", "trainer.threads=1"])
    with pytest.raises(ConvoyError, match="the training of lenet failed: there is nothing to register"):
        run_stages(root)


def test_unknown_architecture_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match=r"^conf/model/lenett.yaml: there is no such file; did you mean lenet\?$"):
        make_project(tmp_path / "project", ["model=[lenett,resnet]"])


def test_refused_settings_leave_params_yaml_unchanged(finished_project: Path) -> None:
    before = (finished_project / "params.yaml").read_bytes()
    with pytest.raises(ConvoyError, match=r"train\.max_epochs=0"):
        config.compose(finished_project, ["train.max_epochs=0"], check=check_settings)
    assert (finished_project / "params.yaml").read_bytes() == before


def test_committed_settings_pass_the_check() -> None:
    check_settings(config.load(ROOT / "params.yaml"))


def test_epochs_are_compared_by_the_validation_images(finished_project: Path) -> None:
    for name in ("lenet", "resnet"):
        best = json.loads((finished_project / f"artifacts/train/{name}/record.json").read_text())["best"]
        judged = json.loads((finished_project / f"artifacts/evaluate/{name}/calibration.json").read_text())
        assert best["val_loss"] == pytest.approx(judged["val_log_loss_uncalibrated"], rel=1e-3)


def test_other_classes_under_a_known_dataset_name_are_refused(tmp_path: Path) -> None:
    root = make_project(tmp_path / "project")
    name = config.load(root / "params.yaml")["dataset"]["name"]
    (root / "data.lock").write_text(f"{name}:\n  classes: [cat, dog]\n  versions: []\n")
    with pytest.raises(ConvoyError, match=r"none of those that data\.lock records for"):
        run_stages(root, until="fetch")


def test_checkpoint_of_other_settings_is_not_resumed(
    finished_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_without_mlflow(finished_project, tmp_path / "project")
    files: list[Path] = []

    def note(*given: object) -> None:
        files.extend(each for each in given if isinstance(each, Path))
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.train.fit", note)
    for overrides in (SMALL, SMALL, (*SMALL, "train.seed=2")):
        config.compose(root, overrides)
        with pytest.raises(KeyboardInterrupt):
            Stage(root, "train", "lenet").run(train)
    assert files[0] == files[1] != files[2]


def test_seed_determines_the_initial_weights(
    finished_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_without_mlflow(finished_project, tmp_path / "project")
    begun: list[Tensor] = []

    def note(classifier: Classifier, *_: object) -> None:
        begun.append(torch.cat([parameter.detach().flatten() for parameter in classifier.parameters()]))
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.train.fit", note)
    for overrides in (SMALL, SMALL, (*SMALL, "train.seed=2")):
        config.compose(root, overrides)
        with pytest.raises(KeyboardInterrupt):
            Stage(root, "train", "lenet").run(train)
    assert torch.equal(begun[0], begun[1])
    assert not torch.equal(begun[0], begun[2])
