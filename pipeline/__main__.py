"""The main job: compose and check the settings, run every stage, and show what came of it."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from convoy import config
from convoy.config import ConvoyError, Seed, typed
from convoy.disk import explain_full_disk
from pipeline import dvc_state

# what DVC and the stage at work are told where a signal reaches this process; SIGHUP comes of a terminal that is closed
TOLD = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM}


def main() -> None:
    """Parse the command line and run the pipeline in the current folder."""
    parser = argparse.ArgumentParser(prog="python -m pipeline", description=__doc__)
    parser.add_argument(
        "--pull", action="store_true", help="take results that the DVC remote has instead of making them"
    )
    parser.add_argument("--update", action="store_true", help="bring the newest data first, as `dvc update` does")
    parser.add_argument("--show", action="store_true", help="run nothing; show the leaderboard and the links")
    options = parser.parse_args()
    root = Path.cwd()
    try:
        if options.show:
            conclude(root, config.load(root / "params.yaml"))
            sys.exit()
        print("composing conf/ into params.yaml")
        params = config.compose(root, check=check)
        remove_unlisted(root, list(params["model"]))
        check_source(root, update=options.update)
        dvc_state.repair(root)
        status = run_stages(options)
        # by this status DVC says that it failed itself; where its own databases were damaged, they are new now
        if status == 255 and dvc_state.remove_damaged_databases(root):
            status = run_stages(options)
        if status == 0:
            conclude(root, params)
        else:
            dvc_state.repair(root)
    except ConvoyError as error:
        sys.exit(f"convoy: {error}")
    except OSError as error:
        if full := explain_full_disk(error, root):
            sys.exit(f"convoy: {full}")
        raise
    sys.exit(status)


def check(params: dict[str, Any]) -> None:
    """Raises ConvoyError where a key is unknown, missing, of a wrong type or out of range, before anything runs."""
    from convoy.datasets.intake import Fetch
    from convoy.datasets.source import Dataset
    from convoy.evaluation import Evaluate
    from convoy.preprocessing import Preprocess
    from convoy.promotion import Register

    light = {
        "dataset": Dataset,
        "fetch": Fetch,
        "seed": Seed,
        "preprocess": Preprocess,
        "evaluate": Evaluate,
        "register": Register,
    }
    config.check_sections(params, [*light, "train", "trainer", "model"])
    for name, schema in light.items():
        typed(schema, params[name], name)

    from convoy import models, transfer  # these import torch, which takes seconds
    from convoy.hardware import Trainer
    from convoy.recipe import Train

    typed(Train, params["train"], "train")
    typed(Trainer, params["trainer"], "trainer")
    for name, values in params["model"].items():
        typed(models.schema(name), values, f"model.{name}")
        transfer.check(name, values)


def check_source(root: Path, *, update: bool = False) -> None:
    """Raises ConvoyError for links in the folder that data.dvc names, as DVC would copy what they point to; and where
    there is nothing any more and DVC would look, as it would first take data/ away."""
    from convoy.datasets.folders import refuse_links

    described = dvc_state.read_yaml(root / "data.dvc")
    for source in described.get("deps", []):
        folder = root / source["path"]
        if "://" in source["path"] or "repo" in source:
            continue
        if folder.is_dir():
            refuse_links(folder)
        elif not folder.exists() and (update or not described.get("frozen")):
            raise ConvoyError(
                f"{source['path']} is not there, of which data.dvc says that the images come from: mend the path; or go"
                " on with data/ as it is (`dvc pull data.dvc` brings it), by `dvc freeze data.dvc` and `make repro`"
            )


def remove_unlisted(root: Path, names: list[str]) -> None:
    """Remove the results of architectures that are no longer on the list; DVC's cache still has them."""
    for folder in [*(root / "artifacts/train").glob("*"), *(root / "artifacts/evaluate").glob("*")]:
        if folder.is_dir() and folder.name not in names:
            print(f"removing {folder.relative_to(root)}: {folder.name} is not among the models in conf/config.yaml")
            shutil.rmtree(folder)


def run_stages(options: argparse.Namespace) -> int:
    """Bring the data and run every stage, as the options say; returns DVC's exit status."""
    status = dvc("update", "data.dvc") if options.update else 0
    return status or dvc("repro", *(["--pull"] if options.pull else []))


def dvc(*command: str) -> int:
    """Run DVC, and return its exit status. Signals reach it and the stage at work, as `TOLD` says."""
    running = subprocess.Popen([sys.executable, "-m", "dvc", *command], start_new_session=True)
    for number in TOLD:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` wants it
            signal.signal(number, lambda received, _: os.killpg(running.pid, TOLD[signal.Signals(received)]))
    status = running.wait()
    return status if status >= 0 else 128 - status  # as a shell says it of a process that a signal ended


def conclude(root: Path, params: dict[str, Any]) -> None:
    """Print the leaderboard, and what to type next."""
    import pandas as pd

    from convoy import report, tracking

    try:
        table = pd.read_csv(root / "artifacts/register/leaderboard.csv", dtype={"epoch": "Int64"})
    except FileNotFoundError:
        raise ConvoyError("there are no results yet: `make repro` makes them") from None
    report.print_table(table.reindex(columns=report.SHOWN), "Leaderboard, best in validation first")
    with tracking.store(root, params["register"]["name"]) as store:
        leaderboard, curves = tracking.save_views(store)
    print(f"Next: `make ui` shows the runs side by side:\n  leaderboard  {leaderboard}\n  curves       {curves}")


if __name__ == "__main__":
    main()
