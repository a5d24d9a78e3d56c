"""Garbage collection: remove old files of DVC's cache, abandoned checkpoints and model versions that nothing needs."""

import dataclasses
import datetime
import shutil
import subprocess
import time
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion

from convoy.core import config
from convoy.core.errors import ConvoyError
from convoy.promotion.champion import promotion_events
from convoy.registry.versions import TEST_IMAGES
from convoy.tracking.database import local_path
from convoy.tracking.store import TrackingStore, open_store
from pipeline.dvc_process import run_dvc

CHECKPOINTS = Path("artifacts/.cache/checkpoints")
# Beginning of the source of a version, which the id of its logged model follows.
MODEL_SOURCE = "models:/"
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
  checkpoints  of unfinished trainings that were written in the last {self.days} days,
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
        versions = find_versions(store, name, rules)
        print(f"\ndata: as `{' '.join(['dvc', *gc_command(rules, delete)])}` finds", flush=True)
        if run_dvc(*gc_command(rules, delete)):
            raise ConvoyError("dvc gc failed: see its message above; no checkpoint or model version was removed")
        for folder, size in checkpoints:
            print(f"checkpoint: {folder.relative_to(root)}, {size / 1e6:.1f} MB")
            if delete:
                shutil.rmtree(folder)
        for version in versions:
            print(f"version: {name} {version.version}, of {created(version):%Y-%m-%d}")
            if delete:
                delete_version(root, store, version)
    counted = f"{len(checkpoints)} checkpoints and {len(versions)} model versions"
    print(f"Removed {counted}." if delete else f"Would remove {counted}. `convoy gc --delete` removes them.")


def check_git(root: Path) -> None:
    """Raise `ConvoyError` if the folder has no commit, whose data DVC would keep."""
    command = ["git", "rev-parse", "--verify", "--quiet", "HEAD"]
    if subprocess.run(command, cwd=root, capture_output=True).returncode:
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


def find_versions(store: TrackingStore, name: str, rules: Rules) -> list[ModelVersion]:
    """Return the versions of a registered model that the rules don't keep, oldest first."""
    listed = store.client.search_model_versions(f"name = '{name}'")
    # A search returns no aliases.
    versions = sorted((store.client.get_model_version(name, each.version) for each in listed), key=number)
    events = promotion_events(store, name)
    champions = {version for event in events for version in (event.before, event.after)}
    oldest = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=rules.days)
    test_images = versions[-1].tags.get(TEST_IMAGES) if versions else None
    return [
        version
        for version in versions[: max(len(versions) - rules.versions, 0)]
        if not version.aliases
        and number(version) not in champions
        and created(version) < oldest
        and version.tags.get(TEST_IMAGES) != test_images
    ]


def number(version: ModelVersion) -> int:
    """Return the number of a version, which MLflow stores as text in some stores."""
    return int(version.version)


def created(version: ModelVersion) -> datetime.datetime:
    """Return when a version was created."""
    return datetime.datetime.fromtimestamp(version.creation_timestamp / 1000, datetime.UTC)


def delete_version(root: Path, store: TrackingStore, version: ModelVersion) -> None:
    """Delete a version of the registered model and its logged model.

    The files are removed at once from the embedded store; on a server, by its own `mlflow gc`.
    """
    store.client.delete_model_version(version.name, version.version)
    # The attribute `model_id` of a version is empty in MLflow's own stores.
    source = version.source or ""
    if source.startswith(MODEL_SOURCE):
        model_id = source.removeprefix(MODEL_SOURCE)
        folder = local_path(store.client.get_logged_model(model_id).artifact_location)
        store.client.delete_logged_model(model_id)
        if (root / "mlartifacts").resolve() in folder.resolve().parents:
            shutil.rmtree(folder, ignore_errors=True)
