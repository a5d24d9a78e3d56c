"""Tracking: what a run in MLflow tells about the data that its model saw."""

import json
from collections.abc import Iterator

import pandas as pd
import pytest

from convoy import tracking
from convoy.tracking import DataVersion, Run, Store

DIGITS = DataVersion("digits", "a99769f9303d", "data.dvc", {"images": 1797, "train": 1132, "val": 302, "test": 363})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store in a new folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with tracking.store(tmp_path_factory.mktemp("store"), "convoy") as store:
            yield store


def bring(store: Store, name: str, data: DataVersion) -> str:
    history = pd.DataFrame({"epoch": [0, 1], "val/accuracy": [0.5, 0.6]})
    run = Run(name, {"model": name}, {"test/accuracy": 0.6}, history, {tracking.IDENTITY: name}, [], data, failed=False)
    return tracking.create_run(store, run)


def test_a_run_names_the_data_that_its_model_saw(store: Store) -> None:
    (found,) = store.client.get_run(bring(store, "lenet", DIGITS)).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("digits", "a99769f9303d")
    assert json.loads(found.dataset.source) == {"uri": "data.dvc"}
    assert json.loads(found.dataset.profile) == {"images": 1797, "train": 1132, "val": 302, "test": 363}
    assert {tag.key: tag.value for tag in found.tags} == {"mlflow.data.context": "training"}


def test_runs_are_found_by_the_version_of_their_data(store: Store) -> None:
    newer = DataVersion("digits", "b1c2d3e4f5a6", "data.dvc", {"images": 1800})
    older, runs = bring(store, "lenet", DIGITS), {bring(store, name, newer) for name in ("lenet", "resnet")}
    found = store.client.search_runs([store.experiment.experiment_id], "dataset.digest = 'b1c2d3e4f5a6'")
    assert {run.info.run_id for run in found} == runs
    assert older not in runs
