"""Signals: they end a command with all its processes, one line and the right exit status."""

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from convoy.core import config
from pipeline.dvc_process import is_alive, run_dvc
from pipeline.signals import ENDING
from small_project import ROOT, make_project

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
PROCESSES = sorted(
    (f"pipeline.{file.stem}",)
    for file in (ROOT / "pipeline").glob("*.py")
    if '__name__ == "__main__"' in file.read_text() and file.stem not in ("__main__", "cli", "fork_server")
)
COMMANDS = [("pipeline",)] + [
    ("pipeline.cli", *words.split())
    for words in (
        "run",
        "settings show",
        "settings adopt",
        "settings compose",
        "leaderboard",
        "ui",
        "predict a.png",
        "serve",
        "package server",
        "verify models:/a@b c",
        "rollback --reason because",
        "sync",
        "migrate",
        "find-lr lenet",
        "tune lenet",
        "retrain",
    )
]


def make_environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **more}


# A stage, and what libraries do to the exception that ends it

SWALLOWED = {
    "nothing": "time.sleep(60)",
    "a destructor": """
        class Slow:
            def __del__(self):
                time.sleep(60)

        slow = Slow()
        del slow
    """,
    "the callback of a weak reference": """
        class Object: ...

        gone = Object()
        reference = weakref.ref(gone, lambda _: time.sleep(60))
        del gone
    """,
    "destructors one after the other": """
        class Slow:
            def __del__(self):
                time.sleep(5)

        for _ in range(9):
            Slow()
    """,
    "a library that catches all": """
        try:
            time.sleep(60)
        except BaseException:
            pass
    """,
    "a library that catches all again and again": """
        while True:
            try:
                time.sleep(60)
            except BaseException:
                pass
    """,
    "a thread that does not end": """
        threading.Thread(target=time.sleep, args=[60]).start()
        time.sleep(60)
    """,
    "what is done at exit": """
        atexit.register(time.sleep, 60)
        time.sleep(60)
    """,
    "a cleanup that takes its time": """
        try:
            time.sleep(60)
        finally:
            time.sleep(1)
            print("cleaned", flush=True)
    """,
}


@pytest.mark.parametrize("swallow", SWALLOWED)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_stage_ends_whatever_swallows_the_exception(swallow: str, number: signal.Signals, tmp_path: Path) -> None:
    root = make_project(tmp_path)
    code = "import atexit, threading, time, weakref\nfrom pipeline.stage import main\ndef work(stage):\n"
    code += "    (stage.scratch / 'half').touch()\n    print('at work', flush=True)\n"
    code += textwrap.indent(textwrap.dedent(SWALLOWED[swallow]), "    ")
    code += "\n    time.sleep(0.2)\n    print('went on', flush=True)\n    time.sleep(60)\nmain('fetch', work)"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, env=make_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as stage:
        assert stage.stdout
        assert stage.stdout.readline() == b"at work\n"
        time.sleep(0.05)
        stage.send_signal(number)
        said, complaint = stage.communicate(timeout=20)
    assert stage.returncode == STATUS[number]
    assert complaint.decode() == f"convoy: stopped by {number.name}; run the same command again to resume\n"
    if "catches all" not in swallow:
        assert b"went on" not in said
    assert (b"cleaned" in said) == ("cleanup" in swallow)
    assert not (root / "artifacts/fetch").exists()


def test_signal_while_an_extension_module_loads_does_not_abort(tmp_path: Path) -> None:
    root = make_project(tmp_path)
    code = textwrap.dedent("""
        import os, signal, sys
        from pipeline.stage import main

        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "matplotlib.ft2font":
                    sys.setprofile(interrupt)

        def interrupt(frame, event, argument):
            # Python code that the C++ code of the module calls to define its constants
            if event == "call" and frame.f_code.co_qualname.startswith("Enum"):
                sys.setprofile(None)
                print("at work", flush=True)
                os.kill(os.getpid(), signal.SIGTERM)

        def work(stage):
            sys.meta_path.insert(0, Finder())
            import matplotlib
            print("went on", flush=True)

        main("fetch", work)
    """)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=make_environment(), capture_output=True, text=True
    )
    assert done.stdout == "at work\n"
    assert done.stderr == "convoy: stopped by SIGTERM; run the same command again to resume\n"
    assert done.returncode == STATUS[signal.SIGTERM]


