"""An MLflow server with PostgreSQL and a bucket: everything works as with the embedded store."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient

import servers
from command_line import run_command
from convoy.core import config
from convoy.core.errors import ConvoyError
from convoy.promotion import champion
from convoy.promotion.champion import CHALLENGER, CHAMPION, PREVIOUS
from convoy.registry import model_loader, verification
from convoy.tracking import run_record, runs
from convoy.tracking.store import open_store
from convoy.training.record import TrainingRecord
from pipeline.evaluate import evaluate
from pipeline.register import register
from pipeline.stage import Stage
from pipeline.train import train
from retraining_scenarios import BASE, make_retraining_project, predict_in_this_process, restore_training
from servers import FaultyHandler, FaultyServer
from small_project import ROOT, make_project
from tracking_fixtures import read_trained_files

pytestmark = pytest.mark.usefixtures("embedded_store")

CURVES = ["epoch/lr", "epoch/train_accuracy", "epoch/train_loss", "epoch/val_accuracy", "epoch/val_loss"]


@pytest.fixture(scope="module")
def retraining_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_retraining_project(tmp_path_factory.mktemp("nights") / "project")


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with servers.run_postgres() as uri:
        yield uri


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What a process needs to know of the bucket."""
    with servers.run_s3(tmp_path_factory.mktemp("s3")) as address:
        yield {**servers.BUCKET, "MLFLOW_S3_ENDPOINT_URL": address}


