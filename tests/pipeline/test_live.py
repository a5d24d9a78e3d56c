"""Live reporting: a running training is a run in MLflow, and no failure of MLflow affects it."""

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import training_process
from convoy.core import config
from convoy.tracking import runs
from convoy.tracking.store import open_store
from convoy.training.record import TrainingRecord
from pipeline.evaluate import evaluate
from pipeline.live import LiveRun, Reporter
from pipeline.stage import Stage
from servers import FaultyHandler, FaultyServer
from small_project import ROOT, run_stages
from tracking_fixtures import (
    copy_project,
    list_runs,
    make_client,
    make_trained_project,
    read_curve,
    read_trained_files,
    sync,
)

Message = dict[str, Any]

pytestmark = pytest.mark.usefixtures("embedded_store")


@pytest.fixture(scope="module")
def trained_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that is ready to train, and a record of a training there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        overrides = ["model=[lenet]", "train.max_epochs=60", "trainer.threads=1", "train.checkpoint_minutes=0.0005"]
        return make_trained_project(tmp_path_factory.mktemp("road") / "project", overrides, until="preprocess")


@pytest.fixture(scope="module")
def record(trained_project: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingRecord:
    root = copy_project(trained_project, tmp_path_factory.mktemp("trained") / "project")
    config.compose(root, ["model=[lenet]", "train.max_epochs=1", "trainer.threads=1"])
    run_stages(root, until="train")
    return TrainingRecord.load(root / "artifacts/train/lenet/record.json")


@pytest.fixture
def root(trained_project: Path, tmp_path: Path) -> Path:
    return copy_project(trained_project, tmp_path / "project")


# What the reporter makes of what it is told


def epoch_message(number: int) -> Message:
    row = {"epoch": number, "lr": 0.1, "train_loss": 1 / number, "val_loss": 2 / number, "val_accuracy": 0.5}
    return {"row": row, "time_ms": 1_000 * (number + 1)}


def end_message(status: str) -> Message:
    return {"status": status, "time_ms": 9_000}


def report(root: Path, record: TrainingRecord, *messages: Message) -> None:
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    for message in messages:
        inbox.put(message)
    Reporter(root, record, 1_000).report(inbox)


def start_reporter(root: Path, record: TrainingRecord) -> tuple[queue.SimpleQueue[Message], threading.Thread]:
    inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
    reporter = threading.Thread(target=Reporter(root, record, 1_000).report, args=[inbox])
    reporter.start()
    return inbox, reporter


def test_run_exists_from_the_start_and_its_curves_grow(root: Path, record: TrainingRecord) -> None:
    inbox, reporter = start_reporter(root, record)
    for number in range(3):
        if number:
            inbox.put(epoch_message(number))
        wait_until(lambda: [len(read_curve(root, run, "epoch/val_loss")) for run in list_runs(root)] == [number])  # noqa: B023
        assert list_runs(root)[0].info.status == "RUNNING"
    inbox.put(end_message("FINISHED"))
    reporter.join()
    (run,) = list_runs(root)
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("FINISHED", 1_000, 9_000)
    assert read_curve(root, run, "epoch/val_loss") == [(1, 2.0), (2, 1.0)]
    assert run.data.params["recipe.lr"] == str(record.settings["recipe"]["lr"])
    assert run.inputs.dataset_inputs[0].dataset.name == "digits"


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    for _ in range(int(seconds * 20)):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it never came")


def test_resumed_training_continues_its_run(root: Path, record: TrainingRecord) -> None:
    report(root, record, epoch_message(1), epoch_message(2), end_message("KILLED"))
    assert list_runs(root)[0].info.status == "KILLED"
    report(root, record, epoch_message(1), epoch_message(2), epoch_message(3), end_message("FINISHED"))
    (run,) = list_runs(root)
    assert run.info.status == "FINISHED"
    assert [step for step, _ in read_curve(root, run, "epoch/val_loss")] == [1, 2, 3]


def test_forced_repetition_of_a_training_adds_nothing(root: Path, record: TrainingRecord) -> None:
    report(root, record, epoch_message(1), end_message("FINISHED"))
    before = (root / "mlflow.db").read_bytes()
    report(root, record, epoch_message(1), end_message("FINISHED"))
    assert (root / "mlflow.db").read_bytes() == before


def test_failed_training_is_marked_failed(root: Path, record: TrainingRecord) -> None:
    report(root, record, end_message("FAILED"))
    assert list_runs(root)[0].info.status == "FAILED"


def test_failed_request_is_retried_and_logged_once(
    root: Path, record: TrainingRecord, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, calls = MlflowClient.log_batch, []

    def flaky(*given: Any, **named: Any) -> None:
        calls.append(whole(*given, **named))  # it arrives, but the answer does not
        if len(calls) % 3 == 2:
            raise MlflowException("the server has died")

    monkeypatch.setattr(MlflowClient, "log_batch", flaky)
    inbox, reporter = start_reporter(root, record)
    for message in map(epoch_message, range(1, 6)):
        inbox.put(message)
        wait_until(inbox.empty)
        time.sleep(0.1)
    inbox.put(end_message("FINISHED"))
    reporter.join()
    (run,) = list_runs(root)
    assert [step for step, _ in read_curve(root, run, "epoch/val_loss")] == [1, 2, 3, 4, 5]
    assert len(capsys.readouterr().err.splitlines()) == 1


# A server in MLflow's place


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer(("127.0.0.1", 0), FaultyHandler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("answer", ["500", "401", "403", "404", "rubbish", "later", "nothing"])
def test_unusable_server_is_one_line_without_the_password(
    answer: str,
    server: FaultyServer,
    root: Path,
    record: TrainingRecord,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.answer = answer
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:secret@127.0.0.1:{server.server_port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false")
    before = time.monotonic()
    report(root, record, epoch_message(1), epoch_message(2), end_message("FINISHED"))
    assert time.monotonic() - before < 10
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"convoy: live: MLflow at http://127.0.0.1:{server.server_port} fails: ")
    assert "`convoy sync` adds its run" in line
    assert "secret" not in line


# Whole trainings


Start = Callable[..., multiprocessing.context.ForkServerProcess]


@pytest.fixture
def start(fork_server: multiprocessing.context.ForkServerContext, tmp_path: Path) -> Start:
    def start(root: Path, **environment: str) -> multiprocessing.context.ForkServerProcess:
        given = {"CONVOY_LIVE": "1", "PYTHONPATH": str(ROOT)} | environment
        process = fork_server.Process(target=train_live, args=(root, given, tmp_path / "said"))
        process.start()
        return process

    return start


def train_live(root: Path, environment: dict[str, str], said: Path) -> None:
    os.environ.update(environment)
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    os.chdir(root)
    training_process.run_train_stage(root, "lenet")


def wait_for_epochs(root: Path) -> None:
    wait_until(lambda: any(len(read_curve(root, run, "epoch/val_loss")) > 1 for run in list_runs(root)))


@pytest.mark.slow
def test_killed_training_is_marked_and_resumes_its_run(root: Path, start: Start) -> None:
    first = start(root)
    wait_for_epochs(root)
    first.kill()
    first.join()
    with open_store(root, "convoy") as store:
        runs.mark_killed_runs(store)
    (killed,) = list_runs(root)
    assert killed.info.status == "KILLED"

    start(root).join()
    (run,) = list_runs(root)
    assert (run.info.run_id, run.info.status) == (killed.info.run_id, "FINISHED")
    assert [step for step, _ in read_curve(root, run, "epoch/val_accuracy")] == list(range(1, 61))

    Stage(root, "evaluate", "lenet").run(evaluate)
    assert list(sync(root).values()) == [run.info.run_id]
    assert [step for step, _ in read_curve(root, run, "epoch/val_accuracy")] == list(range(1, 61))
    assert list_runs(root)[0].info.end_time == run.info.end_time


def test_short_training_is_left_to_the_register_stage(root: Path, start: Start) -> None:
    config.compose(root, ["model=[lenet]", "train.max_epochs=1", "trainer.threads=1"])
    training = start(root, CONVOY_LIVE_AFTER="600")
    training.join()
    assert training.exitcode == 0
    assert list_runs(root) == []


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_short_training_without_a_result_is_shown(
    status: str, root: Path, record: TrainingRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only a run that has finished is left to the register stage.
    monkeypatch.setenv("CONVOY_LIVE_AFTER", "600")
    live = LiveRun(root, record)
    live.show([epoch_message(1)["row"]])
    live.end(status)
    live.thread.join(60)
    assert [run.info.status for run in list_runs(root)] == [status]


def test_wrong_delay_is_one_line(root: Path, tmp_path: Path, start: Start) -> None:
    start(root, CONVOY_LIVE_AFTER="soon").join()
    assert "CONVOY_LIVE_AFTER=soon: give a number of seconds" in (tmp_path / "said").read_text()


def test_terminated_training_is_marked_killed(root: Path, start: Start) -> None:
    training = start(root)
    wait_for_epochs(root)
    training.terminate()
    training.join()
    assert training.exitcode == 143
    assert [run.info.status for run in list_runs(root)] == ["KILLED"]


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["later", "nothing"])
def test_hung_server_does_not_affect_training(
    answer: str, server: FaultyServer, root: Path, tmp_path: Path, start: Start
) -> None:
    undisturbed = copy_project(root, tmp_path / "undisturbed")
    before = time.monotonic()
    start(undisturbed, CONVOY_LIVE="0").join()
    alone = time.monotonic() - before

    server.answer = answer
    before = time.monotonic()
    training = start(root, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{server.server_port}")
    training.join()
    assert training.exitcode == 0
    # 5 s, and the imports on a busy machine
    assert time.monotonic() - before < 2 * alone + 5
    assert read_trained_files(root) == read_trained_files(undisturbed)
    (line,) = (tmp_path / "said").read_text().splitlines()
    assert line.startswith("convoy: live: MLflow ")

    Stage(root, "evaluate", "lenet").run(evaluate)
    sync(root)
    (run,) = list_runs(root)
    assert run.info.status == "FINISHED"
    assert [step for step, _ in read_curve(root, run, "epoch/val_accuracy")] == list(range(1, 61))


@pytest.mark.slow
def test_training_without_mlflow_completes_with_one_warning(root: Path, tmp_path: Path, start: Start) -> None:
    training = start(root, MLFLOW_TRACKING_URI="http://someone:secret@127.0.0.1:9")
    training.join()
    assert training.exitcode == 0
    (line,) = (tmp_path / "said").read_text().splitlines()
    assert line.startswith("convoy: live: MLflow at http://127.0.0.1:9 fails: ")
    assert "secret" not in line
    assert (root / "artifacts/train/lenet/weights.safetensors").exists()


def test_failed_and_reported_training_is_not_started_again(root: Path, record: TrainingRecord) -> None:
    report(root, record, end_message("FAILED"))
    run_id = list_runs(root)[0].info.run_id
    make_client(root).set_tag(run_id, runs.RESULTS_TAG, "a hash")  # as `sync_run` does
    report(root, record, end_message("KILLED"))
    assert list_runs(root)[0].info.status == "FAILED"
