"""The folder in which a run is repeated: a checkout of its commit, with its settings and images."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from filelock import FileLock, Timeout

from convoy.core.artifact_names import HISTORY, INTERVALS, RECORD, WEIGHTS
from convoy.core.errors import ConvoyError
from convoy.core.yaml_parser import parse_yaml
from convoy.tracking.logged_run import DATA_LOCK, LoggedRun
from convoy.tracking.provenance import git
from convoy.training.record import ISA_VARIABLES, TrainingRecord
from pipeline.dvc_files import share_cache
from pipeline.dvc_process import run_forwarding
from pipeline.replay_environment import find_python

FOLDER = Path("artifacts/.scratch/replay")
# Variables that would lead the stages to this project's code, its store and its results.
OWN_VARIABLES = re.compile("(MLFLOW|DVC|CONVOY)_|PYTHONPATH$")


@contextlib.contextmanager
def open_workspace(root: Path, run: LoggedRun) -> Iterator["Workspace"]:
    """Check out the commit of a run, which `check_commit` has accepted, with its settings and images.

    Everything is removed at the end.

    Args:
        root: The project folder.
        run: The run.

    Raises:
        ConvoyError: If the packages or the images can't be had, or another process repeats the run.
    """
    folder = root / FOLDER / run.run_id
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock", timeout=0):
            # A killed replay may have left its folder.
            remove(root, folder)
            try:
                project = check_out(root, run.commit_id, folder / "checkout")
                workspace = Workspace(project, run)
                workspace.python = find_python(root, project, run, folder / "environment")
                workspace.write_inputs()
                share_cache(root, project)
                pull_images(project, run.name)
                if (root / "downloads").is_dir():
                    (project / "downloads").symlink_to(root / "downloads")
                yield workspace
            finally:
                remove(root, folder)
    except Timeout:
        raise ConvoyError(f"another process repeats run {run.name}: wait for it, or end it") from None


def check_commit(root: Path, run: LoggedRun) -> None:
    """Raise ConvoyError if a run was made from uncommitted code, or its commit is not in this clone."""
    commit = run.commit_id
    if not commit:
        raise ConvoyError(f"run {run.name} has no tag `commit`, as it was made outside of git: its code is not known")
    if run.commit != commit:
        raise ConvoyError(
            f"run {run.name} was made from code that was not committed (its tag commit is {run.commit!r}), so nobody "
            "has that code: commit the changes, and train again"
        )
    if not git(root, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"):
        is_shallow = git(root, "rev-parse", "--is-shallow-repository") == "true"
        # A server hands out a commit that no branch has only by its complete name.
        complete = run.tags.get("mlflow.source.git.commit", commit)
        fetch = "git fetch --unshallow" if is_shallow else f"git fetch origin {complete}"
        raise ConvoyError(
            f"commit {commit} of run {run.name} is not in this clone: `{fetch}`, or `git fetch FOLDER` from the clone "
            "in which the run was made"
        )


def check_out(root: Path, commit: str, folder: Path) -> Path:
    """Check out a commit into a folder, and return the project folder in it."""
    # A hook of this repository might change the checkout, such as those of `dvc install`.
    command = ["git", "-c", f"core.hooksPath={os.devnull}", "worktree", "add", "--detach", str(folder), commit]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise ConvoyError(f"git can't check out commit {commit} into {folder}: {' '.join(done.stderr.split())}")
    # The project may be a folder of its repository.
    return folder / git(root, "rev-parse", "--show-prefix")


def remove(root: Path, folder: Path) -> None:
    """Remove a workspace, and git's note of its checkout."""
    shutil.rmtree(folder, ignore_errors=True)
    git(root, "worktree", "prune")


