"""The trials of a search on a Ray cluster, by Ray Tune."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import optuna
import ray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from convoy.cluster import trial
from convoy.cluster.connection import Patience
from convoy.cluster.training import Cluster
from convoy.search.space import Space
from convoy.search.study import WORKER, Search, make_sampler

# Times that a trial is run again whose node was lost.
MAX_FAILURES = 3


class StudySearch(OptunaSearch):
    """OptunaSearch whose trials are those of a `Search`, in its database and with the same notes.

    Args:
        search: The search.
        space: The search space.
        make_job: Returns the training for a trial, by its values.
        note: Called with each trial that has ended, its history, and why it failed, to note them.
        on_trial_end: Then called with the trial.
    """

    def __init__(
        self,
        search: Search,
        space: Space,
        make_job: Callable[[Mapping[str, Any]], trial.TrialJob],
        note: Callable[[optuna.Trial, list[dict[str, float]], str], None],
        on_trial_end: Callable[[FrozenTrial], None],
    ) -> None:
        self.search = search
        self.distributions = space
        self.make_job = make_job
        self.note = note
        self.on_trial_end = on_trial_end
        self.started: dict[str, optuna.Trial] = {}
        seed = search.seed + len(search.list_trials())
        super().__init__(
            self._ask,
            metric=trial.SCORE,
            mode="max",
            sampler=make_sampler(search.sampler, seed),
            study_name=search.study.study_name,
            storage=search.storage,
        )

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Return the training of the next trial."""
        config = super().suggest(trial_id)
        assert config
        self.started[trial_id] = config.pop("trial")
        return {"job": config["job"]}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Note how a trial ended. One that was ended early is pruned."""
        started, report = self.started.pop(trial_id), result or {}
        self.note(started, report.get(trial.ROWS, []), report.get(trial.FAILURE, ""))
        super().on_trial_complete(trial_id, result if report.get(trial.COMPLETE) else None, error)
        self.on_trial_end(self.search.study.trials[started.number])

    # Ray Tune saves the searcher to continue from there. The database of the study has all that it takes.

    def save(self, checkpoint_path: str) -> None:
        """Write nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def _ask(self, asked: Any) -> dict[str, Any]:
        asked.set_user_attr(WORKER, self.search.worker)
        values = {name: suggest(asked, name, each) for name, each in self.distributions.items()}
        return {"job": ray.put(self.make_job(values)), "trial": asked}


class CheckNodes(tune.Callback):
    """End the search if the cluster has had no room for a trial for too long.

    Args:
        patience: Time to wait for nodes.
    """

    def __init__(self, patience: Patience) -> None:
        self.patience = patience

    def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
        """Check the nodes."""
        self.patience.check("; the trials that have ended are kept, and the same command continues")


def run_trials(
    cluster: Cluster,
    searcher: StudySearch,
    *,
    count: int | None,
    jobs: int | None = None,
    seconds: float | None = None,
    epochs: int | None = None,
) -> None:
    """Run trials on the cluster, as many at a time as fit.

    Args:
        cluster: The cluster.
        searcher: Draws the trials.
        count: Number of trials. None for no limit.
        jobs: Largest number of trials at a time. None for no limit.
        seconds: Time after which none begins and those that run are ended. None for no limit.
        epochs: Epochs of a complete training; trials that are worse than others then end early (ASHA, Li et al. 2020),
            after a third of the epochs at the earliest. None lets none end early.
    """
    # The study has all that the loggers of Ray Tune would write.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    scheduler = None
    if epochs:
        scheduler = ASHAScheduler(
            time_attr=trial.EPOCH,
            metric=trial.SCORE,
            mode="max",
            max_t=epochs,
            grace_period=max(1, epochs // 3),
            reduction_factor=2,
        )
    tuner = tune.Tuner(
        tune.with_resources(trial.train, tune.PlacementGroupFactory([cluster.config.request])),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=-1 if count is None else count,
            max_concurrent_trials=jobs,
            time_budget_s=seconds,
        ),
        run_config=tune.RunConfig(
            name=searcher.search.study.study_name,
            storage_path=cluster.storage,
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[CheckNodes(cluster.patience)],
            verbose=0,
        ),
    )
    found = tuner.fit()
    found.filesystem.delete_dir(found.experiment_path)


def suggest(asked: Any, name: str, distribution: BaseDistribution) -> Any:
    """Let a trial of Optuna draw a value."""
    match distribution:
        case CategoricalDistribution():
            return asked.suggest_categorical(name, distribution.choices)
        case IntDistribution():
            return asked.suggest_int(name, distribution.low, distribution.high, log=distribution.log)
        case FloatDistribution():
            return asked.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
    raise AssertionError(distribution)
