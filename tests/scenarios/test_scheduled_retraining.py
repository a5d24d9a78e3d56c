"""The scheduled job, run after run: what it does with new data, spoiled labels, a dead server and a kill."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from repositories import run_git
from scheduled_job import STEPS, Schedule, make_schedule
from servers import find_free_port, wait_until

pytestmark = pytest.mark.slow

(RETRAIN,) = (step["run"] for step in STEPS if "convoy retrain" in step.get("run", ""))


@pytest.fixture(scope="module")
def schedule(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Schedule]:
    """A repository whose first job has run, and whose pull request is merged."""
    schedule = make_schedule(tmp_path_factory.mktemp("scheduled"))
    with schedule.server():
        first = schedule.run_job()
        assert first.returncode == 0, first.stdout + first.stderr
        assert schedule.summary.startswith("# PROMOTE: retraining of shapes\n")
        assert schedule.champion() == ("1", 1)
        (opened,) = schedule.pull_requests
        assert opened["body"] == schedule.summary
        schedule.merge()
    return schedule


@pytest.fixture
def server(schedule: Schedule) -> Iterator[None]:
    """MLflow's server."""
    with schedule.server():
        yield


def processor_seconds() -> float:
    """The processor time of all processes that were started from here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def count_trainings(done: subprocess.CompletedProcess[str]) -> int:
    return done.stdout.count("epoch 1/")


@pytest.mark.usefixtures("server")
def test_job_without_news_ends_within_a_minute(schedule: Schedule) -> None:
    before = schedule.snapshot()
    began = processor_seconds()
    done = schedule.run_job()
    # Unlike the time on the clock, it does not depend on what else the machine does.
    assert processor_seconds() - began < 60
    assert done.returncode == 0, done.stdout + done.stderr
    assert schedule.summary.startswith("# UNCHANGED")
    assert schedule.snapshot() == before
    assert not subprocess.check_output(["git", "status", "--porcelain"], cwd=schedule.clone)
    assert schedule.run_line(RETRAIN, fail_unless_promoted=True).returncode == 4


@pytest.mark.usefixtures("server")
def test_job_trains_on_new_images(schedule: Schedule) -> None:
    schedule.add_images(20, "second")
    done = schedule.run_job()
    assert done.returncode == 0, done.stdout + done.stderr
    assert count_trainings(done) == 1
    assert "360 images, +60 (300 before)" in schedule.summary
    assert schedule.pull_requests[-1]["body"] == schedule.summary
    schedule.merge()
    assert "UNCHANGED" in schedule.run_job().stdout


@pytest.mark.usefixtures("server")
def test_spoiled_labels_are_held_with_a_reason(schedule: Schedule) -> None:
    champion, _ = schedule.champion()
    kept = shutil.copytree(schedule.images, schedule.folder / "correct")
    files, choose = sorted(schedule.images.rglob("*.png")), random.Random(1)
    folders = [file.parent for file in files]
    choose.shuffle(folders)
    moved = [file.rename(file.with_name(f"{file.parent.name}-{file.name}")) for file in files]
    for file, folder in zip(moved, folders, strict=True):
        file.rename(folder / file.name)
    done = schedule.run_job(fail_unless_promoted=True)
    assert done.returncode == 3, done.stdout + done.stderr
    assert schedule.summary.startswith(("# HOLD", "# REJECT"))
    assert "minimum 0.5" in schedule.summary
    assert schedule.champion()[0] == champion
    shutil.rmtree(schedule.images)
    kept.rename(schedule.images)


def test_job_without_mlflow_loses_nothing(schedule: Schedule) -> None:
    schedule.add_images(10, "while it is down")
    down = schedule.run_job()
    assert down.returncode == 1, down.stdout + down.stderr
    assert count_trainings(down) == 1
    assert schedule.summary.startswith("# FAILED")
    # Not even the cache of the CI is there the next time.
    shutil.rmtree(schedule.kept)
    with schedule.server():
        _, versions = schedule.champion()
        up = schedule.run_job()
        assert up.returncode == 0, up.stdout + up.stderr
        assert count_trainings(up) == 0
        assert schedule.champion()[1] == versions + 1
    schedule.merge()


@pytest.mark.usefixtures("server")
def test_two_jobs_at_once_leave_one_champion(schedule: Schedule) -> None:
    schedule.add_images(10, "for two")
    clones = [schedule.clone, schedule.clone.with_name("other")]
    setup = [step["run"] for step in STEPS if "remote add" in step.get("run", "")]
    venv = schedule.clone.parent / "venv"
    (schedule.clone / ".venv").rename(venv)
    for clone in clones:
        schedule.checkout(clone)
        (clone / ".venv").symlink_to(venv)
        assert schedule.run_line(setup[0], clone).returncode == 0
    _, versions = schedule.champion()
    command = ["bash", "-e", "-c", RETRAIN]
    both = [
        subprocess.Popen(
            command, cwd=clone, env=schedule.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for clone in clones
    ]
    outputs = [process.communicate()[0] for process in both]
    (schedule.clone / ".venv").unlink()
    venv.rename(schedule.clone / ".venv")
    # The later one may find that the champion has moved since it was compared, and says so.
    assert 0 in [process.returncode for process in both], outputs
    champion, count = schedule.champion()
    assert count == versions + 1
    assert champion
    assert len([each for each in schedule.pull_requests if each["head"] == schedule.pull_requests[-1]["head"]]) == 1
    schedule.merge()


def start_job(schedule: Schedule, log: Path) -> subprocess.Popen[bytes]:
    """Start the retraining of a job whose other steps are done."""
    assert schedule.run_line("git fetch --quiet && git reset --quiet --hard origin/main").returncode == 0
    with log.open("wb") as file:
        return subprocess.Popen(
            ["bash", "-e", "-c", RETRAIN], cwd=schedule.clone, env=schedule.environment(), stdout=file, stderr=file
        )


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("moment", ["epoch 2/", "Running stage 'register'", "retraining of shapes; the summary"])
def test_next_job_finishes_the_work_of_a_killed_one(schedule: Schedule, moment: str) -> None:
    schedule.add_images(10, moment)
    log = schedule.folder / "killed.log"
    process = start_job(schedule, log)
    wait_until(lambda: moment in log.read_text() or process.poll() is not None, seconds=300)
    kill_all_in(schedule.clone)
    assert process.wait() != 0, log.read_text()
    done = schedule.run_job()
    assert done.returncode == 0, done.stdout + done.stderr
    assert schedule.champion()[0]
    heads = [each["head"] for each in schedule.pull_requests]
    assert len(heads) == len(set(heads))
    schedule.merge()
    assert "UNCHANGED" in schedule.run_job().stdout


def kill_all_in(folder: Path) -> None:
    """Kill all processes that work in a folder at once, as the end of a virtual machine does."""
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            is_inside = link.readlink().is_relative_to(folder)
        except OSError:
            continue
        if is_inside:
            os.kill(int(link.parent.name), signal.SIGKILL)


@pytest.mark.usefixtures("server")
def test_second_retraining_in_a_folder_ends_with_a_line(schedule: Schedule) -> None:
    lock = schedule.clone / "artifacts/.scratch/retrain.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        done = schedule.run_line(RETRAIN)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "convoy: another retraining runs in this folder: wait for it, or end it\n"


@pytest.mark.usefixtures("server")
def test_few_new_images_train_only_if_they_drift(schedule: Schedule) -> None:
    schedule.change_setting("min_new_images: 1 ", "min_new_images: 500 ")
    schedule.add_images(10, "few")
    waited = schedule.run_job(fail_unless_promoted=True)
    assert waited.returncode == 4, waited.stdout + waited.stderr
    assert schedule.summary.startswith("# WAIT")
    assert "30 images are new, relabelled or gone since the last run, fewer than" in schedule.summary
    assert "no drift of the new images" in schedule.summary
    assert "no loss of accuracy" in schedule.summary
    assert count_trainings(waited) == 0

    schedule.add_images(10, "inverted", is_inverted=True)
    trained = schedule.run_job()
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "60 images are new" in schedule.summary
    assert "* drift of the new images: p = " in schedule.summary
    assert count_trainings(trained) == 1
    assert (schedule.clone / "artifacts/retrain/unusual.png").stat().st_size > 10_000
    schedule.merge()
    schedule.change_setting("min_new_images: 500 ", "min_new_images: 1 ")


@pytest.mark.usefixtures("server")
def test_monitor_exits_with_3_on_drift_only(schedule: Schedule) -> None:
    for folder, is_inverted, status in (("usual", False, 0), ("other", True, 3)):
        schedule.draw(schedule.folder / folder, 30, folder, is_inverted=is_inverted)
        done = schedule.run_line(f".venv/bin/convoy monitor {schedule.folder / folder} --json")
        assert done.returncode == status, done.stdout + done.stderr
        found = json.loads(done.stdout)
        assert (found["drift"], found["new"]) == (bool(status), 90)


def test_restored_backups_leave_nothing_to_do(schedule: Schedule, tmp_path: Path) -> None:
    with schedule.server():
        champion = schedule.champion()
        schedule.run_job()
        schedule.merge()
    backup, restored = tmp_path / "backup", Schedule(tmp_path / "restored", find_free_port())
    # As in docs/retraining.md: the database before the artifacts.
    run_git(tmp_path, "clone", "--quiet", "--mirror", str(schedule.folder / "origin.git"), str(backup / "origin.git"))
    shutil.copytree(schedule.folder / "store", backup / "store")
    (backup / "mlflow").mkdir()
    with (
        contextlib.closing(sqlite3.connect(schedule.folder / "mlflow/mlflow.db")) as source,
        contextlib.closing(sqlite3.connect(backup / "mlflow/mlflow.db")) as copy,
    ):
        source.backup(copy)
    shutil.copytree(schedule.folder / "mlflow/mlartifacts", backup / "mlflow/mlartifacts")

    shutil.copytree(backup, restored.folder)
    shutil.copytree(schedule.folder / "bin", restored.folder / "bin")
    restored.clone.parent.mkdir()
    restored.checkout()
    (restored.clone / ".venv").symlink_to(schedule.clone / ".venv")
    with restored.server():
        assert restored.champion() == champion
        for step in STEPS:
            if "make" not in step.get("run", "make"):
                done = restored.run_line(step["run"])
                assert done.returncode == 0, done.stdout + done.stderr
        assert restored.summary.startswith("# UNCHANGED")
        image = next(schedule.images.rglob("*.png"))
        predicted = restored.run_line(f".venv/bin/convoy predict {image} --json")
        assert json.loads(predicted.stdout)["label"] in ("lying", "leaning", "standing"), predicted.stderr


@pytest.mark.usefixtures("server")
def test_job_at_its_time_limit_leaves_a_checkpoint_to_resume(schedule: Schedule) -> None:
    schedule.change_setting("max_epochs: 6 ", "max_epochs: 200 ")
    log = schedule.folder / "limit.log"
    process = start_job(schedule, log)
    wait_until(lambda: "epoch 5/" in log.read_text() or process.poll() is not None, seconds=300)
    # At the limit, `timeout` passes this signal on, as it does with one that it gets itself.
    process.terminate()
    assert process.wait() == 1, log.read_text()
    assert schedule.summary.startswith("# FAILED")
    schedule.save_caches()
    done = schedule.run_job()
    assert done.returncode == 0, done.stdout + done.stderr
    assert count_trainings(done) == 0
    assert "resuming after" in done.stdout
    assert "epoch 200/200" in done.stdout
