"""Git and DVC repositories for tests."""

import contextlib
import subprocess
import warnings
from pathlib import Path

from dvc.cli import main


def run_dvc(root: Path, *command: str, status: int = 0) -> None:
    """Run a DVC command in this process, which is quicker, and check its exit status."""
    with contextlib.chdir(root), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main([*command]) == status


def run_git(root: Path, *command: str) -> None:
    subprocess.run(["git", *command], cwd=root, check=True, capture_output=True)


def init_git(root: Path) -> None:
    """Make a folder a git repository with an author of its own."""
    run_git(root, "init", "--quiet", "--initial-branch=main")
    run_git(root, "config", "user.name", "convoy")
    run_git(root, "config", "user.email", "convoy@localhost")