@pytest.fixture(scope="module")
def server_address(database: str, bucket: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, port = tmp_path_factory.mktemp("server"), servers.find_free_port()
    options = ["--backend-store-uri", database, "--artifacts-destination", "s3://convoy/artifacts"]
    with servers.run_mlflow(folder, port, *options, environment=bucket):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def server(server_address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of MLflow's server, which the pipeline knows: runs in PostgreSQL, files in the bucket."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server_address.replace("//", "//someone:secret@"))
    return server_address


@pytest.fixture
def predict_here() -> Iterator[pytest.MonkeyPatch]:
    """A model answers here and not in a fresh process, which takes ten seconds; until this is undone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "_predict_in_subprocess", predict_in_this_process)
        yield patch


Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start_command() -> Iterator[Start]:
    """Starts a command of the pipeline in a project beside this process, as a user does."""
    with contextlib.ExitStack() as ends:

        def start_command(root: Path, *command: str) -> subprocess.Popen:
            environment, whole = {**os.environ, "PYTHONPATH": str(ROOT)}, [sys.executable, "-m", *command]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            process = ends.enter_context(subprocess.Popen(whole, cwd=root, env=environment, **pipes))
            ends.callback(process.kill)
            return process

        yield start_command


def read_aliases(server: str, name: str) -> dict[str, int]:
    found = MlflowClient(server, server).get_registered_model(name).aliases
    return {alias: int(version) for alias, version in found.items()}


def list_versions(server: str, name: str) -> list[int]:
    """Of all versions of a registered model."""
    return sorted(int(each.version) for each in MlflowClient(server, server).search_model_versions(f"name = '{name}'"))


def list_promotions(root: Path, name: str) -> list[tuple[int | None, int]]:
    """From which version to which the champion went, from the first move to the last."""
    with open_store(root, name) as store:
        return [(event.before, event.after) for event in champion.promotion_events(store, name)]


def assert_no_lock_is_left(server: str, name: str) -> None:
    client = MlflowClient(server, server)
    assert [model.name for model in client.search_registered_models(f"name LIKE '{name}%'")] == [name]
    assert champion.PENDING_EVENT_TAG not in client.get_registered_model(name).tags


# The whole road


@pytest.mark.slow
def test_pipeline_from_first_run_to_rollback(
    retraining_project: Path,
    tmp_path: Path,
    server: str,
    predict_here: pytest.MonkeyPatch,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = Path(shutil.copytree(retraining_project, tmp_path / "project"))
    monkeypatch.chdir(root)
    for training in ("poor", "good"):
        Stage(restore_training(root, training, "register.name=road"), "register").run(register)
        said = capsys.readouterr()
        assert "lenet is now the champion: models:/road@champion" in said.out
        assert "secret" not in said.out + said.err
    assert read_aliases(server, "road") == {CHALLENGER: 2, CHAMPION: 2, PREVIOUS: 1}
    assert_complete_runs(server, "road", [root / "kept/poor", root / "kept/good"], "verdict.md")
    assert not [name for name in ("mlflow.db", "mlartifacts", "mlruns") if (root / name).exists()]

    run_command("predict", "--json", str(root / "data/lying"))
    answers = [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()]
    assert answers.count("lying") > 0.8 * len(answers) > 0
    predict_here.undo()
    run_command("verify", "models:/road@champion", "artifacts/evaluate/lenet")
    assert "models:/road@champion predicts " in capsys.readouterr().out

    run_command("sync")
    assert f"  leaderboard  {server}/#/experiments/" in capsys.readouterr().out
    run_command("rollback", "--reason", "it fails at night")
    assert read_aliases(server, "road") == {CHAMPION: 1}  # version 2 never becomes the champion again
    assert list_promotions(root, "road") == [(None, 1), (1, 2), (2, 1)]
    assert_no_lock_is_left(server, "road")


def assert_complete_runs(server: str, name: str, results: list[Path], *files: str) -> None:
    """A run for each of these trainings and no other, each point of its curves once, and all files."""
    client = MlflowClient(server, server)
    found = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    assert len(found) == len(results)
    by_identity = {run.data.tags[run_record.FINGERPRINT_TAG]: run for run in found}
    for trained in (result / "train/lenet" for result in results):
        run = by_identity[TrainingRecord.load(trained / "record.json").fingerprint]
        history = pd.read_csv(trained / "history.csv")
        assert run.info.status == "FINISHED"
        for curve in CURVES:
            points = sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, curve))
            assert [step for step, _ in points] == list(history["epoch"])
            expected = list(history[curve.removeprefix("epoch/")])
            assert [value for _, value in points] == pytest.approx(expected, abs=1e-6)
        assert len(run.inputs.dataset_inputs) == 1
        there = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert {"record.json", "history.csv", "weights.safetensors", "confusion.png", *files} <= there


@pytest.mark.slow
def test_client_writing_to_the_bucket_sees_the_same_champion(
    retraining_project: Path,
    tmp_path: Path,
    server: str,
    bucket: dict[str, str],
    predict_here: pytest.MonkeyPatch,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = Path(shutil.copytree(retraining_project, tmp_path / "project"))
    MlflowClient(server, server).create_experiment("direct", "s3://convoy/direct")
    for name, value in bucket.items():
        monkeypatch.setenv(name, value)
    Stage(restore_training(root, "good", "register.name=direct"), "register").run(register)
    assert read_aliases(server, "direct") == {CHALLENGER: 1, CHAMPION: 1}
    version = MlflowClient(server, server).get_model_version("direct", "1")
    assert MlflowClient(server, server).get_model_version_download_uri("direct", "1").startswith("s3://convoy/direct/")
    assert model_loader.load(version).architecture == "lenet"


# Two retrainings at once


@pytest.fixture
def two_projects(retraining_project: Path, tmp_path: Path) -> list[Path]:
    """Two copies of a project, as on two machines."""
    return [Path(shutil.copytree(retraining_project, tmp_path / name)) for name in ("here", "there")]


class Machine:
    """A process that registers on demand, and may wait at a call for the others that do so at the same time."""

    def __init__(self, context: multiprocessing.context.ForkServerContext, barrier: threading.Barrier) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=run_machine, args=(theirs, barrier))
        self.process.start()


def run_machine(connection: Connection, barrier: threading.Barrier) -> None:
    verification._predict_in_subprocess = predict_in_this_process
    meet = ""

    def meeting(call: str, original: Any) -> Any:
        def called(*given: Any, **named: Any) -> Any:
            if meet == call:
                barrier.wait(60)
            return original(*given, **named)

        return called

    champion.set_champion = meeting("move", champion.set_champion)
    MlflowClient.create_experiment = meeting("create_experiment", MlflowClient.create_experiment)  # type: ignore[method-assign]
    while order := connection.recv():
        root, os.environ["MLFLOW_TRACKING_URI"], meet = order
        try:
            Stage(root, "register").run(register)
            connection.send("")
        except BaseException as error:
            connection.send(str(error) if isinstance(error, ConvoyError) else repr(error))


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Machine]]:
    context = multiprocessing.get_context("forkserver")
    barrier = context.Barrier(2)
    made = [Machine(context, barrier) for _ in range(2)]
    yield made
    for machine in made:
        machine.connection.send(None)
        machine.process.join()
        machine.connection.close()


def register_together(machines: list[Machine], roots: list[Path], server: str, meet: str = "") -> list[str]:
    """How the register stage ends in each of these projects, "" or what it says is wrong.

    They begin at once, and wait for each other before the call `meet`.
    """
    for machine, root in zip(machines, roots, strict=True):
        machine.connection.send((root, server, meet))
    return [machine.connection.recv() for machine in machines]


@pytest.mark.slow
def test_one_of_two_concurrent_retrainings_sets_the_champion(
    two_projects: list[Path],
    server: str,
    start_command: Start,
    machines: list[Machine],
    predict_here: pytest.MonkeyPatch,
) -> None:
    Stage(restore_training(two_projects[0], "poor", "register.name=race"), "register").run(register)
    for root, training in zip(two_projects, ("good", "similar"), strict=True):
        restore_training(root, training, "register.name=race")
    processes = [start_command(root, "pipeline.register") for root in two_projects]
    ended = [(*process.communicate(), process.returncode) for process in processes]
    assert list_versions(server, "race") == [1, 2, 3]
    won = read_aliases(server, "race")[CHAMPION]
    assert list_promotions(two_projects[0], "race") == [(None, 1), (1, won)]
    assert_no_lock_is_left(server, "race")
    ((out, err, code),) = (end for end in ended if "is now the champion" not in end[0])
    if code:
        assert_asks_to_rerun(err, "race", 1, won)
    else:
        assert f"version {won} stays the champion" in out

    assert register_together(machines, two_projects, server) == ["", ""]
    assert list_promotions(two_projects[0], "race") == [(None, 1), (1, won)]
    assert list_versions(server, "race") == [1, 2, 3]
    results = [two_projects[0] / "kept" / training for training in ("poor", "good", "similar")]
    assert_complete_runs(server, "race", results)

    known = list_promotions(two_projects[0], "race")
    for _ in range(3):  # and now both at the same moment, each with a verdict against the poor one
        MlflowClient(server, server).set_registered_model_alias("race", CHAMPION, "1")
        done, said = sorted(register_together(machines, two_projects, server, meet="move"))
        won = read_aliases(server, "race")[CHAMPION]
        assert done == ""
        assert_asks_to_rerun(said, "race", 1, won)
        known.append((1, won))
        assert list_promotions(two_projects[0], "race") == known
        assert_no_lock_is_left(server, "race")


def assert_asks_to_rerun(error: str, name: str, compared: int | None, found: int) -> None:
    was = f"version {compared}" if compared else "none"
    assert "Traceback" not in error
    line = error.splitlines()[-1]  # MLflow says before it that it has made a version
    assert f"the champion of {name} was {was} when it was compared, and is version {found} now: nothing was" in line
    assert "Run `convoy run` again" in line


@pytest.mark.slow
def test_concurrent_identical_first_runs_give_one_champion(
    two_projects: list[Path], server: str, machines: list[Machine]
) -> None:
    for root in two_projects:
        restore_training(root, "good", "register.name=first")
    ended = register_together(machines, two_projects, server, meet="create_experiment")
    assert "" in ended
    for _ in range(2):
        assert register_together(machines, two_projects, server) == ["", ""]
    assert len(list_promotions(two_projects[0], "first")) == 1
    assert_complete_runs(server, "first", [two_projects[0] / "kept/good"])
    assert_no_lock_is_left(server, "first")


# From the embedded store to the server


@pytest.mark.slow
def test_migrated_store_continues_on_the_server(
    retraining_project: Path,
    tmp_path: Path,
    server_address: str,
    start_command: Start,
    predict_here: pytest.MonkeyPatch,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = Path(shutil.copytree(retraining_project, tmp_path / "project"))
    for training in ("poor", "good"):
        Stage(restore_training(root, training, "register.name=moved"), "register").run(register)
    before = list_promotions(root, "moved")
    with open_store(root, "moved") as store:
        hashes = {str(each.version): each.tags[runs.CHECKSUMS_TAG] for each in store.client.search_model_versions("")}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server_address.replace("//", "//someone:secret@"))
    monkeypatch.chdir(root)
    out, err = (moving := start_command(root, "pipeline.cli", "migrate")).communicate()
    assert moving.returncode == 0, err
    assert "version 2 of moved\neverything is copied:\n" in out
    assert "secret" not in out + err
    capsys.readouterr()
    run_command("migrate")
    assert capsys.readouterr().out.startswith("everything was copied already:\n")

    results = [root / "kept" / training for training in ("poor", "good")]
    assert_complete_runs(server_address, "moved", results, "verdict.md", "promotions.csv")
    found = MlflowClient(server_address, server_address).search_model_versions("name = 'moved'")
    assert {each.version: each.tags[runs.CHECKSUMS_TAG] for each in found} == hashes
    assert read_aliases(server_address, "moved") == {CHALLENGER: 2, CHAMPION: 2, PREVIOUS: 1}
    assert list_promotions(root, "moved") == before == [(None, 1), (1, 2)]
    predict_here.undo()
    run_command("verify", "models:/moved@champion", "artifacts/evaluate/lenet")
    run_command("predict", str(root / "data/lying/00.png"))
    assert "lying" in capsys.readouterr().out

    predict_here.setattr(verification, "_predict_in_subprocess", predict_in_this_process)
    Stage(restore_training(root, "good", "register.name=moved"), "register").run(register)
    assert "lenet stays the champion: models:/moved@champion, version 2" in capsys.readouterr().out
    Stage(restore_training(root, "similar", "register.name=moved"), "register").run(register)
    assert "version 2 stays the champion" in capsys.readouterr().out
    assert list_versions(server_address, "moved") == [1, 2, 3]
    assert_complete_runs(server_address, "moved", [*results, root / "kept/similar"])
    run_command("rollback", "--reason", "it fails at night")
    assert read_aliases(server_address, "moved")[CHAMPION] == 1


# A server that goes, and comes again


@pytest.mark.slow
def test_server_outage_during_training_loses_no_data(
    retraining_project: Path, tmp_path: Path, start_command: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, undisturbed = (
        Path(shutil.copytree(retraining_project, tmp_path / name)) for name in ("project", "undisturbed")
    )
    for folder in (root, undisturbed):
        config.compose(folder, [*BASE, "train.max_epochs=200"])
        shutil.rmtree(folder / "artifacts/train")
        shutil.rmtree(folder / "artifacts/evaluate")
    begun = time.monotonic()
    Stage(undisturbed, "train", "lenet").run(train)
    alone = time.monotonic() - begun

    folder, port = tmp_path / "server", servers.find_free_port()
    folder.mkdir()
    server, client = f"http://127.0.0.1:{port}", MlflowClient(f"http://127.0.0.1:{port}")
    options = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]

    def epochs() -> int:
        experiment = client.get_experiment_by_name("convoy")
        runs = client.search_runs([experiment.experiment_id]) if experiment else []
        return sum(len(client.get_metric_history(run.info.run_id, "epoch/val_loss")) for run in runs)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("CONVOY_LIVE", "1")
    with servers.run_mlflow(folder, port, *options) as process:
        training = start_command(root, "pipeline.train", "lenet")
        assert training.stdout
        assert training.stderr
        servers.wait_until(lambda: epochs() >= 3)
        os.killpg(process, signal.SIGKILL)
    begun = time.monotonic()
    said = training.stdout.readlines()
    assert training.wait() == 0
    assert time.monotonic() - begun < 2 * alone + 5
    assert sum("epoch " in line for line in said) == 200
    assert read_trained_files(root) == read_trained_files(undisturbed)
    (line,) = training.stderr.read().splitlines()  # the reporter's as well, to its end
    assert line.startswith(f"convoy: live: MLflow at {server} fails: ")
    assert "`convoy sync` adds its run" in line

    Stage(root, "evaluate", "lenet").run(evaluate)
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit, match=f"^convoy: MLflow at {server} fails: .* run this again$"):
        run_command("sync")
    with servers.run_mlflow(folder, port, *options):
        (cut,) = client.search_runs([client.get_experiment_by_name("convoy").experiment_id])
        assert (cut.info.status, epochs()) != ("FINISHED", 200)
        for _ in range(2):
            run_command("sync")
            assert_complete_runs(server, "convoy", [root / "artifacts"])
            (whole,) = client.search_runs([client.get_experiment_by_name("convoy").experiment_id])
            assert (whole.info.run_id, whole.info.start_time) == (cut.info.run_id, cut.info.start_time)


class Refusal(FaultyHandler):
    """As MLflow's own login does it."""

    def do_GET(self) -> None:
        self.say(int(self.server.answer), b"You are not authenticated. Please see the documentation")

    do_POST = do_GET


@pytest.mark.parametrize("answer", ["401", "403"])
def test_refused_login_is_one_line_without_the_password(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_project(tmp_path / "project"))
    with FaultyServer(("127.0.0.1", 0), Refusal) as refusing:
        refusing.answer = answer
        threading.Thread(target=refusing.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:secret@127.0.0.1:{refusing.server_port}")
        for command in (["sync"], ["predict", "a.png"], ["rollback", "--reason", "it fails"]):
            with pytest.raises(SystemExit) as end:
                run_command(*command)
            (line,) = str(end.value).splitlines()
            assert f"MLflow at http://127.0.0.1:{refusing.server_port} fails: " in line
            assert answer in line
            assert "secret" not in line
        refusing.shutdown()
