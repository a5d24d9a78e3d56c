"""Retention of model versions: which ones nothing needs any more, and how they are deleted."""

import datetime
import shutil
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion

from convoy.promotion.champion import promotion_events
from convoy.registry.versions import TEST_IMAGES
from convoy.tracking.database import local_path
from convoy.tracking.store import TrackingStore

# Beginning of the source of a version, which the id of its logged model follows.
MODEL_SOURCE = "models:/"


def find_unneeded_versions(store: TrackingStore, name: str, *, days: int, newest: int) -> list[ModelVersion]:
    """Return the versions of a registered model that nothing needs, oldest first.

    Versions with an alias and former champions are needed, and so are those that were evaluated on the test images of
    the newest version, which the gate counts.

    Args:
        store: The MLflow store.
        name: The name of the registered model.
        days: Versions that are younger are needed.
        newest: This many of the newest versions are needed.
    """
    listed = store.client.search_model_versions(f"name = '{name}'")
    # A search returns no aliases.
    versions = sorted((store.client.get_model_version(name, each.version) for each in listed), key=_number)
    events = promotion_events(store, name)
    champions = {version for event in events for version in (event.before, event.after)}
    oldest = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)
    test_images = versions[-1].tags.get(TEST_IMAGES) if versions else None
    return [
        version
        for version in versions[: max(len(versions) - newest, 0)]
        if not version.aliases
        and _number(version) not in champions
        and creation_time(version) < oldest
        and version.tags.get(TEST_IMAGES) != test_images
    ]


def _number(version: ModelVersion) -> int:
    """Return the number of a version, which MLflow stores as text in some stores."""
    return int(version.version)


def creation_time(version: ModelVersion) -> datetime.datetime:
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
