"""Promotion over several scheduled runs, through the real stages and a real registry."""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from convoy.core import config
from convoy.core.artifact_names import MANIFEST
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.inference import onnx_export
from convoy.promotion import champion
from convoy.promotion.champion import CHALLENGER, CHAMPION, PREVIOUS
from convoy.promotion.config import GateConfig
from convoy.promotion.evidence import ModelEvidence
from convoy.promotion.gate import Verdict
from convoy.registry import model_loader, verification, versions
from convoy.tracking import runs
from convoy.tracking.store import open_store
from pipeline import check_champion, promote, rollback, sync_mlflow
from pipeline.preprocess import preprocess
from pipeline.register import register
from pipeline.registration import export_onnx
from pipeline.run import run as run_pipeline
from pipeline.stage import Stage
from promotion_fixtures import REGISTRY_WRITES, SimulatedKill, limit_writes
from retraining_scenarios import (
    BASE,
    TRAINING_OVERRIDES,
    make_retraining_project,
    predict_in_this_process,
    restore_training,
)
from small_project import ROOT, copy_without_mlflow

Retrain = Callable[..., str]


@pytest.fixture(scope="module")
def retraining_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with three trainings of LeNet, poor, good, and one like it, and nothing registered yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        root = make_retraining_project(tmp_path_factory.mktemp("nights") / "project")
        with open_store(root, "convoy"):
            pass
    return root


@pytest.fixture
def root(retraining_project: Path, tmp_path: Path, embedded_store: None) -> Path:
    # MLflow writes absolute paths, so the database is made where it will be
    return copy_without_mlflow(retraining_project, tmp_path / "project")


