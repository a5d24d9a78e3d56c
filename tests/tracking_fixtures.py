"""A small project with its runs in MLflow, and helpers that read them."""

import contextlib
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from convoy.tracking.store import TrackingStore, open_store
from convoy.training.record import DatasetVersion
from pipeline.stage import Stage
from pipeline.sync_mlflow import find_result, sync_runs
from small_project import make_project, run_stages


def make_trained_project(root: Path, overrides: list[str], *, until: str = "evaluate") -> Path:
    """A project whose stages have run, with a database that has no run yet."""
    make_project(root, overrides)
    run_stages(root, until=until)
    with open_store(root, "convoy"):
        return root


@contextlib.contextmanager
def open_embedded_store(root: Path, name: str) -> Iterator[TrackingStore]:
    """The store of a project, whatever server the environment names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with open_store(root, name) as store:
            yield store


def copy_project(road: Path, root: Path) -> Path:
    """The project with its database, as if it had been made there."""
    shutil.copytree(road, root, ignore=shutil.ignore_patterns("mlartifacts"))
    place = (root / "mlartifacts/convoy").as_uri()
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        database.execute("update experiments set artifact_location = ? where name = 'convoy'", [place])
    return root


def make_client(root: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{root / 'mlflow.db'}")


def list_runs(root: Path, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
    """By their names."""
    asked = make_client(root)
    experiment = asked.get_experiment_by_name("convoy")
    found = asked.search_runs([experiment.experiment_id], run_view_type=view) if experiment else []
    return sorted(found, key=lambda run: run.info.run_name)


def read_curve(root: Path, run: Run, name: str) -> list[tuple[int, float]]:
    """Every point that there is, the older first."""
    points = make_client(root).get_metric_history(run.info.run_id, name)
    return sorted((point.step, point.value) for point in points)


def sync(root: Path) -> dict[str, str]:
    stage = Stage(root, "register")
    names = list(stage.section("model"))
    with open_store(root, "convoy") as store:
        results = {name: find_result(stage, name) for name in names}
        return sync_runs(store, root, names, results, stage.section("register")["selection_metric"])


def read_trained_files(root: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (root / "artifacts/train/lenet").iterdir()}


DIGITS = DatasetVersion(
    "digits", "a99769f9303d", "data.dvc", {"images": 1797, "train": 1132, "val": 302, "test": 363}, split_seed=1
)
