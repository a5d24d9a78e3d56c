"""Settings and fixtures that all tests share: one thread, reproducible property tests, an empty MLflow database."""

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
os.environ["CONVOY_LIVE_AFTER"] = "0"
os.environ["CONVOY_LIVE"] = "0"  # no training is shown in MLflow while it lasts, but where a test asks for it

import hypothesis
import pytest

SLOW = [hypothesis.HealthCheck.too_slow]  # a busy machine is no fault
hypothesis.settings.register_profile(
    "convoy", deadline=None, derandomize=True, database=None, suppress_health_check=SLOW
)
hypothesis.settings.load_profile("convoy")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow's with nothing in it, which takes seconds to make and none to copy."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def embedded_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where nobody has named a server, and no experiment runs."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def fork_server() -> Iterator[multiprocessing.context.ForkServerContext]:
    """Processes that start with everything imported, so that a kill meets the work and not the imports."""
    context = multiprocessing.get_context("forkserver")
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # which has other modules ready: those that decode
    context.set_forkserver_preload(["pipeline.train", "convoy.models.lenet", "convoy.models.resnet"])
    forkserver.ensure_running()
    yield context
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
