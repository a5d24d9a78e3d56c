"""The environment in .venv: `make` keeps it while it works and recreates it otherwise."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from small_project import ROOT

AGAIN = "making it again"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the Makefile and an environment that `make install` has made, but for its packages."""
    root = tmp_path / "checkout"
    root.mkdir()
    for file in ("requirements.lock", "pyproject.toml", "Makefile"):
        shutil.copy(ROOT / file, root)
    venv.create(root / ".venv", symlinks=True)
    packages = next((root / ".venv").glob("lib/python*/site-packages"))
    (packages / "dvc.py").touch()
    (root / ".venv/ready").write_text(f"{root / '.venv'}\n")
    return root


def plan_install(root: Path, *arguments: str, **environment: str) -> str:
    """What `make install` would do."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VENV", "MAKEFLAGS")}
    command = ["make", "--dry-run", "install", *arguments]
    return subprocess.run(command, cwd=root, env=inherited | environment, capture_output=True, text=True).stdout


def test_unknown_variables_are_refused(checkout: Path) -> None:
    command = ["make", "--no-print-directory", "--dry-run", "repro", "model=resnet", "VENV=.venv"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "make knows no model, only PYTHON and VENV. Settings go to convoy: " in done.stderr


def make_other_python(folder: Path) -> Path:
    """An interpreter that says it is of another version."""
    file = folder / "python"
    file.write_text("#!/bin/sh\necho 3 99\n")
    file.chmod(0o755)
    return file


def test_working_environment_is_left_as_it_is(checkout: Path) -> None:
    assert "Nothing to be done" in plan_install(checkout)
    assert "Nothing to be done" in plan_install(checkout, f"PYTHON={sys.executable}")


@pytest.mark.parametrize("way", [Path.rename, shutil.copytree], ids=["moved", "copied"])
def test_moved_or_copied_environment_is_made_again(way, checkout: Path, tmp_path: Path) -> None:  # noqa: ANN001
    way(checkout, tmp_path / "elsewhere")
    assert AGAIN in plan_install(tmp_path / "elsewhere")


def test_environment_without_its_interpreter_is_made_again(checkout: Path) -> None:
    interpreter = checkout / ".venv/bin/python"
    interpreter.unlink()
    interpreter.symlink_to("/nowhere/python3")
    assert AGAIN in plan_install(checkout)


def test_environment_of_an_upgraded_interpreter_is_made_again(checkout: Path) -> None:
    packages = next((checkout / ".venv").glob("lib/python*"))
    packages.rename(packages.with_name("python3.1"))
    assert AGAIN in plan_install(checkout)


def test_environment_of_another_python_is_made_again(checkout: Path, tmp_path: Path) -> None:
    asked = make_other_python(tmp_path)
    assert AGAIN in plan_install(checkout, f"PYTHON={asked}")
    assert AGAIN in plan_install(checkout, PYTHON=str(asked))


def test_unsuitable_python_leaves_the_environment(checkout: Path, tmp_path: Path) -> None:
    asked = tmp_path / "python"
    asked.write_text("#!/bin/sh\nexit 1\n")
    asked.chmod(0o755)
    command = ["make", "install", f"PYTHON={asked}"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode != 0
    assert "convoy needs Python 3.11 to 3.13" in done.stdout
    assert (checkout / ".venv/bin/python").exists()
