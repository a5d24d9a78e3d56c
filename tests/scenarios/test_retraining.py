"""`convoy retrain --push` in a repository with a git remote, a DVC remote and a forge, run after run."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from convoy.core import config
from pipeline.publication import LOCK_FILES
from repositories import init_git, run_git
from small_project import ROOT, draw_images, make_project

SMALL = {
    "[lenet, alexnet, vgg, googlenet, resnet]": "[lenet]",
    "max_epochs: 16": "max_epochs: 3",
    "min_accuracy: 0.9": "min_accuracy: 0.0",
    "min_test_images: 300": "min_test_images: 10",
    "min_images_per_class: 30": "min_images_per_class: 5",
}
# Accepts what is documented, and keeps the text of the pull request.
FORGE = """#!/bin/sh
case "$1 $2" in
    "pr list") [ "$3 $5" = "--head --json" ] || exit 2; cat {folder}/listed 2>/dev/null || echo "[]" ;;
    "pr create") [ "$3 $5 $7" = "--head --title --body-file" ] || exit 2; cp "$8" {folder}/body.md; echo opened ;;
    *) exit 2 ;;
esac
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A project of its own, cloned from a bare repository, with a folder as its DVC remote."""
    root = make_project(tmp_path / "project", ["model=[lenet]"])
    for folder in ("pipeline", "src"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".gitignore", root)
    settings = root / "conf/config.yaml"
    for old, new in SMALL.items():
        assert old in settings.read_text()
        settings.write_text(settings.read_text().replace(old, new, 1))
    config.compose(root)
    shutil.rmtree(root / "data")
    draw_images(root / "images", each=100)
    init_git(root)
    for command in (
        ["dvc", "init", "--quiet"],
        ["dvc", "import-url", "--quiet", "images", "data"],
        ["dvc", "freeze", "--quiet", "data.dvc"],
        ["dvc", "remote", "add", "--quiet", "--default", "store", str(tmp_path / "store")],
    ):
        subprocess.run([sys.executable, "-m", *command], cwd=root, check=True)
    run_git(root, "add", "--all")
    run_git(root, "commit", "--quiet", "--message", "Begin")
    run_git(tmp_path, "init", "--quiet", "--bare", "origin.git")
    run_git(root, "remote", "add", "origin", str(tmp_path / "origin.git"))
    run_git(root, "push", "--quiet", "origin", "main")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gh").write_text(FORGE.format(folder=tmp_path))
    (tmp_path / "bin/gh").chmod(0o755)
    return root


def retrain(root: Path, *options: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    path = f"{root.parent / 'bin'}{os.pathsep}{inherited['PATH']}"
    command = [sys.executable, "-m", "pipeline.cli", "retrain", "--push", *options]
    return subprocess.run(command, cwd=root, env=inherited | {"PATH": path}, capture_output=True, text=True)


def read_summary(root: Path) -> str:
    return (root / "artifacts/retrain/summary.md").read_text()


def merge(root: Path) -> None:
    """Merge the newest branch of a retraining, as a person would."""
    run_git(root, "fetch", "--quiet", "origin")
    found = subprocess.run(
        ["git", "for-each-ref", "--sort=-committerdate", "--format=%(refname)", "refs/remotes/origin/retrain-*"],
        cwd=root, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    # What the branch has is here already, and git does not overwrite files that it does not track.
    for name in LOCK_FILES:
        (root / name).unlink(missing_ok=True)
    run_git(root, "checkout", "--", ".")
    run_git(root, "merge", "--quiet", found[0])


@pytest.mark.slow
def test_retrainings_promote_skip_and_take_new_images(repository: Path) -> None:
    first = retrain(repository)
    assert first.returncode == 0, first.stdout + first.stderr
    assert read_summary(repository).startswith("# PROMOTE: retraining of convoy\n")
    assert (repository.parent / "body.md").read_text() == read_summary(repository)
    branch = subprocess.run(["git", "branch", "--show-current"], cwd=repository, capture_output=True, text=True)
    assert branch.stdout.strip() == "main"
    merge(repository)

    began = time.monotonic()
    second = retrain(repository)
    assert second.returncode == 4, second.stdout + second.stderr
    assert time.monotonic() - began < 60
    assert retrain(repository, "--exit-zero").returncode == 0
    assert not subprocess.run(["git", "status", "--porcelain"], cwd=repository, capture_output=True).stdout

    draw_images(repository / "more", each=10)
    for file in (repository / "more").rglob("*.png"):
        file.rename(repository / "images" / file.parent.name / f"new-{file.name}")
    shutil.rmtree(repository / "more")
    third = retrain(repository)
    assert third.returncode in (0, 3), third.stdout + third.stderr
    assert "images, +" in read_summary(repository)


@pytest.mark.slow
def test_second_retraining_at_the_same_time_ends_with_a_line(repository: Path) -> None:
    (repository / "artifacts/.scratch").mkdir(parents=True, exist_ok=True)
    with FileLock(repository / "artifacts/.scratch/retrain.lock"):
        done = retrain(repository)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "convoy: another retraining runs in this folder: wait for it, or end it\n"
