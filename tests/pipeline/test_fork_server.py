"""The server that stages are forked from: a fork behaves as a process of its own would."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline import fork_server
from small_project import ROOT

# The first line lets `pipeline` hand the module over, as it does for a stage.
JOB = """
import os, sys, threading, time
print(os.getppid(), "SERVER" in os.environ, *sys.argv[1:], flush=True)
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a server that imports nothing beforehand."""
    folder = tmp_path_factory.mktemp("server")
    # Not from `pipeline`, which a fork has to import itself.
    code = "import sys; sys.path[0] = sys.argv[1]; import fork_server; fork_server.main(sys.argv[2], ())"
    command = [sys.executable, "-c", code, str(ROOT / "pipeline"), str(folder)]
    with (folder.parent / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=ENVIRONMENT | {"SERVER": "1"}
        )
    deadline = time.monotonic() + 60
    while not list(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    yield folder
    process.communicate()
    assert process.returncode == 0


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A module that a server can run; its first line of output tells where it runs."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/__init__.py").write_text("import pipeline\n")
    (tmp_path / "work/job.py").write_text(JOB)
    return tmp_path / "work/job.py"


def start(job: Path, server: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "work.job", *arguments],
        cwd=job.parents[1],
        env=ENVIRONMENT | {fork_server.VARIABLE: str(server)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_parent(process: subprocess.Popen) -> int:
    """The parent of the process that runs the job."""
    assert process.stdout
    return int(process.stdout.readline().split()[0])


def test_fork_has_arguments_and_streams_of_its_client(job: Path, server: Path) -> None:
    # A stream that was a file, which can be sought, is a pipe in the fork.
    code = "sys.stdout.reconfigure(errors='backslashreplace')\nprint(os.getcwd(), os.environ['OWN'], file=sys.stderr)"
    job.write_text(f"{JOB}{code}\nsys.exit(5)\n")
    process = start(job, server, "one", "two", OWN="mine")
    output, errors = process.communicate()
    parent, rest = output.split(maxsplit=1)
    assert int(parent) not in (os.getpid(), process.pid)
    assert rest == "False one two\n"
    assert errors == f"{job.parents[1]} mine\n"
    assert process.returncode == 5


def test_edited_code_is_run(job: Path, server: Path) -> None:
    for number in (1, 2):
        job.write_text(f"print({number} * 111)\n")
        os.utime(job, (number, number))
        assert start(job, server).communicate()[0] == f"{number * 111}\n"


def test_uncaught_error_has_a_traceback_and_status_1(job: Path, server: Path) -> None:
    job.write_text("raise ValueError('broken')\n")
    process = start(job, server)
    assert "ValueError: broken" in process.communicate()[1]
    assert process.returncode == 1


def test_message_and_handlers_of_an_exit_are_kept(job: Path, server: Path) -> None:
    job.write_text("import atexit, sys\natexit.register(print, 'cleaned up')\nsys.exit('convoy: no')\n")
    process = start(job, server)
    assert process.communicate() == ("cleaned up\n", "convoy: no\n")
    assert process.returncode == 1


def test_signal_reaches_the_fork(job: Path, server: Path) -> None:
    job.write_text(f"{JOB}time.sleep(60)\n")
    process = start(job, server)
    read_parent(process)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in process.communicate()[1]
    assert process.returncode == 143


def test_fork_is_killed_with_its_client(job: Path, server: Path) -> None:
    job.write_text(f"{JOB}time.sleep(60)\n")
    process = start(job, server)
    (worker,) = psutil.Process(read_parent(process)).children()
    process.kill()
    process.communicate()
    worker.wait(10)


def test_crash_of_a_fork_is_reported_and_harms_no_other(job: Path, server: Path) -> None:
    job.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    process = start(job, server)
    process.communicate()
    assert process.returncode == 128 + signal.SIGSEGV
    job.write_text("print('fine')\n")
    assert start(job, server).communicate()[0] == "fine\n"


def test_other_variables_for_imports_are_not_inherited(job: Path, server: Path) -> None:
    process = start(job, server, OMP_NUM_THREADS="7")
    assert read_parent(process) == os.getpid()
    process.communicate()


def test_stage_runs_by_itself_without_a_server(job: Path, tmp_path: Path) -> None:
    process = start(job, tmp_path / "none")
    assert read_parent(process) == os.getpid()
    process.communicate()
    assert process.returncode == 0
