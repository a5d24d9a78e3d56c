"""One run of the complete pipeline: compose and check the settings, run every stage, and print the leaderboard."""

import re
from collections.abc import Sequence
from pathlib import Path

from convoy.core.config import validate
from convoy.core.errors import ConvoyError
from convoy.data import data_lock
from convoy.data.sources.base import DatasetConfig
from pipeline import data_folder, dvc_state, output_folders, settings
from pipeline.check_settings import check_settings
from pipeline.dvc_process import run_all
from pipeline.leaderboard import leaderboard_time, print_leaderboard, print_summary


def run(root: Path, overrides: Sequence[str] = (), *, update: bool = False, pull: bool = False) -> int:
    """Compose and check the settings, run every stage and print the leaderboard.

    Args:
        root: The project folder.
        overrides: Hydra overrides of settings, which hold for this run.
        update: Whether to fetch the newest data first, as `dvc update` does.
        pull: Whether to reuse results that the DVC remote has.

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
    commands.append(["repro", "--pull"] if pull else ["repro"])
    before = leaderboard_time(root)
    status = run_all(commands)
    # DVC exits with 255 on an internal error. If its own databases were damaged, they are removed here, and DVC
    # creates them again.
    if status == 255 and dvc_state.remove_damaged_databases(root):
        status = run_all(commands)
    if status == 0:
        print_summary(root)
        return status
    dvc_state.repair(root)
    # The register stage may write the leaderboard before it fails.
    if leaderboard_time(root) not in (None, before):
        print_leaderboard(root)
    return status


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