class Workspace:
    """A checkout of the commit of a run, in which its stages can be run again.

    Args:
        root: The project folder of the checkout.
        run: The run.
    """

    def __init__(self, root: Path, run: LoggedRun) -> None:
        self.root = root
        self.run = run
        self.python = Path(sys.executable)
        self.architecture = run.record.architecture
        self.params = restore_settings(parse_yaml((root / "params.yaml").read_text()), run)

    def write_inputs(self) -> None:
        """Write the settings of the run and the checksum of its images into the checkout."""
        self._write_yaml("params.yaml", self.params)
        # From what it records, DVC would restore the results of the run instead of repeating it.
        (self.root / "dvc.lock").unlink(missing_ok=True)
        imported = parse_yaml((self.root / "data.dvc").read_text())
        deps = self.run.stages.get("fetch", {}).get("deps", [])
        images = [dep for dep in deps if dep["path"] == "data"]
        # Frozen, as DVC would import again from a source that has changed.
        self._write_yaml("data.dvc", imported | {"outs": images or imported["outs"], "frozen": True})
        if (self.run.folder / DATA_LOCK).exists():
            shutil.copy(self.run.folder / DATA_LOCK, self.root)

    def _write_yaml(self, name: str, content: object) -> None:
        (self.root / name).write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    def set_seed(self, seed: int) -> None:
        """Change the seed of the training."""
        # In the first version, one seed was that of the splits and of the training.
        section = self.params["train"] if "seed" in self.params["train"] else self.params
        section["seed"] = seed
        self._write_yaml("params.yaml", self.params)

    def train(self) -> None:
        """Run the stages that are not up to date, from the images to the evaluation.

        Exits with the status of DVC if a stage fails, or with 128 + the signal number if a signal ended it.
        """
        recorded = self.run.record.environment
        variables = {name: str(recorded[name]) for name in ISA_VARIABLES if recorded.get(name)}
        kept = {name: value for name, value in os.environ.items() if not OWN_VARIABLES.match(name)}
        path = f"{self.python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        own = {"PATH": path, "PYTHONPATH": str(self.root / "src"), "CONVOY_LIVE": "0"}
        options = ["--no-run-cache", "--no-commit", f"evaluate@{self.architecture}"]
        # Standard output is for the result.
        command = [str(self.python), "-m", "dvc", "repro", *options]
        if status := run_forwarding(command, cwd=self.root, env=variables | kept | own, stdout=sys.stderr):
            sys.exit(status)

    @property
    def trained(self) -> Path:
        """Return the output folder of the training."""
        return self.root / "artifacts/train" / self.architecture

    @property
    def history(self) -> Path:
        """Return the file with the metrics of each epoch."""
        return self.trained / HISTORY

    @property
    def weights(self) -> Path | None:
        """Return the file of the weights, or None if the training failed."""
        return self.trained / WEIGHTS if (self.trained / WEIGHTS).exists() else None

    def record(self) -> TrainingRecord:
        """Load the record of the training."""
        return TrainingRecord.load(self.trained / RECORD)

    def test_metrics(self) -> dict[str, float]:
        """Load the test metrics; there are none if the training failed."""
        table = pd.read_csv(self.root / "artifacts/evaluate" / self.architecture / INTERVALS)
        return dict(zip(table["metric"], table["value"], strict=True))

    def changed_code(self) -> list[str]:
        """Return the files and packages that the training depends on and that are not those of the run."""
        stage = f"train@{self.architecture}"
        repeated = _code_checksums(parse_yaml((self.root / "dvc.lock").read_text())["stages"][stage])
        recorded = _code_checksums(self.run.stages.get(stage, {}))
        return [path for path in recorded if repeated.get(path) != recorded[path]]


def _code_checksums(stage: Mapping[str, Any]) -> dict[str, str]:
    return {dep["path"]: dep["md5"] for dep in stage.get("deps", []) if dep["path"].startswith(("pipeline/", "src/"))}


def restore_settings(params: Mapping[str, Any], run: LoggedRun) -> dict[str, Any]:
    """Return the settings of a run, as in params.yaml.

    `auto` is replaced by what it meant on the machine of the run, where this one can do the same.

    Args:
        params: The sections of params.yaml at the commit of the run, for what the run does not hold.
        run: The run.
    """
    # As it was written, since the names of the settings are those of the commit.
    record = json.loads((run.folder / RECORD).read_text())
    sections = {name: section for name, section in run.settings.items() if not name.startswith("model.")}
    restored = {**params, **sections, "train": record["train"], "model": {record["architecture"]: record["settings"]}}
    if "seed" in params:
        restored["seed"] = record["seed"]
    if "split" in params:
        restored["split"] = {**restored["split"], "seed": record["data"]["split_seed"]}
    trainer = {name: value for name, value in record["trainer"].items() if name in restored["trainer"]}
    if trainer["accelerator"] == "gpu":
        trainer["accelerator"] = "auto"
    restored["trainer"] = restored["trainer"] | trainer
    if run.initial_weights:
        restored["model"][record["architecture"]]["init"] = str(run.initial_weights)
    return restored


def pull_images(root: Path, run: str) -> None:
    """Put the images that data.dvc names into data/: from DVC's cache, its remote, or the unchanged source.

    Raises:
        ConvoyError: If they are in none of these.
    """
    recorded = parse_yaml((root / "data.dvc").read_text())
    (output,) = recorded["outs"]
    errors = ""
    for command in (["checkout", "--quiet"], ["pull", "--quiet"], ["update", "--quiet"]):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *command, "data.dvc"], cwd=root, capture_output=True, text=True
        )
        (found,) = parse_yaml((root / "data.dvc").read_text())["outs"]
        if done.returncode == 0 and (root / "data").exists() and found["md5"] == output["md5"]:
            return
        errors = errors or done.stderr
    source = " ".join(dep.get("path", "") for dep in recorded.get("deps", []))
    raise ConvoyError(
        f"the images of run {run} (data.dvc with md5 {output['md5']}) are neither in DVC's cache nor on its remote, "
        f"and {source or 'data/'} does not hold them any more: where they are, `dvc push data.dvc`; then here "
        f"`dvc remote add --default NAME URL` and `dvc pull data.dvc`"
    )
