"""One run of the complete pipeline: compose and check the settings, run every stage, and print the leaderboard."""

import contextlib
import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from convoy.core.config import validate
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.data import data_lock
from convoy.data.sources.base import DatasetConfig
from pipeline import data_folder, dvc_state, fork_server, output_folders, settings
from pipeline.check_settings import check_settings
from pipeline.dvc_process import run_all
from pipeline.job_plan import plan_jobs, select_changed
from pipeline.leaderboard import leaderboard_time, print_leaderboard, print_summary
from pipeline.side_by_side import run_jobs

# Checksum of the inputs of the last run that succeeded.
INPUTS_FILE = Path("artifacts/.scratch/inputs.sha256")


def run(
    root: Path, overrides: Sequence[str] = (), *, update: bool = False, pull: bool = False, jobs: int | None = 1
) -> int:
    """Compose and check the settings, run every stage and print the leaderboard.

    Args:
        root: The project folder.
        overrides: Hydra overrides of settings, which hold for this run.
        update: Whether to fetch the newest data first, as `dvc update` does.
        pull: Whether to reuse results that the DVC remote has.
        jobs: The largest number of architectures to train at a time; None for as many as the machine allows.

    Returns:
        The exit status of DVC, or 128 + the signal number if a signal ended the run.

    Raises:
        ConvoyError: If the settings, the data or DVC's files can't be used.
    """
    check_repository(root)
    dvc_state.repair(root)
    print("composing conf/ into params.yaml")
    params = settings.compose(root, check_settings, overrides)
    models = list(params["model"])
    output_folders.refuse_strays(root, models)
    output_folders.remove_unlisted(root, models)
    dvc_state.read_yaml(root / "data.dvc")
    data_lock.check_source(root, validate(DatasetConfig, params["dataset"], "dataset"))
    commands = data_folder.sync_commands(root, update=update)
    repro = ["repro", "--pull"] if pull else ["repro"]
    before = leaderboard_time(root)
    status = 0
    has_work = bool(commands) or checksum_inputs(root) != remembered_inputs(root)
    with fork_server.started() if has_work else contextlib.nullcontext():
        if has_work and jobs != 1 and len(models) > 1:
            status = run_side_by_side(root, params, [*commands, [*repro, "resize"]], jobs, pull=pull)
            commands = []
        commands.append(repro)
        status = status or run_all(commands)
    # DVC exits with 255 on an internal error. If its own databases were damaged, they are removed here, and DVC
    # creates them again.
    if status == 255 and dvc_state.remove_damaged_databases(root):
        status = run_all(commands)
    if status == 0:
        (root / INPUTS_FILE).write_text(checksum_inputs(root))
        print_summary(root)
        return status
    dvc_state.repair(root)
    # The register stage may write the leaderboard before it fails.
    if leaderboard_time(root) not in (None, before):
        print_leaderboard(root)
    return status


def run_side_by_side(
    root: Path, params: dict[str, Any], commands: Sequence[Sequence[str]], jobs: int | None, *, pull: bool
) -> int:
    """Prepare the images, then train and evaluate the architectures that are not up to date side by side.

    Args:
        root: The project folder.
        params: The sections of params.yaml.
        commands: The DVC commands that prepare the images.
        jobs: The largest number of architectures at a time; None for as many as the machine allows.
        pull: Whether to reuse results that the DVC remote has.

    Returns:
        The exit status of DVC, or 128 + the signal number if a signal ended the run.
    """
    # The plan imports torch, which takes as long as the preparation of the bundled images.
    with ThreadPoolExecutor(1) as executor:
        planned = executor.submit(plan_jobs, params)
        status = run_all(commands)
    if status:
        return status
    all_jobs, machine = planned.result()
    changed = select_changed(root, all_jobs)
    # `dvc repro` runs a single one.
    return run_jobs(changed, machine, jobs, pull=pull) if len(changed) > 1 else 0


def remembered_inputs(root: Path) -> str:
    """Return the checksum of the inputs of the last run that succeeded."""
    return (root / INPUTS_FILE).read_text() if (root / INPUTS_FILE).exists() else ""


def checksum_inputs(root: Path) -> str:
    """Return a checksum of the settings, the code and DVC's files.

    Only if it differs from that of the last run, it is worthwhile to ask DVC which stages changed.
    """
    names = ("params.yaml", "dvc.yaml", "dvc.lock", "data.dvc", "pipeline", "src")
    paths = [root / name for name in names]
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    checksums = [sha256(file) for file in files if file.exists()]
    return hashlib.sha256("".join(checksums).encode()).hexdigest()


def check_repository(root: Path) -> None:
    """Raise ConvoyError if DVC would find no git repository, as in an unpacked source archive."""
    if any((folder / ".git").exists() for folder in (root, *root.parents)):
        return
    settings = [file.read_text() for file in (root / ".dvc").glob("config*") if file.is_file()]
    if not any(re.search(r"^\s*no_scm\s*=\s*true", text, re.MULTILINE | re.IGNORECASE) for text in settings):
        raise ConvoyError(
            f"{root} is not a git repository, which DVC needs. Run `git init && git add --all && git commit "
            "--message 'Import convoy'` and try again, or use DVC without git: `dvc config core.no_scm true`"
        )
