"""Every process imports the library of its own project, whatever environment starts it."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from repositories import init_git
from small_project import ROOT, make_project

LENET = Path("src/convoy/models/lenet.py")
WITHOUT_CACHES = shutil.ignore_patterns("__pycache__")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project with code of its own, while the environment's editable install is of the first."""
    root = make_project(tmp_path / "copy", ["model=[lenet]", "train.max_epochs=1", "trainer.threads=1"])
    for folder in ("pipeline", "src"):
        shutil.copytree(ROOT / folder, root / folder, ignore=WITHOUT_CACHES)
    return root


def run_command(root: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in the project, as a user's shell would."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=root, env=inherited | environment, capture_output=True, text=True)


def append_line(file: Path, line: str) -> None:
    file.write_text(f"{file.read_text()}\n{line}\n")


def test_stage_runs_the_library_of_its_own_project(project: Path) -> None:
    append_line(project / "src/convoy/data/sources/folder.py", "raise RuntimeError('the code of the copy')")
    done = run_command(project, sys.executable, "-m", "pipeline.fetch")
    assert done.returncode != 0
    assert "the code of the copy" in done.stderr


def test_decode_workers_run_the_library_of_their_project(project: Path) -> None:
    append_line(
        project / "src/convoy/data/image_io.py",
        "def to_grey_or_rgb(*_):\n    raise InvalidImageError('was decoded by the copy')",
    )
    done = run_command(project, sys.executable, "-m", "pipeline.fetch")
    assert "was decoded by the copy" in done.stdout + done.stderr


def test_every_command_uses_its_own_library(project: Path) -> None:
    commands = sorted(file.stem for file in (project / "pipeline").glob("[a-z]*.py"))
    lines = [f"import pipeline.{command}" for command in commands]
    lines.append("import convoy, pathlib; print(pathlib.Path(convoy.__file__).parents[2])")
    assert Path(run_command(project, sys.executable, "-c", "\n".join(lines)).stdout.strip()) == project


def test_missing_library_is_named(project: Path) -> None:
    shutil.rmtree(project / "src/convoy")
    done = run_command(project, sys.executable, "-m", "pipeline.fetch")
    assert done.returncode == 1
    assert f"this project's library is {project}/src/convoy" in done.stderr
    assert "Traceback" not in done.stderr


def test_stages_of_another_project_are_refused(project: Path) -> None:
    done = run_command(project, sys.executable, "-P", "-m", "pipeline.fetch", PYTHONPATH=str(ROOT))
    assert done.returncode == 1
    assert f"the stages of {ROOT} would run in {project}" in done.stderr


def test_stages_run_with_the_interpreter_of_the_command(project: Path, tmp_path: Path) -> None:
    for name in ("python", "python3"):
        (tmp_path / name).write_text("#!/bin/sh\necho another python; exit 9\n")
        (tmp_path / name).chmod(0o755)
    init_git(project)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert run_command(project, sys.executable, "-m", "dvc", "init", "--quiet").returncode == 0
    by_itself = run_command(project, sys.executable, "-m", "dvc", "repro", "fetch", PATH=path)
    assert "another python" in by_itself.stdout
    code = "from pipeline.dvc_process import run_dvc; raise SystemExit(run_dvc('repro', 'fetch'))"
    done = run_command(project, sys.executable, "-c", code, PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_interpreter_without_the_packages_is_named(project: Path) -> None:
    done = run_command(project, sys.executable, "-S", "-m", "pipeline.fetch")
    assert done.returncode == 1
    assert done.stderr.startswith(f"convoy: {sys.executable} lacks the packages of this project: run `make install`")
    assert "Traceback" not in done.stderr


@pytest.fixture
def repository(project: Path) -> Path:
    """The copy as a git and DVC repository of its own, its first results made."""
    shutil.copy(ROOT / ".gitignore", project)
    init_git(project)
    for command in (
        ("dvc", "init", "--quiet"),
        ("dvc", "config", "hydra.enabled", "false"),
        ("git", "add", "--all"),
        ("git", "add", "--force", "data"),
        ("git", "commit", "--quiet", "--message", "Begin"),
    ):
        assert run_command(project, *command).returncode == 0, command
    return project


def list_experiments(root: Path) -> pd.DataFrame:
    """The experiments of the project by their names, with state and metrics."""
    shown = run_command(root, "dvc", "exp", "show", "--csv")
    return pd.read_csv(io.StringIO(shown.stdout)).set_index("Experiment")


@pytest.mark.slow
def test_queued_experiment_runs_the_code_that_it_records(repository: Path) -> None:
    source = (repository / LENET).read_text()

    append_line(repository / LENET, "raise RuntimeError('queued code')")
    assert run_command(repository, "dvc", "exp", "run", "--queue", "--name", "raises", "evaluate@lenet").returncode == 0
    # a network that gives every class of every image the same probability
    silent = source.replace("return self.output(", "return 0 * self.output(")
    assert silent != source
    (repository / LENET).write_text(silent)
    assert run_command(repository, "dvc", "exp", "run", "--queue", "--name", "silent", "evaluate@lenet").returncode == 0
    (repository / LENET).write_text(source)
    assert run_command(repository, "dvc", "exp", "run", "--queue", "--name", "plain", "evaluate@lenet").returncode == 0
    run_command(repository, "dvc", "exp", "run", "--run-all")

    found = list_experiments(repository)
    assert found["State"]["raises"] == "Failed"
    assert "queued code" in run_command(repository, "dvc", "queue", "logs", "raises").stdout
    assert float(found["test_log_loss"]["silent"]) == pytest.approx(np.log(3))
    assert float(found["test_log_loss"]["plain"]) != pytest.approx(np.log(3))
