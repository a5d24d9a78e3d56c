"""The scheduled job, run after run: what it does with new data, spoiled labels, a dead server and a kill."""

import random
import resource
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from filelock import FileLock

from scheduled_job import STEPS, Schedule, make_schedule

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


@pytest.mark.usefixtures("server")
def test_second_retraining_in_a_folder_ends_with_a_line(schedule: Schedule) -> None:
    lock = schedule.clone / "artifacts/.scratch/retrain.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        done = schedule.run_line(RETRAIN)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "convoy: another retraining runs in this folder: wait for it, or end it\n"