@pytest.fixture(autouse=True)
def fast_predictions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model answers here and not in a fresh process, and has no ONNX file, but where a story needs them."""

    if request.function is not test_first_run_then_better_worse_and_tied_challengers:
        monkeypatch.setattr(verification, "_predict_in_subprocess", predict_in_this_process)
        if "onnx" not in request.function.__name__:  # some seconds
            monkeypatch.setattr("pipeline.registration.export_onnx", lambda *_: {})


@pytest.fixture
def retrain(root: Path, capsys: pytest.CaptureFixture[str]) -> Retrain:
    """Lets a night end in a training ("poor", "good", "similar") and register; returns what was said."""

    def play(training: str, *overrides: str) -> str:
        restore_training(root, training, *overrides)
        capsys.readouterr()
        Stage(root, "register").run(register)
        return capsys.readouterr().out

    return play


def read_aliases(root: Path) -> dict[str, int]:
    with open_store(root, "convoy") as store:
        found = store.client.get_registered_model("convoy").aliases
    return {name: int(version) for name, version in found.items()}


def test_first_run_then_better_worse_and_tied_challengers(root: Path, retrain: Retrain) -> None:
    assert "lenet is now the champion: models:/convoy@champion, version 1" in retrain("poor")
    assert read_aliases(root) == {CHALLENGER: 1, CHAMPION: 1}

    said = retrain("good")
    assert "PROMOTE: lenet is better than the champion lenet (version 1): " in said
    assert "lenet is now the champion: models:/convoy@champion, version 2" in said
    assert read_aliases(root) == {CHALLENGER: 2, CHAMPION: 2, PREVIOUS: 1}

    said = retrain("poor")
    assert "REJECT" in said
    assert "version 2 stays the champion" in said
    assert read_aliases(root) == {CHAMPION: 2, PREVIOUS: 1}

    said = retrain("similar")
    assert "HOLD" in said
    assert "version 2 stays the champion" in said
    assert read_aliases(root) == {CHALLENGER: 3, CHAMPION: 2, PREVIOUS: 1}
    verdict = (root / "artifacts/verdict.md").read_text()
    assert verdict.startswith("# HOLD: lenet, version 3, beside the champion, version 2")
    for check in ("better", "test images", "log loss", "detectable gain", "latency"):
        assert f"| {check}" in verdict

    assert "stays the champion" in retrain("good")  # the champion's own results, again
    with open_store(root, "convoy") as store:
        table = champion.audit_log(store, "convoy")
        assert table["after"].tolist() == [1, 2]
        assert len(store.client.search_model_versions("name = 'convoy'")) == 3
    assert read_audit_log(root, version=2)["after"].tolist() == [1, 2]


def set_lineage(root: Path, training: str, *lineage: str) -> None:
    """As if a training had begun with weights that were trained on these data."""
    folder = root / "kept" / training / "train" / "lenet"
    record = json.loads((folder / "record.json").read_text())
    record["initial_weights"] = {
        "init": "0" * 32,
        "source": "a run",
        "sha256": "0" * 64,
        "head": "kept",
        "lineage": lineage,
    }
    (folder / "record.json").write_text(json.dumps(record))
    hashes = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(hashes | {"record.json": sha256(folder / "record.json")}))


def test_weights_that_came_from_unknown_data_are_held_back(root: Path, retrain: Retrain) -> None:
    retrain("poor")
    set_lineage(root, "good", "another data")
    said = retrain("good")
    assert "HOLD" in said
    assert "the training images of lenet are unknown" in said
    assert read_aliases(root)[CHAMPION] == 1


@pytest.mark.slow
def test_images_of_a_source_training_count_as_seen(root: Path, retrain: Retrain) -> None:
    retrain("poor")
    with open_store(root, "convoy") as store:
        version = store.client.get_model_version("convoy", "1")
        store.client.set_tag(version.run_id, "data", "pictures@before")
    set_lineage(root, "good", "before")
    assert "PROMOTE" in retrain("good")


def read_audit_log(root: Path, version: int) -> pd.DataFrame:
    """The audit trail among the files of the run of a version."""
    with open_store(root, "convoy") as store:
        run = store.client.get_model_version("convoy", str(version)).run_id
        return pd.read_csv(store.client.download_artifacts(run, champion.AUDIT_LOG_FILE))


def test_onnx_file_is_exported_once_and_predicts_as_evaluated(
    root: Path, retrain: Retrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "lenet: model.onnx predicts " in retrain("good")
    monkeypatch.setattr(onnx_export, "export", lambda *_: pytest.fail("exported again"))
    assert "onnx" not in retrain("good")
    with open_store(root, "convoy") as store:
        model_loader.fetch(
            model_loader.find(store, "models:/convoy@champion"), tmp_path, ["artifacts/model.onnx"]
        )  # and its hash
    pixels = np.load(root / "artifacts/preprocess/test_pixels.npy")
    table = pd.read_parquet(root / "artifacts/evaluate/lenet/predictions.parquet")
    expected = table[[f"probability_{name}" for name in ("leaning", "lying", "standing")]].to_numpy()
    assert onnx_export.max_difference(tmp_path / "artifacts/model.onnx", pixels, expected) < 1e-5


def test_model_that_fails_to_export_is_registered_without_onnx(
    root: Path, retrain: Retrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("No ONNX function found\nand much more")

    monkeypatch.setattr("torch.onnx.export", refuse)
    lines = retrain("good").splitlines()
    reason = "torch can't export it (No ONNX function found and much more)"
    assert f"lenet is registered without model.onnx: {reason}" in lines
    assert "lenet is now the champion: models:/convoy@champion, version 1" in lines
    with open_store(root, "convoy") as store:
        hashes = json.loads(model_loader.find(store, "models:/convoy@champion").tags[runs.CHECKSUMS_TAG])
    assert "artifacts/weights.safetensors" in hashes
    assert "artifacts/model.onnx" not in hashes


@pytest.mark.parametrize(("difference", "kept"), [(9e-5, True), (2e-4, False), (np.inf, False), (np.nan, False)])
def test_onnx_file_with_other_predictions_is_not_kept(
    difference: float,
    kept: bool,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = sync_mlflow.find_result(Stage(restore_training(root, "good"), "register"), "lenet")
    names = {"record": result.trained, "weights": result.trained, "calibration": result.evaluated}
    files = {name: next(folder.glob(f"{name}.*")) for name, folder in names.items()}
    monkeypatch.setattr(onnx_export, "export", lambda *_: None)
    monkeypatch.setattr(onnx_export, "max_difference", lambda *_: difference)
    found = export_onnx("lenet", files, result, root / "artifacts/preprocess", tmp_path)
    assert (list(found) == ["onnx"]) == kept
    refusal = f"lenet is registered without model.onnx: its probabilities differ by up to {difference:.2g}, more than"
    assert (refusal in capsys.readouterr().out) != kept


def test_version_with_a_deviating_onnx_file_is_not_promoted(
    root: Path, retrain: Retrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    differences = iter([0.0, 2e-4])  # as it is registered, and before the champion is moved
    monkeypatch.setattr(onnx_export, "max_difference", lambda *_: next(differences))
    with pytest.raises(ConvoyError, match=r"models:/convoy/1 by model\.onnx does not answer as it was evaluated"):
        retrain("good")
    assert read_aliases(root) == {}


def test_same_results_are_evaluated_once(root: Path, retrain: Retrain, monkeypatch: pytest.MonkeyPatch) -> None:
    retrain("good")
    first = retrain("similar")
    monkeypatch.setattr(promote, "run_gate", lambda *_: pytest.fail("judged again"))
    assert "HOLD" in retrain("similar")
    assert first.splitlines()[-2:] == retrain("similar").splitlines()[-2:]


@pytest.mark.slow
def test_reported_verdict_is_that_of_the_last_run(root: Path, retrain: Retrain) -> None:
    retrain("good")
    retrain("similar")
    retrain("poor")
    retrain("similar")  # which was judged already
    assert (root / "artifacts/verdict.md").read_text().startswith("# HOLD: lenet, version 2, beside the champion")


@pytest.mark.slow
def test_changed_code_makes_the_champion_predict_again(
    root: Path, retrain: Retrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrain("good")
    retrain("similar")
    asked = []
    real = promote.run_gate
    monkeypatch.setattr(promote, "run_gate", lambda *given: (asked.append(given), real(*given))[1])
    retrain("similar")
    assert not asked
    monkeypatch.setattr(promote, "sha256", lambda file: file.name == "comparison.py" or sha256(file))
    retrain("similar")
    assert len(asked) == 1


@pytest.mark.slow
def test_best_champion_ever_counts_despite_later_verdicts(root: Path, retrain: Retrain) -> None:
    retrain("poor")
    retrain("good")
    retrain("poor")  # rejected now, as it has come again
    retrain("similar", "register.gate.mode=non_inferior", "register.gate.margin=0.2")
    verdict = (root / "artifacts/verdict.md").read_text()
    assert "than the best champion so far, lenet (version 2)" in verdict
    with open_store(root, "convoy") as store:
        champions = {event.after for event in champion.promotion_events(store, "convoy")}
        assert {1, 2} <= champions
        assert versions.best_ever(store, "convoy", {1}, "accuracy") == 1


def test_too_few_test_images_hold_even_the_first_run(root: Path, retrain: Retrain) -> None:
    said = retrain("good", "register.gate.min_test_images=500")
    assert "HOLD" in said
    assert "there is no champion yet" in said
    assert read_aliases(root) == {CHALLENGER: 1}


def test_below_the_floor_there_is_no_first_champion(root: Path, retrain: Retrain) -> None:
    for _ in range(2):  # the second time by the verdict that is known
        assert "REJECT" in retrain("poor", "register.gate.min_accuracy=0.95")
        assert read_aliases(root) == {}


def test_better_on_average_with_one_class_ruined_is_rejected(
    root: Path, retrain: Retrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrain("poor")
    real = promote.predict_test_images

    def doctored(*arguments: Any) -> pd.DataFrame:
        """The champion gets all of one class right that the challenger misses, and little else."""
        table = real(*arguments)
        classes = [column for column in table.columns if column.startswith("probability_")]
        for row in table.index:
            sure = table.loc[row, "actual"] == "leaning" or row % 4 == 0
            named = table.loc[row, "actual"] if sure else next(
                name.removeprefix("probability_") for name in classes
                if name.removeprefix("probability_") != table.loc[row, "actual"]
            )  # fmt: skip
            table.loc[row, classes] = 0.1
            table.loc[row, f"probability_{named}"] = 1 - 0.1 * (len(classes) - 1)
            table.loc[row, "predicted"] = named
        return table

    monkeypatch.setattr(promote, "predict_test_images", doctored)
    evaluated = root / "kept/good/evaluate/lenet/predictions.parquet"
    table = pd.read_parquet(evaluated)
    ruined = table["actual"] == "leaning"
    columns = [f"probability_{name}" for name in ("leaning", "lying", "standing")]
    table.loc[ruined, columns] = np.array([0.1, 0.8, 0.1])
    table.loc[ruined, "predicted"] = "lying"
    monkeypatch.setattr(pd, "read_parquet", _replace_table(pd.read_parquet, "predictions.parquet", table))
    said = retrain("good")
    assert "REJECT" in said
    assert "leaning" in said
    assert read_aliases(root)[CHAMPION] == 1


def _replace_table(read: Callable[..., pd.DataFrame], name: str, table: pd.DataFrame) -> Callable[..., pd.DataFrame]:
    return lambda file, **options: table.copy() if Path(file).name == name else read(file, **options)


def test_deleted_champion_is_an_error_and_not_a_first_run(root: Path, retrain: Retrain) -> None:
    retrain("poor")
    with open_store(root, "convoy") as store:
        store.client.delete_model_version("convoy", "1")
    with pytest.raises(ConvoyError, match="had a champion and has none now"):
        retrain("good")
    assert CHAMPION not in read_aliases(root)


def test_tampered_champion_is_an_error(root: Path, retrain: Retrain) -> None:
    retrain("poor")
    (weights,) = (root / "mlartifacts").glob("**/models/*/artifacts/artifacts/weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ConvoyError, match=r"weights\.safetensors of the model was changed since it was registered"):
        retrain("good")
    assert read_aliases(root)[CHAMPION] == 1


@pytest.mark.slow
def test_alias_moved_by_hand_meanwhile_is_left_where_it_is(
    root: Path, retrain: Retrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrain("poor")
    retrain("similar")
    with open_store(root, "convoy") as store:
        store.client.set_registered_model_alias("convoy", CHAMPION, "1")
    monkeypatch.setattr(promote, "run_gate", _move_during(promote.run_gate, root, to="2"))
    with pytest.raises(ConvoyError, match="was version 1 when it was compared, and is version 2 now"):
        retrain("good")
    assert read_aliases(root)[CHAMPION] == 2


def _move_during(judge: Callable[..., Any], root: Path, to: str) -> Callable[..., Any]:
    def judged(*arguments: Any) -> Any:
        verdict = judge(*arguments)
        with open_store(root, "convoy") as store:
            store.client.set_registered_model_alias("convoy", CHAMPION, to)
        return verdict

    return judged


def test_rolled_back_model_is_not_promoted_again(
    root: Path, retrain: Retrain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    retrain("poor")
    retrain("good")
    monkeypatch.chdir(root)
    rollback.roll_back(root, "it fails at night")
    assert (
        "version 1 is the champion of convoy again, instead of version 2: it fails at night" in capsys.readouterr().out
    )
    assert read_aliases(root)[CHAMPION] == 1
    assert read_audit_log(root, version=1)["reason"].tolist()[-1] == "it fails at night"
    assert "HOLD: it was rolled back on " in retrain("good")
    assert "it fails at night" in (root / "artifacts/verdict.md").read_text()
    assert read_aliases(root) == {CHAMPION: 1}


def test_champion_trained_on_a_test_image_is_an_error(root: Path, retrain: Retrain) -> None:
    retrain("poor")
    table = root / "artifacts/preprocess/images.parquet"
    images = pd.read_parquet(table)
    one = images.index[images["split"] == "train"][0]
    other = images.index[images["split"] == "test"][0]
    images.loc[other, "sha256"] = images.loc[one, "sha256"]
    images.to_parquet(table, index=False)
    renew_manifest(table.parent)
    predictions = root / "kept/good/evaluate/lenet/predictions.parquet"
    answers = pd.read_parquet(predictions)
    answers.loc[0, "sha256"] = images.loc[one, "sha256"]
    answers.to_parquet(predictions, index=False)
    renew_manifest(predictions.parent)
    path = images.loc[other, "path"]
    with pytest.raises(ConvoyError, match=rf"was trained on 1 of the .* test images, such as {path}"):
        retrain("good")
    assert read_aliases(root) == {CHAMPION: 1}
    table = pd.read_csv(root / "artifacts/register/leaderboard.csv")
    record = json.loads((root / "artifacts/train/lenet/record.json").read_text())
    assert table["val_accuracy"].tolist() == pytest.approx([record["best"]["val_accuracy"]])  # of the refused night


@pytest.mark.slow
def test_champion_that_began_with_a_test_image_is_an_error(root: Path, retrain: Retrain) -> None:
    """It was trained on other data first, which some of today's test images were among."""
    retrain("poor")
    with open_store(root, "convoy") as store:
        version = store.client.get_model_version("convoy", "1")
        store.client.set_tag(version.run_id, "data", "pictures@before")
    set_lineage(root, "good", "before")
    retrain("good")
    assert read_aliases(root)[CHAMPION] == 2
    prepared = root / "artifacts/preprocess"
    with pytest.MonkeyPatch.context() as patch:
        tested = pd.read_parquet(prepared / "images.parquet").query("split == 'test'")["sha256"]
        real = model_loader.training_hashes
        more = {1: [tested.iloc[0]]}
        patch.setattr(model_loader, "training_hashes", lambda found: [*real(found), *more.get(int(found.version), [])])
        with pytest.raises(ConvoyError, match=r"\(version 2\) was trained on 1 of the"):
            retrain("similar")
        with open_store(root, "convoy") as store:
            found = check_champion.describe_champion(store, "convoy")
        assert found is not None
        with pytest.raises(ConvoyError, match=r"\(version 2\) was trained on 1 of the"):
            check_champion.check(prepared, found)


