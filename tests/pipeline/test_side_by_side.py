"""Trainings side by side: their order and number, their output, and how a failure or a signal ends them."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from convoy.core import config
from pipeline.job_plan import Job, Machine, plan_jobs
from pipeline.side_by_side import run_jobs
from small_project import ROOT, SMALL, make_repository

PYTHON = sys.executable
PROCESSORS = Machine(units=2, gpus=())


@pytest.fixture
def dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script in the place of DVC, in a folder where it notes each job in `log`: "+ train@x", then "- train@x"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "dvc"))
    write_dvc(tmp_path / "dvc")
    return tmp_path / "dvc"


def write_dvc(file: Path, work: str = "sleep 0.3") -> None:
    script = 'for stage; do case "$stage" in train@*) break; esac; done\n'
    script += f'echo "+ $stage" >> log\n{textwrap.dedent(work)}\necho "- $stage" >> log\n'
    file.write_text(f"#!/bin/sh\n{script}")
    file.chmod(0o755)


def make_jobs(**units: int) -> list[Job]:
    return [Job(name, 1, count) for name, count in units.items()]


def read_log() -> list[str]:
    return Path("log").read_text().splitlines()


def find_highest(log: list[str]) -> int:
    """The largest number of jobs that ran at a time."""
    return max(sum(1 if line[0] == "+" else -1 for line in log[: end + 1]) for end in range(len(log)))


# Order and number


def test_jobs_are_planned_longest_first() -> None:
    params = config.parse(config.compose_text(ROOT, ["trainer=cpu", "trainer.threads=auto"]))
    jobs, machine = plan_jobs(params)
    assert {job.name for job in jobs} == set(params["model"])
    assert [job.work for job in jobs] == sorted((job.work for job in jobs), reverse=True)
    assert jobs[-1].name == "lenet"
    assert machine.units >= max(job.units for job in jobs)


def test_threads_of_the_settings_limit_the_jobs() -> None:
    params = config.parse(config.compose_text(ROOT, ["trainer=cpu", "trainer.threads=3", "model=[lenet]"]))
    assert [job.units for job in plan_jobs(params)[0]] == [3]


@pytest.mark.parametrize(
    ("limit", "units", "highest"), [(None, 1, 2), (3, 1, 2), (1, 1, 1), (None, 2, 1), (None, 8, 1)]
)
def test_no_more_jobs_run_than_the_machine_allows(limit: int | None, units: int, highest: int, dvc: Path) -> None:
    jobs = make_jobs(a=units, b=units, c=units)
    assert run_jobs(jobs, PROCESSORS, limit, pull=False) == 0
    assert find_highest(read_log()) == highest
    assert sorted(read_log()) == [f"{sign} train@{name}" for sign in "+-" for name in "abc"]
    assert read_log()[-1] == "- train@c"


def test_jobs_share_no_gpu(dvc: Path) -> None:
    write_dvc(dvc, 'echo "$stage $CUDA_VISIBLE_DEVICES" >> gpus; sleep 0.3')
    assert run_jobs(make_jobs(a=1, b=1, c=2), Machine(2, ("4", "7")), None, pull=False) == 0
    assert sorted(Path("gpus").read_text().splitlines()) == ["train@a 4", "train@b 7", "train@c 4,7"]


# Output and failures


def test_log_has_each_line_once_and_no_advice_of_dvc(dvc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = """
        echo "${stage#train@}  epoch 1/1  loss 0.5"
        echo "a warning" >&2
        echo 'Use `dvc push` to send your updates to remote storage.'
    """
    write_dvc(dvc, work)
    assert run_jobs(make_jobs(a=1, b=1), PROCESSORS, None, pull=False) == 0
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == ["a  epoch 1/1  loss 0.5", "b  epoch 1/1  loss 0.5"]
    assert err == "a warning\na warning\n"


def test_failure_starts_no_more_jobs_and_lets_others_end(dvc: Path) -> None:
    write_dvc(dvc, "[ $stage = train@a ] && exit 3; sleep 0.5")
    assert run_jobs(make_jobs(a=1, b=1, c=1), PROCESSORS, None, pull=False) == 3
    assert sorted(read_log()) == ["+ train@a", "+ train@b", "- train@b"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_signal_stops_all_jobs_and_waits_for_them(number: signal.Signals, dvc: Path) -> None:
    write_dvc(dvc, "trap 'sleep 0.5; touch saved-$stage; exit 143' TERM\necho ready\nwhile :; do sleep 0.05; done")
    code = f"""
        import sys
        python, sys.executable = sys.executable, {str(dvc)!r}
        from pipeline.job_plan import Job, Machine
        from pipeline.side_by_side import run_jobs
        jobs = [Job(name, 1, 1) for name in "abc"]
        sys.exit(run_jobs(jobs, Machine(2, ()), None, pull=False))
    """
    command = [PYTHON, "-c", textwrap.dedent(code)]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "PATH": "/usr/bin:/bin"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as running:  # type: ignore[call-overload]
        assert [running.stdout.readline() for _ in "ab"] == ["ready\n"] * 2
        running.send_signal(number)
        _, said = running.communicate(timeout=20)
    assert running.returncode == 128 + number
    assert said.count("convoy: ") == 1
    assert said.startswith(f"convoy: {number.name}: stopping the running stage; run the same command again to resume\n")
    assert sorted(file.name for file in Path.cwd().glob("saved-*")) == ["saved-train@a", "saved-train@b"]


# With DVC


@pytest.mark.slow
def test_forks_side_by_side_are_bit_identical_to_one_by_one(tmp_path: Path) -> None:
    results = []
    for jobs, fork in (("1", "0"), ("auto", "1")):
        results.append(run_project(make_repository(tmp_path / jobs), jobs, fork))
    assert results[0].keys() == results[1].keys()
    assert results[0] == results[1]


def run_project(root: Path, jobs: str, fork: str) -> dict[str, bytes]:
    """Run the pipeline of a project under DVC, and return its results by file."""
    command = [sys.executable, "-m", "pipeline.cli", "run", "--jobs", jobs, *SMALL]
    done = subprocess.run(command, cwd=root, env=os.environ | {"CONVOY_FORK": fork}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # DVC adds to .gitignore in the order in which the stages end.
    files = [file for stage in ("train", "evaluate") for file in sorted((root / "artifacts" / stage).rglob("[!.]*.*"))]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}
