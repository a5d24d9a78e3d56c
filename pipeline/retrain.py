"""One retraining: fetch the newest data, run what has changed, let the gate decide, and write a summary."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from convoy.core import config
from convoy.core.errors import ConvoyError
from convoy.data.data_lock import DataLock
from convoy.reporting.run_summary import describe_run
from pipeline import data_folder, dvc_files, settings
from pipeline.check_settings import check_settings
from pipeline.credentials import usable_credentials
from pipeline.dvc_process import run_all, run_dvc
from pipeline.publication import publish
from pipeline.run import check_repository, run

Decision = Literal["PROMOTE", "HOLD", "REJECT", "KEPT", "UNCHANGED", "WAIT", "FAILED"]
# The exit status of each decision. With `--exit-zero` only a failure differs from 0.
STATUS = {"PROMOTE": 0, "FAILED": 1, "HOLD": 3, "REJECT": 3, "KEPT": 3, "UNCHANGED": 4, "WAIT": 4}
SUMMARY = Path("artifacts/retrain/summary.md")
VERDICT = Path("artifacts/verdict.md")
RESULTS = Path("artifacts/report/summary.md")


def retrain(root: Path, *, push: bool = False, jobs: int | None = 1, exit_zero: bool = False, now: bool = False) -> int:
    """Retrain on the newest data, unless nothing has changed, and write a summary.

    Every step can be repeated: after an interruption the next call completes the work.

    Args:
        root: The project folder.
        push: Whether to push the results to the DVC remote, and the changed lock files as a branch.
        jobs: The largest number of architectures to train at a time; None for as many as the machine allows.
        exit_zero: Whether to return 0 unless the retraining failed.
        now: Whether to train on changed data whatever the triggers in the settings say.

    Returns:
        The exit status.

    Raises:
        ConvoyError: If another retraining runs, or this one fails for a reason that the user can remove.
    """
    lock = root / "artifacts/.scratch/retrain.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0), usable_credentials():
            decision = _retrain(root, push=push, jobs=jobs, now=now)
    except Timeout:
        raise ConvoyError("another retraining runs in this folder: wait for it, or end it") from None
    return 0 if exit_zero and decision != "FAILED" else STATUS[decision]


def _retrain(root: Path, *, push: bool, jobs: int | None, now: bool) -> Decision:
    began, before = time.monotonic(), _modified(root / VERDICT)
    decision, reason, error = _run(root, jobs, now)
    if decision == "KEPT":
        decision = read_decision(root, before)
    summary = summarize(root, decision, reason, (time.monotonic() - began) / 60)
    print(f"\n{summary.splitlines()[0].removeprefix('# ')}; the summary is {SUMMARY}")
    # What is trained already is pushed after a failure, too, so that another machine need not repeat it.
    if push and decision not in ("UNCHANGED", "WAIT"):
        publish(root, root / SUMMARY, has_result=decision != "FAILED")
    if error:
        raise error
    return decision


def _run(root: Path, jobs: int | None, now: bool) -> tuple[Decision, str, ConvoyError | None]:
    """Fetch the data and run the pipeline; return the decision as far as it is known, and why it failed."""
    try:
        check_repository(root)
        if status := run_all(data_folder.sync_commands(root, update=True)):
            return "FAILED", f"The data could not be fetched: DVC ended with status {status}.", None
        params = settings.compose(root, check_settings)
        if not (changed := dvc_files.list_changed_inputs(root)):
            print("nothing has changed since the last run: data, settings and code are those of dvc.lock")
            return "UNCHANGED", "Data, settings and code are those of the last run.", None
        print(f"changed: {', '.join(changed)}")
        is_due, reason = (True, "") if now else check_due(root, params, changed)
        if not is_due:
            return "WAIT", reason, None
        if status := run(root, pull=has_remote(root), jobs=jobs):
            return "FAILED", f"A stage failed with status {status}; its message is in the log.", None
    except ConvoyError as error:
        return "FAILED", f"{error}.", error
    return "KEPT", reason, None


def check_due(root: Path, params: Mapping[str, Any], changed: Mapping[str, Sequence[str]]) -> tuple[bool, str]:
    """Return whether what has changed is a reason to train, and why in Markdown.

    Changed settings or code always are. Data are if one of the triggers of the settings says so.

    Args:
        root: The project folder.
        params: The sections of params.yaml.
        changed: The changed stages, each with the inputs that differ.
    """
    is_only_data = all(name == "data" or name.startswith("artifacts/") for names in changed.values() for name in names)
    if not is_only_data or params["retrain"]["min_new_images"] == 1:
        return True, ""
    command = ["repro", "--pull", "preprocess"] if has_remote(root) else ["repro", "preprocess"]
    if run_dvc(*command):
        # The run reports the same error.
        return True, ""
    from pipeline.triggers import check_triggers

    picture = root / SUMMARY.with_name("unusual.png")
    picture.unlink(missing_ok=True)
    is_due, reasons = check_triggers(root, params, picture)
    print("; ".join(reasons))
    return is_due, "\n".join(f"* {reason}" for reason in reasons)


def read_decision(root: Path, before: int | None) -> Decision:
    """Return the decision of the gate in this retraining.

    Args:
        root: The project folder.
        before: When the verdict before this retraining was written.
    """
    if _modified(root / VERDICT) in (None, before):
        return "KEPT"
    title = (root / VERDICT).read_text().partition("\n")[0]
    return next((word for word in ("PROMOTE", "HOLD", "REJECT") if word in title.partition(":")[0]), "KEPT")  # type: ignore[return-value]


def summarize(root: Path, decision: Decision, reason: str, minutes: float) -> str:
    """Write the summary, also to the page of a job on GitHub, and return it."""
    params = config.load(root / "params.yaml")
    has_run = decision not in ("UNCHANGED", "WAIT", "FAILED")
    results = (root / RESULTS).read_text() if has_run and (root / RESULTS).exists() else ""
    verdict = (root / VERDICT).read_text() if decision in ("PROMOTE", "HOLD", "REJECT") else ""
    changes = list_data_changes(root, params["dataset"]["name"])
    text = describe_run(decision, params["register"]["name"], changes, results, verdict, reason, minutes)
    (root / SUMMARY).parent.mkdir(parents=True, exist_ok=True)
    (root / SUMMARY).write_text(text)
    if page := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(page).open("a") as file:
            file.write(text)
    return text


def list_data_changes(root: Path, name: str) -> list[str]:
    """Return what differs between the data of the last commit and the present data."""
    file = root / "data.lock"
    committed = subprocess.run(["git", "show", "HEAD:./data.lock"], cwd=root, capture_output=True)
    if not file.exists() or committed.stdout == file.read_bytes():
        return []
    return DataLock.load(file, name).describe_changes() or ["These are the first data."]


def has_remote(root: Path) -> bool:
    """Return whether DVC has a default remote, from which results may be pulled."""
    command = [sys.executable, "-m", "dvc", "config", "core.remote"]
    return subprocess.run(command, cwd=root, capture_output=True).returncode == 0


def _modified(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None
