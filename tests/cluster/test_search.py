"""A search by Ray Tune: its trials are in the study, with the notes of those that run without Ray."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from convoy.search.study import WORKER, Search, open_search

pytest.importorskip("ray", reason="Ray is not installed: make install-cluster")
from convoy.cluster import search as cluster_search
from convoy.cluster import trial

SPACE = {
    "lr": FloatDistribution(0.001, 0.1, log=True),
    "layers": IntDistribution(1, 3),
    "optimizer": CategoricalDistribution(["sgd", "adamw"]),
}
ROWS = [{"epoch": 1, "val_accuracy": 0.5}]


@pytest.fixture
def search(tmp_path: Path) -> Iterator[Search]:
    with open_search(tmp_path, "study", seed=1) as search:
        yield search


@pytest.fixture
def searcher(search: Search, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A searcher whose jobs are the values of the trials, and the trials that it has shown."""
    monkeypatch.setattr(cluster_search.ray, "put", lambda job: job)

    def note(asked: optuna.Trial, rows: list, failure: str) -> None:
        asked.set_user_attr("history", rows)
        asked.set_user_attr("failure", failure)

    shown: list[FrozenTrial] = []
    made = cluster_search.StudySearch(search, SPACE, dict, note, shown.append)  # type: ignore[arg-type]
    return made, shown


def test_trials_are_those_of_the_study(search: Search, searcher: Any) -> None:
    made, shown = searcher
    search.enqueue({"lr": 0.01, "layers": 2, "optimizer": "adamw"})
    config = made.suggest("first")
    assert config == {"job": {"lr": 0.01, "layers": 2, "optimizer": "adamw"}}
    (running,) = search.list_trials(TrialState.RUNNING)
    assert running.user_attrs[WORKER] == search.worker
    report = {trial.SCORE: 0.5, trial.ROWS: ROWS, trial.COMPLETE: True, trial.FAILURE: "", "training_iteration": 1}
    made.on_trial_complete("first", report)
    (ended,) = search.list_trials(TrialState.COMPLETE)
    assert (ended.value, ended.user_attrs["history"]) == (0.5, ROWS)
    assert [each.number for each in shown] == [0]
    assert shown[0].state == TrialState.COMPLETE


@pytest.mark.parametrize(
    "report",
    [
        {trial.SCORE: 0.1, trial.ROWS: ROWS, trial.COMPLETE: False, trial.FAILURE: ""},
        {trial.SCORE: 0.0, trial.ROWS: [], trial.COMPLETE: False, trial.FAILURE: "the loss is NaN"},
    ],
    ids=["ended by the scheduler", "diverged"],
)
def test_trial_that_ended_early_is_pruned_with_its_notes(report: dict, search: Search, searcher: Any) -> None:
    made, shown = searcher
    made.suggest("first")
    made.on_trial_complete("first", report)
    assert shown[0].state == TrialState.PRUNED
    assert shown[0].user_attrs["failure"] == report[trial.FAILURE]
    assert shown[0].user_attrs["history"] == report[trial.ROWS]
