"""Run the complete pipeline: compose and check the settings, run every stage, and print the leaderboard."""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from convoy.core import config
from convoy.core.artifact_names import LEADERBOARD
from convoy.core.config import Seed, validate
from convoy.core.disk import explain_full_disk
from convoy.core.errors import ConvoyError
from convoy.data import data_lock
from convoy.data.sources.base import DatasetConfig
from pipeline import data_folder, dvc_state, output_folders, settings, signals
from pipeline.errors import exit_on_error


def main() -> None:
    """Parse the command line and run the pipeline in the current folder."""
    parser = argparse.ArgumentParser(prog="python -m pipeline", description=__doc__)
    parser.add_argument("--pull", action="store_true", help="reuse results that the DVC remote has")
    parser.add_argument("--update", action="store_true", help="fetch the newest data first, as `dvc update` does")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--adopt", action="store_true", help="write into conf/ the settings that only params.yaml has")
    only.add_argument("--compose", action="store_true", help="discard the settings that only params.yaml has")
    parser.add_argument("--show", action="store_true", help="run nothing; show the leaderboard and the links")
    options = parser.parse_args()
    root = Path.cwd()
    with exit_on_error():
        try:
            status = run(root, options)
        except OSError as error:
            if full := explain_full_disk(error, root):
                raise ConvoyError(full) from error
            raise
    sys.exit(status)


def run(root: Path, options: argparse.Namespace) -> int:
    """Compose and check the settings, run every stage and print the leaderboard.

    Args:
        root: The project folder.
        options: The parsed command line.

    Returns:
        The exit status of DVC, or 0 if nothing was to be run.

    Raises:
        ConvoyError: If the settings, the data or DVC's files can't be used.
    """
    if options.show:
        print_summary(root, config.load(root / "params.yaml"))
        return 0
    check_repository(root)
    dvc_state.repair(root)
    print("composing conf/ into params.yaml")
    params = settings.compose(root, check, adopt=options.adopt, discard=options.compose)
    models = list(params["model"])
    output_folders.refuse_strays(root, models)
    output_folders.remove_unlisted(root, models)
    dvc_state.read_yaml(root / "data.dvc")
    data_lock.check_source(root, validate(DatasetConfig, params["dataset"], "dataset"))
    commands = data_folder.sync_commands(root, update=options.update)
    commands.append(["repro", *(["--pull"] if options.pull else [])])
    before = leaderboard_time(root)
    status = run_all(commands)
    # DVC exits with 255 on an internal error. If its own databases were damaged, they are removed here, and DVC
    # creates them again.
    if status == 255 and dvc_state.remove_damaged_databases(root):
        status = run_all(commands)
    if status == 0:
        print_summary(root, params)
        return status
    dvc_state.repair(root)
    # The register stage may write the leaderboard before it fails.
    if leaderboard_time(root) not in (None, before):
        show_leaderboard(root)
    return status


def check(params: dict[str, Any]) -> None:
    """Check the composed settings before anything runs.

    Args:
        params: The sections of `params.yaml`.

    Raises:
        ConvoyError: If a key is unknown, missing, of the wrong type or out of range.
    """
    from convoy.data.ingest import FetchConfig
    from convoy.data.preprocessing import PreprocessConfig
    from convoy.evaluation.metrics import EvaluateConfig
    from convoy.promotion.config import RegisterConfig

    light = {
        "dataset": DatasetConfig,
        "fetch": FetchConfig,
        "seed": Seed,
        "preprocess": PreprocessConfig,
        "evaluate": EvaluateConfig,
        "register": RegisterConfig,
    }
    config.check_sections(params, [*light, "train", "trainer", "model"])
    for name, schema in light.items():
        validate(schema, params[name], name)

    # These modules import torch, which takes seconds, so they are imported after the checks that need no torch.
    from convoy import models
    from convoy.recipe import TrainConfig
    from convoy.training import init_weights
    from convoy.training.hardware import TrainerConfig

    validate(TrainConfig, params["train"], "train")
    validate(TrainerConfig, params["trainer"], "trainer")
    for name, values in params["model"].items():
        validate(models.schema(name), values, f"model.{name}")
        init_weights.check_init(name, values)


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


def run_all(commands: Sequence[Sequence[str]]) -> int:
    """Run DVC commands in order until one fails, and return the exit status of the last one that ran."""
    status = 0
    for command in commands:
        status = status or dvc(*command)
    return status


def dvc(*command: str) -> int:
    """Run DVC with the given arguments and return its exit status.

    A signal that would end this process is forwarded as SIGTERM to DVC and the running stage, so that a training can
    save its state. This process waits until all of them have ended.

    Returns:
        The exit status of DVC, or 128 + the signal number, as in a shell, if a signal ended the run.
    """
    received: list[int] = []
    running: subprocess.Popen | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        if not received:
            signals.write_line(f"{signal.Signals(number).name}: stopping the running stage; `make repro` resumes it")
        received.append(number)
        if running:
            terminate(running.pid)

    with signals.handled(forward):
        running = subprocess.Popen([sys.executable, "-m", "dvc", *command], start_new_session=True)
        # The signal arrived before DVC was started.
        if received:
            terminate(running.pid)
        status = running.wait()
        # DVC was killed by a signal that its stage may not have received.
        if status < 0:
            terminate(running.pid)
        while (received or status < 0) and is_alive(running.pid):
            time.sleep(0.05)
    if received:
        return 128 + received[0]
    return status if status >= 0 else 128 - status


def terminate(group: int) -> None:
    """Send SIGTERM to a process group if it still exists."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGTERM)


def is_alive(group: int) -> bool:
    """Return whether any process of a process group is still running.

    Zombies do not count: an ended process stays in its group as a zombie if no parent collects its exit status, as in
    many containers.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def leaderboard_time(root: Path) -> int | None:
    """Return the modification time of the leaderboard in nanoseconds, or None if there is no leaderboard."""
    file = root / "artifacts/register" / LEADERBOARD
    return file.stat().st_mtime_ns if file.exists() else None


def show_leaderboard(root: Path) -> None:
    """Print the leaderboard."""
    import pandas as pd

    from convoy.reporting import report

    try:
        table = pd.read_csv(root / "artifacts/register" / LEADERBOARD, dtype={"epoch": "Int64"})
    except FileNotFoundError:
        raise ConvoyError("there are no results yet: run `make repro`") from None
    report.print_table(table.reindex(columns=report.TERMINAL_COLUMNS), "Leaderboard, best in validation first")


def print_summary(root: Path, params: dict[str, Any]) -> None:
    """Print the leaderboard and the links to the MLflow views."""
    # These modules import MLflow, which takes two seconds.
    from convoy.tracking import ui_views
    from convoy.tracking.store import open_store

    show_leaderboard(root)
    with open_store(root, params["register"]["name"]) as store:
        leaderboard, curves = ui_views.save_views(store)
    print(f"Next: `make ui` shows the runs side by side:\n  leaderboard  {leaderboard}\n  curves       {curves}")


if __name__ == "__main__":
    main()