# What the gate would refuse is refused before training


def prepare_again(root: Path, *overrides: str) -> None:
    """As `dvc repro` does where a setting of the split has changed."""
    config.compose(root, [*BASE, *TRAINING_OVERRIDES["good"], *overrides])
    if not (root / "pipeline").exists():
        (root / "pipeline").symlink_to(ROOT / "pipeline")
    Stage(root, "preprocess").run(preprocess)


@pytest.mark.slow
def test_another_split_is_refused_before_training(root: Path, retrain: Retrain) -> None:
    retrain("good")
    before = {file: file.stat().st_mtime_ns for file in (root / "artifacts/preprocess").iterdir()}
    with pytest.raises(ConvoyError) as refusal:
        prepare_again(root, "preprocess.test_fraction=0.5")
    said = str(refusal.value)
    assert said.startswith("the champion lenet (version 1) was trained on ")
    assert re.search(r" of the \d+ test images, such as data/\w+/\d+\.png", said)
    assert "start without a champion under another register.name" in said
    assert {file: file.stat().st_mtime_ns for file in (root / "artifacts/preprocess").iterdir()} == before

    prepare_again(root, "preprocess.test_fraction=0.5", "register.name=afresh")
    assert len(pd.read_parquet(root / "artifacts/preprocess/images.parquet").query("split == 'test'")) > 100


