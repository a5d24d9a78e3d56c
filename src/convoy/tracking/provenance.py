"""Provenance of a run: its commit, packages, user and reason."""

import contextlib
import getpass
import os
import subprocess
from pathlib import Path

from convoy.core.hashing import sha256

# The paths that a commit must contain to make results reproducible.
CODE = ("src", "pipeline", "conf", "dvc.yaml", "requirements.lock")


def provenance_tags(root: Path) -> dict[str, str]:
    """Return the tags that describe where a run comes from: commit, packages, user and reason.

    The tags contain no secrets. Those without a value are left out.
    """
    lock, experiment, head = root / "requirements.lock", os.environ.get("DVC_EXP_NAME", ""), git_commit(root)
    scheduled = os.environ.get("GITHUB_EVENT_NAME") == "schedule"
    tags = {
        "commit": head,
        "lock": sha256(lock)[:12] if lock.exists() else "",
        "who": user(root),
        "why": "scheduled" if scheduled else "tuning" if experiment else "manual",
        "experiment": experiment,
        # The names that MLflow itself uses, for the columns User, Version and Source of its UI.
        "mlflow.user": user(root),
        "mlflow.source.git.commit": git(root, "rev-parse", "HEAD"),
        "mlflow.source.name": "pipeline/train.py",
        "mlflow.source.type": "LOCAL",
    }
    return {name: value for name, value in tags.items() if value}


def user(root: Path = Path()) -> str:
    """Return the user's name.

    The name is the first of these that is known: who started the workflow on GitHub, the user name in git, the account.
    """
    name = os.environ.get("GITHUB_ACTOR") or git(root, "config", "user.name")
    # The account may have no name, as in a container.
    with contextlib.suppress(OSError, KeyError):
        name = name or getpass.getuser()
    return name or "unknown"


def git_commit(root: Path = Path()) -> str:
    """Return the commit of the project.

    Args:
        root: Project folder.

    Returns:
        The first 12 digits of the commit, followed by " with changes" if code or settings differ from it. Empty if
        there is no commit.
    """
    head = git(root, "rev-parse", "--short=12", "HEAD")
    changes = git(root, "status", "--porcelain", "--", *CODE) if head else ""
    return f"{head} with changes" if changes else head


def git(root: Path, *command: str) -> str:
    """Return the output of a git command, or "" if git fails, as outside a repository."""
    try:
        result = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
