"""Provenance: the commit, packages, person and reason that a run comes from."""

import contextlib
import getpass
import os
import subprocess
from pathlib import Path

from convoy.hashing import sha256

CODE = ("src", "pipeline", "conf", "dvc.yaml")  # what a commit must hold for results to be made again


def provenance_tags(root: Path) -> dict[str, str]:
    """The tags that say where a run comes from: commit, packages, who and why. None says a secret."""
    lock, experiment, head = root / "requirements.lock", os.environ.get("DVC_EXP_NAME", ""), git_commit(root)
    scheduled = os.environ.get("GITHUB_EVENT_NAME") == "schedule"
    tags = {
        "commit": head,
        "lock": sha256(lock)[:12] if lock.exists() else "",
        "who": user(root),
        "why": "scheduled" if scheduled else "tuning" if experiment else "manual",
        "experiment": experiment,
        "mlflow.user": user(root),  # as MLflow calls them, for its columns User, Version and Source
        "mlflow.source.git.commit": head.partition(" ")[0],
        "mlflow.source.name": "pipeline/train.py",
        "mlflow.source.type": "LOCAL",
    }
    return {name: value for name, value in tags.items() if value}


def user(root: Path = Path()) -> str:
    """The name of the person in git, who started the workflow on GitHub, or of the account."""
    name = os.environ.get("GITHUB_ACTOR") or _git(root, "config", "user.name")
    with contextlib.suppress(OSError, KeyError):  # an account without a name, as in a container
        name = name or getpass.getuser()
    return name or "unknown"


def git_commit(root: Path = Path()) -> str:
    """The commit of the project in `root`, and whether code or settings differ from it; "" where git knows none."""
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", *CODE) if head else ""
    return f"{head} with changes" if changes else head


def _git(root: Path, *command: str) -> str:
    try:
        asked = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""