@pytest.mark.slow
def test_after_a_refusal_the_new_leaderboard_is_shown(
    root: Path, retrain: Retrain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    retrain("good")
    with open_store(root, "convoy") as store:
        store.client.delete_model_version("convoy", "1")
    restore_training(root, "similar")
    monkeypatch.chdir(root)
    for command in (["init", "--no-scm", "--quiet"], ["add", "--quiet", "data"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], check=True)
    monkeypatch.setattr("pipeline.settings.compose", lambda root, *_, **__: config.load(root / "params.yaml"))
    ended = {"register": lambda: Stage(root, "register").run(register), "fetch": lambda: None}
    shown = {}
    for stage, run in ended.items():

        def run_dvc(*_: str, run: Callable[[], None] = run) -> int:
            with contextlib.suppress(ConvoyError):
                run()
            return 1

        monkeypatch.setattr("pipeline.dvc_process.run_dvc", run_dvc)
        assert run_pipeline(root) == 1
        shown[stage] = "Leaderboard" in capsys.readouterr().out
    assert shown == {"register": True, "fetch": False}  # that of another day is not taken for today's


@pytest.mark.slow
def test_experiment_may_split_otherwise(root: Path, retrain: Retrain, monkeypatch: pytest.MonkeyPatch) -> None:
    retrain("good")
    monkeypatch.setenv("DVC_EXP_NAME", "bold-idea")
    prepare_again(root, "preprocess.test_fraction=0.5")


@pytest.mark.slow
def test_server_that_is_down_does_not_stop_the_preparation(
    root: Path, retrain: Retrain, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    retrain("good")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    prepare_again(root, "preprocess.test_fraction=0.5")
    assert "can't be checked now" not in capsys.readouterr().out


def test_without_a_store_no_process_is_started(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("asked"))
    prepare_again(root, "preprocess.test_fraction=0.5")


@pytest.mark.parametrize("lost", ["version", "weights", "store"])
def test_lost_champion_is_reported_before_training(
    lost: str, root: Path, retrain: Retrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrain("good")
    if lost == "version":
        with open_store(root, "convoy") as store:
            store.client.delete_model_version("convoy", "1")
        said = "had a champion and has none now"
    elif lost == "weights":
        (weights,) = (root / "mlartifacts").glob("**/models/*/artifacts/artifacts/weights.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        said = r"weights\.safetensors of the model was changed since it was registered"
    else:
        root = copy_without_mlflow(root, tmp_path / "lost")
        said = "of which this MLflow knows nothing"
    with pytest.raises(ConvoyError, match=said):
        check_champion.find_champion(root, "convoy")
    assert (lost == "store") != (root / "mlflow.db").exists()


def test_images_of_other_classes_are_refused_before_training(root: Path, retrain: Retrain) -> None:
    retrain("good")
    old = check_champion.find_champion(root, "convoy")
    assert old is not None
    check_champion.check(root / "artifacts/preprocess", old)
    with pytest.raises(ConvoyError, match=r"no test image of a class that both .* know.*Give the new data set a name"):
        check_champion.check(root / "artifacts/preprocess", dataclasses.replace(old, classes=["rose", "tulip"]))


def test_test_images_that_all_resemble_known_ones_are_refused(root: Path, retrain: Retrain) -> None:
    retrain("good")
    old = check_champion.find_champion(root, "convoy")
    assert old is not None
    prepared = root / "artifacts/preprocess"
    tested = pd.read_parquet(prepared / "images.parquet").query("split == 'test'")["sha256"]
    pd.DataFrame({"test": tested, "other": "f" * 64}).to_parquet(prepared / "cross_split_duplicates.parquet")
    with pytest.raises(
        ConvoyError, match="every test image is a near-duplicate of an image that a model was trained on"
    ):
        check_champion.check(prepared, dataclasses.replace(old, training_hashes=["f" * 64]))


def renew_manifest(folder: Path) -> None:
    """As if the stage had written its files so."""
    hashes = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({file: sha256(folder / file) for file in hashes}))


@pytest.fixture
def writes_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A list with the number of writes to the registry after which the process dies."""
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore

    left = [10**9]

    for name in REGISTRY_WRITES:
        if name in vars(SqlAlchemyStore):
            monkeypatch.setattr(SqlAlchemyStore, name, limit_writes(vars(SqlAlchemyStore)[name], left))
    yield left


@pytest.mark.slow
def test_killed_register_is_completed_by_the_next_run(
    root: Path, retrain: Retrain, writes_left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    retrain("poor")
    monkeypatch.setattr(champion, "_is_dead", lambda owner: True)  # the lock's owner has died with it
    database = (root / "mlflow.db").read_bytes()
    for writes in range(100):
        (root / "mlflow.db").write_bytes(database)
        writes_left[0] = writes
        try:
            retrain("good")
            died = False
        except SimulatedKill:
            died = True
        writes_left[0] = 10**9
        assert read_aliases(root)[CHAMPION] in (1, 2)
        retrain("good")
        assert read_aliases(root) == {CHALLENGER: 2, CHAMPION: 2, PREVIOUS: 1}
        with open_store(root, "convoy") as store:
            assert champion.audit_log(store, "convoy")["after"].tolist() == [1, 2]
            assert [model.name for model in store.client.search_registered_models()] == ["convoy"]
            assert len(store.client.search_model_versions("name = 'convoy'")) == 2
        assert read_audit_log(root, version=2)["after"].tolist() == [1, 2]
        if not died:
            break
    assert writes > 8


def test_sync_refills_a_deleted_database_but_has_no_champion(
    root: Path, retrain: Retrain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrain("good")
    # in another place, since this process would not notice that its database is gone
    lost = copy_without_mlflow(root, tmp_path / "lost")
    monkeypatch.chdir(lost)
    for _ in range(2):
        sync_mlflow.sync_results(lost)
    with open_store(lost, "convoy") as store:
        (run,) = store.client.search_runs([store.experiment.experiment_id])
        assert run.info.status == "FINISHED"
        assert len(store.client.get_metric_history(run.info.run_id, "epoch/val_loss")) == 4
    for _ in range(2):
        with pytest.raises(
            ConvoyError, match=r"had a champion \(version 1, as of [-0-9]+\), of which this MLflow knows nothing"
        ) as raised:
            Stage(lost, "register").run(register)
        assert CHAMPION not in read_aliases(lost)
    note = lost / "artifacts/.cache/champion/convoy.txt"
    assert f"If it is lost for good, remove {note}: the next run then begins without a champion" in str(raised.value)
    note.unlink()
    Stage(lost, "register").run(register)
    assert read_aliases(lost)[CHAMPION] == 1


@pytest.mark.slow
@pytest.mark.parametrize("override", ["register.gate.max_test_set_uses=7", "register.gate.alpha=0.04"])
def test_changed_gate_settings_are_evaluated_again(
    override: str, root: Path, retrain: Retrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrain("good")
    retrain("similar")
    asked = watch_gate(monkeypatch)
    retrain("similar", override)
    assert len(asked) == 1


@pytest.mark.slow
def test_other_images_or_champion_are_evaluated_again(
    root: Path, retrain: Retrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrain("poor")
    retrain("good")
    retrain("similar")
    asked = watch_gate(monkeypatch)
    (root / "artifacts/preprocess/near_duplicates.csv").write_text("others\n")
    renew_manifest(root / "artifacts/preprocess")
    retrain("similar")
    assert len(asked) == 1
    with open_store(root, "convoy") as store:
        champion.roll_back(store, "convoy", "it fails at night", "ada", "0" * 40)
    retrain("similar")
    assert len(asked) == 2


def watch_gate(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What is judged from now on."""
    asked: list[tuple] = []
    real = promote.run_gate
    monkeypatch.setattr(promote, "run_gate", lambda *given: (asked.append(given), real(*given))[1])
    return asked


def test_gate_gets_the_evidence_of_both_models(root: Path, retrain: Retrain, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    real = promote.gate.decide

    def noted(challenger: ModelEvidence, old: ModelEvidence | None, params: GateConfig, **more: Any) -> Verdict:
        told.append({"challenger": challenger, "old": old, **more})
        return real(challenger, old, params, **more)

    monkeypatch.setattr(promote.gate, "decide", noted)
    retrain("poor")
    retrain("good")
    prepared = root / "artifacts/preprocess"
    images = pd.read_parquet(prepared / "images.parquet")
    seen = set(images["sha256"][images["split"] != "test"])
    for verdict in told:
        pd.testing.assert_frame_equal(
            verdict["near_duplicates"], pd.read_parquet(prepared / "cross_split_duplicates.parquet")
        )
        assert set(verdict["challenger"].training_hashes) == seen
        assert verdict["challenger"].parameters > 1000
    assert [verdict["test_set_uses"] for verdict in told] == [1, 2]
    assert set(told[1]["old"].training_hashes) == seen
    assert told[1]["old"].latency == 1
    assert told[1]["challenger"].latency > 0
