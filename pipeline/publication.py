"""Publication of a retraining: its results on the DVC remote, and its lock files as a branch with a pull request.

Neither the branch nor the index of the working folder is changed, so that nothing is to be restored after a failure.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from convoy.core.errors import ConvoyError
from pipeline.dvc_process import run_dvc

LOCK_FILES = ("data.dvc", "data.lock", "dvc.lock", "params.yaml")
TITLE = "Retrain on the newest data"


def publish(root: Path, summary: Path, *, has_result: bool) -> None:
    """Push results to the DVC remote, and changed lock files as a branch with a pull request.

    The name of the branch is that of its content, so that the same retraining is pushed once.

    Args:
        root: The project folder.
        summary: The text of the pull request.
        has_result: Whether the retraining was completed, without which there is no branch.

    Raises:
        ConvoyError: If DVC or git can't push.
    """
    if status := run_dvc("push", "--run-cache"):
        raise ConvoyError(
            f"`dvc push --run-cache` ended with status {status}: configure a remote, as by `dvc remote add --default "
            "store s3://bucket/convoy`, or correct its credentials, and run this again"
        )
    files = [name for name in LOCK_FILES if (root / name).exists()]
    if not has_result or not run_git(root, "status", "--porcelain", "--", *files):
        return
    branch = "retrain-" + hashlib.sha256(b"".join((root / name).read_bytes() for name in files)).hexdigest()[:12]
    is_gitlab = bool(os.environ.get("GITLAB_CI"))
    if not run_git(root, "ls-remote", "--heads", "origin", branch):
        # GitLab opens a merge request with the push; its description is one line.
        options = ("merge_request.create", f"merge_request.title={TITLE}") if is_gitlab else ()
        flags = [f"--push-option={option}" for option in options]
        run_git(root, "push", *flags, "origin", f"{commit(root, files)}:refs/heads/{branch}")
        print(f"pushed the lock files as the branch {branch}")
    if not is_gitlab:
        open_pull_request(root, branch, summary)


def commit(root: Path, files: list[str]) -> str:
    """Commit files on top of HEAD without any effect on the working folder, and return the commit."""
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        run_git(root, "read-tree", "HEAD", environment=index)
        run_git(root, "add", "--", *files, environment=index)
        tree = run_git(root, "write-tree", environment=index)
    return run_git(root, "commit-tree", tree, "-p", "HEAD", "-m", TITLE)


def open_pull_request(root: Path, branch: str, summary: Path) -> None:
    """Open a pull request by GitHub's command line, or say that there is none."""
    if not shutil.which("gh"):
        print(f"open a pull request for the branch {branch}; its text is {summary.relative_to(root)}")
        return
    listed = subprocess.run(
        ["gh", "pr", "list", "--head", branch, "--json", "number"], cwd=root, capture_output=True, text=True
    )
    if listed.returncode == 0 and listed.stdout.strip() not in ("", "[]"):
        return
    command = ["gh", "pr", "create", "--head", branch, "--title", TITLE, "--body-file", str(summary)]
    opened = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if opened.returncode:
        raise ConvoyError(
            f"`gh pr create` failed ({opened.stderr.strip()}): the branch {branch} is pushed; give the job the "
            "permission pull-requests: write, and run this again"
        )
    print(opened.stdout.strip())


def run_git(root: Path, *command: str, environment: dict[str, str] | None = None) -> str:
    """Return the output of a git command.

    Raises:
        ConvoyError: If it fails, as without an identity or the right to push.
    """
    done = subprocess.run(
        ["git", *command], cwd=root, env=os.environ | (environment or {}), capture_output=True, text=True
    )
    if done.returncode:
        raise ConvoyError(
            f"`git {command[0]}` failed ({done.stderr.strip()}): the results are kept; correct this, and run it again"
        )
    return done.stdout.strip()
