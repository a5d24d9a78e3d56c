"""Studies: a killed process loses no trial, several share one, and the history decides what comes next."""

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from convoy.core.errors import ConvoyError
from convoy.search.space import parse_space
from convoy.search.study import MAX_RETRIES, Search, open_search

SPACE = parse_space({"lr": "log:0.001:1"}, {"lr": 0.1}, "lenet")


def run(search: Search, trials: int) -> list[float]:
    """Run trials whose value is their learning rate, and return all values that were tried."""

    def is_over() -> bool:
        return len(search.list_trials(TrialState.COMPLETE, TrialState.RUNNING)) >= trials

    search.run(SPACE, lambda trial: trial.params["lr"], is_over, lambda _: None)
    return [trial.params["lr"] for trial in search.list_trials(TrialState.COMPLETE)]


def begin(search: Search, error: type[BaseException]) -> None:
    """Begin a trial that raises an error."""

    def fail(trial: optuna.Trial) -> float:
        raise error

    with pytest.raises(error):
        search.run(SPACE, fail, lambda: False, lambda _: None)


def test_resumed_search_continues_as_if_never_stopped(tmp_path: Path) -> None:
    with open_search(tmp_path / "one", "a", 0) as search:
        whole = run(search, 8)
    for trials in (3, 8):
        with open_search(tmp_path / "two", "a", 0) as search:
            parts = run(search, trials)
    assert parts == whole
    assert len(set(whole)) == 8


def test_trial_of_a_killed_process_is_run_again(tmp_path: Path) -> None:
    with open_search(tmp_path, "a", 0) as search:
        # As a process that is killed leaves it: its lock is free, its trial running.
        trial = search._ask(SPACE)
        with open_search(tmp_path, "a", 0) as other:
            assert other.list_trials(TrialState.RUNNING), "the other process lives"
    with open_search(tmp_path, "a", 0) as search:
        assert run(search, 1) == [trial.params["lr"]]
        assert not search.list_trials(TrialState.RUNNING)


def test_stopped_trial_is_run_again(tmp_path: Path) -> None:
    with open_search(tmp_path, "a", 0) as search:
        for _ in range(2 + MAX_RETRIES):
            begin(search, SystemExit)
        failed = search.list_trials(TrialState.FAIL)
        assert {trial.params["lr"] for trial in failed} == set(run(search, 1))


def test_trial_that_kills_its_process_is_given_up(tmp_path: Path) -> None:
    tried = []
    for _ in range(2 + MAX_RETRIES):
        with open_search(tmp_path, "a", 0) as search:
            search.retry_killed()
            tried.append(search._ask(SPACE).params["lr"])
    assert len(set(tried[:-1])) == 1
    assert tried[-1] != tried[0]


def test_pruned_trial_is_not_run_again(tmp_path: Path) -> None:
    def prune(trial: optuna.Trial) -> float:
        raise optuna.TrialPruned

    with open_search(tmp_path, "a", 0) as search:
        search.run(SPACE, prune, lambda: bool(search.study.trials), lambda _: None)
        assert [trial.state for trial in search.study.trials] == [TrialState.PRUNED]


def test_enqueued_values_are_tried_once(tmp_path: Path) -> None:
    with open_search(tmp_path, "a", 0) as search:
        for _ in range(2):
            search.enqueue({"lr": 0.5})
        assert run(search, 2)[0] == 0.5
        assert run(search, 2).count(0.5) == 1


def test_enqueued_trial_that_was_stopped_is_not_enqueued_twice(tmp_path: Path) -> None:
    with open_search(tmp_path, "a", 0) as search:
        for _ in range(3):
            search.enqueue({"lr": 0.5})
            begin(search, SystemExit)
        search.enqueue({"lr": 0.5})
        assert run(search, 3).count(0.5) == 1


def test_damaged_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "studies.db").write_text("no database")
    with pytest.raises(ConvoyError, match=r"studies\.db can't be used .*: remove it"), open_search(tmp_path, "a", 0):
        pass
