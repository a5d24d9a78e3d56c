"""Garbage collection: remove old files of DVC's cache, abandoned checkpoints and model versions that nothing needs."""

import dataclasses
import shutil
import time
from pathlib import Path

from convoy.core import config
from convoy.core.disk import format_size
from convoy.core.errors import ConvoyError
from convoy.promotion.retention import creation_time, delete_version, find_unneeded_versions
from convoy.tracking.provenance import git
from convoy.tracking.store import open_store
from pipeline.dvc_process import run_dvc

CHECKPOINTS = Path("artifacts/.cache/checkpoints")
SECONDS_PER_DAY = 86400


@dataclasses.dataclass(frozen=True)
class Rules:
    """What garbage collection keeps."""

    days: int = 30  # checkpoints and model versions that are younger
    commits: int = 10  # data of this many commits of each branch
    versions: int = 10  # the newest model versions

    def describe(self) -> str:
        """Return the rules as text, one line each."""
        return f"""\
Kept are
  data         that the workspace, the last {self.commits} commits of a branch, a tag or an experiment names,
  checkpoints  of unfinished training runs that were written in the last {self.days} days,
  versions     of the registered model that have an alias, ever were the champion, are among the {self.versions} newest
               or not older than {self.days} days, or were evaluated on today's test images, which the gate counts,
  runs         with their curves and metrics.
Everything else is removed."""


def collect_garbage(root: Path, rules: Rules, delete: bool = False) -> None:
    """Print the rules and what they don't keep, and remove it if asked to.

    Args:
        root: The project folder.
        rules: What to keep.
        delete: Whether to remove what is found.

    Raises:
        ConvoyError: If the folder is no Git repository, or DVC or MLflow fail.
    """
    print(rules.describe(), flush=True)
    check_git(root)
    name = config.load(root / "params.yaml")["register"]["name"]
    checkpoints = find_checkpoints(root, rules.days)
    with open_store(root, name) as store:
        versions = find_unneeded_versions(store, name, days=rules.days, newest=rules.versions)
        print(f"\ndata: as `{' '.join(['dvc', *gc_command(rules, delete)])}` finds", flush=True)
        if run_dvc(*gc_command(rules, delete)):
            raise ConvoyError("dvc gc failed: see its message above; no checkpoint or model version was removed")
        for folder, size in checkpoints:
            print(f"checkpoint: {folder.relative_to(root)}, {format_size(size)}")
            if delete:
                shutil.rmtree(folder)
        for version in versions:
            print(f"version: {name} {version.version}, of {creation_time(version):%Y-%m-%d}")
            if delete:
                delete_version(root, store, version)
    counted = f"{len(checkpoints)} checkpoints and {len(versions)} model versions"
    print(f"Removed {counted}." if delete else f"Would remove {counted}. `convoy gc --delete` removes them.")


def check_git(root: Path) -> None:
    """Raise `ConvoyError` if the folder has no commit, whose data DVC would keep."""
    if not git(root, "rev-parse", "HEAD"):
        raise ConvoyError(f"{root} is no Git repository with a commit, so nobody knows which data is still needed")


def gc_command(rules: Rules, delete: bool) -> list[str]:
    """Return the arguments of `dvc` that remove unused files from its cache, or list them."""
    kept = ["--workspace", "--all-branches", "--num", str(rules.commits), "--all-tags", "--all-experiments"]
    return ["gc", *kept, "--force" if delete else "--dry"]


def find_checkpoints(root: Path, days: int) -> list[tuple[Path, int]]:
    """Return the folders of checkpoints that were not written to in the last days, and their sizes in bytes."""
    found = []
    for folder in sorted((root / CHECKPOINTS).glob("*/*")):
        files = [file.stat() for file in folder.rglob("*") if file.is_file()]
        newest = max((file.st_mtime for file in files), default=folder.stat().st_mtime)
        if newest < time.time() - days * SECONDS_PER_DAY:
            found.append((folder, sum(file.st_size for file in files)))
    return found