# Every command, from its first import on


@pytest.fixture
def interrupting_path(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH: Python then sends itself a signal when it is about to import the module of AT."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        textwrap.dedent("""
            import os, sys

            class Finder:
                def find_spec(self, name, path=None, target=None):
                    if name == os.environ["AT"] and sys.orig_argv[1:3] == ["-m", os.environ["COMMAND"]]:
                        os.kill(os.getpid(), int(os.environ["NUMBER"]))

            sys.meta_path.insert(0, Finder())
        """)
    )
    return tmp_path / "site"


def run_interrupted(
    root: Path, site: Path, command: str, at: str, number: int, *arguments: str
) -> subprocess.CompletedProcess:
    """Run a command, with the signal at the import of a module."""
    path = f"{site}{os.pathsep}{ROOT}"
    return subprocess.run(
        [sys.executable, "-m", command, *arguments],
        cwd=root,
        env=make_environment(PYTHONPATH=path, AT=at, COMMAND=command, NUMBER=str(int(number))),
        capture_output=True,
        text=True,
    )


def assert_one_line(done: subprocess.CompletedProcess, number: signal.Signals) -> None:
    assert done.stderr == f"convoy: stopped by {number.name}; run the same command again to resume\n"
    assert done.returncode == STATUS[number]


@pytest.mark.parametrize("command", PROCESSES + COMMANDS, ids=" ".join)
def test_every_command_ends_in_one_line_from_its_first_import_on(
    command: tuple[str, ...], interrupting_path: Path
) -> None:
    module, *arguments = " ".join(command).split()
    number = ENDING[len(command[-1]) % len(ENDING)]
    serves = arguments and arguments[0] in ("predict", "serve", "package")  # which read no settings
    at = "pipeline.model_choice" if serves else "convoy.core.config"
    assert_one_line(run_interrupted(ROOT, interrupting_path, module, at, number, *arguments), number)


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_composing_that_is_ended_leaves_params_as_they_were(
    number: signal.Signals, interrupting_path: Path, tmp_path: Path
) -> None:
    root = make_project(tmp_path / "project")
    (root / ".git").mkdir()
    before = (root / "params.yaml").read_bytes()
    assert_one_line(
        run_interrupted(
            root, interrupting_path, "pipeline.cli", "convoy.training.init_weights", number, "settings", "compose"
        ),
        number,
    )
    assert (root / "params.yaml").read_bytes() == before


def test_interrupted_summary_is_reported(interrupting_path: Path, tmp_path: Path) -> None:
    root = make_project(tmp_path / "project")
    done = run_interrupted(
        root, interrupting_path, "pipeline.cli", "convoy.reporting.report", signal.SIGINT, "leaderboard"
    )
    assert_one_line(done, signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_signal_that_is_to_be_ignored_is_ignored(number: signal.Signals) -> None:
    code = (
        f"import signal; signal.signal({int(number)}, signal.SIG_IGN)\nfrom pipeline import signals\nsignals.install()"
    )
    code += f"\nimport os; os.kill(os.getpid(), {int(number)})\nprint('went on')"
    done = subprocess.run([sys.executable, "-c", code], env=make_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


# The main command, while DVC is at work


def start_dvc(tmp_path: Path, script: str, code: str = "") -> subprocess.Popen:
    """A process that runs `run_dvc()` with a shell script in the place of DVC, and exits with its status."""
    file = tmp_path / "dvc"
    file.write_text(f"#!/bin/sh\n{textwrap.dedent(script)}\n")
    file.chmod(0o755)
    code = (
        "import os, signal, subprocess, sys; from pipeline import signals; from pipeline.dvc_process import run_dvc\n"
        + (f"signals.install(); sys.executable = {str(file)!r}\n" + (textwrap.dedent(code) or "sys.exit(run_dvc())"))
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=make_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_main_command_waits_for_a_stage_that_outlives_dvc(number: signal.Signals, tmp_path: Path) -> None:
    script = """
        sh -c "trap 'sleep 1; touch saved; exit 143' TERM; echo ready; while :; do sleep 0.05; done" &
        wait
    """
    with start_dvc(tmp_path, script) as running:
        assert running.stdout
        assert running.stdout.readline() == "ready\n"
        time.sleep(0.1)
        running.send_signal(number)
        _, said = running.communicate(timeout=20)
    assert running.returncode == STATUS[number]
    assert (tmp_path / "saved").exists()
    assert said.startswith(f"convoy: {number.name}: stopping the running stage; run the same command again to resume\n")


def test_stage_ends_if_dvc_alone_is_killed(tmp_path: Path) -> None:
    script = """
        sh -c "trap 'touch saved; exit 143' TERM; echo ready; while :; do sleep 0.05; done" &
        sleep 0.5
        kill -KILL $$
    """
    with start_dvc(tmp_path, script) as running:
        running.communicate(timeout=20)
    assert running.returncode == 137
    assert (tmp_path / "saved").exists()


def test_signal_before_dvc_starts_ends_the_command(tmp_path: Path) -> None:
    code = """
        class Slow(subprocess.Popen):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                os.kill(os.getpid(), signal.SIGTERM)

        subprocess.Popen = Slow
        sys.exit(run_dvc())
    """
    with start_dvc(tmp_path, "sleep 60", code) as running:
        _, said = running.communicate(timeout=20)
    assert running.returncode == 143
    assert said.count("\n") == 1


@pytest.mark.parametrize("number", ENDING, ids=lambda number: number.name)
def test_signal_between_dvc_runs_is_one_line(number: signal.Signals, tmp_path: Path) -> None:
    code = f"status = run_dvc('update'); os.kill(os.getpid(), {int(number)}); run_dvc('repro')"
    with start_dvc(tmp_path, "echo $3", code) as running:
        printed, said = running.communicate(timeout=20)
    assert printed == "update\n"
    assert_one_line(subprocess.CompletedProcess([], running.returncode, "", said), number)


def test_no_handler_outlives_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in ENDING]
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert run_dvc("repro") == 1
    assert [signal.getsignal(number) for number in ENDING] == before


def test_zombie_process_is_not_waited_for() -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        assert is_alive(process.pid)
        process.kill()
        for _ in range(100):
            if psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.01)
        assert not is_alive(process.pid)


# A whole run


@pytest.mark.slow
def test_run_ended_by_a_random_signal_is_completed_by_the_next(tmp_path: Path) -> None:
    root = make_project(tmp_path / "project")
    for folder in ("pipeline", "src"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".dvcignore", root)
    settings = root / "conf/config.yaml"
    text = settings.read_text().replace("[lenet, alexnet, vgg, googlenet, resnet]", "[lenet]")
    text = text.replace("max_epochs: 16", "max_epochs: 3").replace("min_accuracy: 0.9", "min_accuracy: 0.0")
    settings.write_text(text.replace("min_test_images: 300", "min_test_images: 1"))
    config.compose(root)
    for command in (["init", "--no-scm", "--quiet"], ["add", "--quiet", "data"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], cwd=root, env=make_environment(), check=True)
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(root, undisturbed)
    begun = time.monotonic()
    wait_for_success(undisturbed)
    takes = time.monotonic() - begun

    moments = random.Random(0)
    for number in range(6):
        with start_process(root) as running:
            time.sleep(0.2 + takes * moments.random())
            running.send_signal(ended_by := ENDING[number % len(ENDING)])
            _, said = running.communicate(timeout=60)
        # A busy machine may not have started Python yet; then the signal itself ends the process.
        assert running.returncode in (STATUS[ended_by], -ended_by, 0), said
        assert "Traceback" not in said or running.returncode == -ended_by
        assert "Exception ignored" not in said
        assert not [process for process in psutil.process_iter() if runs_in(process, root)]
    wait_for_success(root)
    for result in ("dvc.lock", "params.yaml", "artifacts/train/lenet/manifest.json"):
        assert (root / result).read_bytes() == (undisturbed / result).read_bytes()


def wait_for_success(root: Path) -> None:
    with start_process(root) as running:
        _, said = running.communicate()
    assert running.returncode == 0, said


def start_process(root: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "pipeline"]
    inherited = {name: value for name, value in make_environment().items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        command, cwd=root, env=inherited, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def runs_in(process: psutil.Process, root: Path) -> bool:
    """Whether it runs in the project."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()) == root
    except psutil.Error:
        return False
