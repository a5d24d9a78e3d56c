"""A search for settings: its trials, the comparison of the best with the present ones, and their results."""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import pandas as pd
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from convoy import models
from convoy.core.errors import ConvoyError
from convoy.core.hashing import hash_json
from convoy.search.comparison import Comparison, compare
from convoy.search.plots import draw_plots
from convoy.search.space import Space, change_settings, contains, flatten, list_bounds, round_values
from convoy.search.study import Search, make_pruner, open_search
from pipeline.stage import Stage
from pipeline.trial import BEST, FAILURE, HISTORY, TrialTrainer
from pipeline.tune import TuneOptions
from pipeline.tune_runs import SearchRuns, TrialRun

# Ray is an extra.
if TYPE_CHECKING:
    from convoy.cluster.training import Cluster
    from convoy.cluster.trial import TrialJob

# Trials if neither their number nor the time is limited.
DEFAULT_TRIALS = 30
# Seeds with which the best settings and the present ones are compared.
COMPARED_SEEDS = 3
PRESENT, TUNED = "present", "tuned"
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclasses.dataclass(frozen=True)
class TuningResult:
    """Result of a search."""

    metric: str  # such as "val_accuracy"
    trials: int
    pruned: int
    best: int  # number of the best trial
    best_epoch: Mapping[str, float]  # its metrics
    present: Mapping[str, Any]  # values of the searched settings
    tuned: Mapping[str, Any]
    seeds: Sequence[int]  # of the comparison
    scores: Mapping[str, Sequence[float]]  # of the present and of the tuned settings, for each seed
    comparison: Comparison | None  # None if the present settings were the best

    @property
    def is_better(self) -> bool:
        """Whether better settings were found."""
        return self.comparison is not None and self.comparison.is_better

    @property
    def conclusion(self) -> str:
        """What may be concluded, in one sentence."""
        if self.comparison is None:
            return "Nothing better was found: the present settings were the best of all trials"
        found = self.comparison.difference
        interval = f"{found.mean:+.4f}, 95% interval {found.low:+.4f} to {found.high:+.4f}"
        if self.is_better:
            return f"The tuned settings are better by {interval}"
        return f"Nothing better was found: the difference is {interval}, which is not above zero"

    def describe(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return dataclasses.asdict(self) | {"is_better": self.is_better, "conclusion": self.conclusion}


class Tuner:
    """Searches for settings of an architecture, together with other processes that do the same.

    Args:
        stage: The train stage of the architecture.
        space: The search space.
        ranges: The search space as text.
        options: Options of the search.
        cluster: The cluster on which the trials run; None for this machine.
    """

    def __init__(
        self,
        stage: Stage,
        space: Space,
        ranges: Mapping[str, str],
        options: TuneOptions,
        cluster: "Cluster | None" = None,
    ) -> None:
        self.settings: dict[str, Any] = stage.section(f"model.{stage.foreach_key}")
        for values in list_bounds(space):
            changed = change_settings(self.settings, values)
            models.check_settings(stage.foreach_key, changed)
        self.stage = stage
        self.space = space
        self.options = options
        self.cluster = cluster
        self.trainer = TrialTrainer(stage, options.jobs, cluster)
        self.params = self.trainer.params
        self.metric = f"val_{self.params.selection_metric}"
        self.seeds = [self.params.seed + number for number in range(1, COMPARED_SEEDS + 1)]
        # Other data, settings, code or ranges are another search.
        identity = hash_json([stage.fingerprint("search"), ranges, options.sampler])
        self.name = f"{stage.foreach_key}-{identity[:12]}"
        self.folder = stage.project_root / "artifacts/.cache/tuning"
        self.runs = SearchRuns(stage, self.trainer.describe(self.settings), self.name, ranges)
        self.ended: list[TrialRun] = []
        self.parent_process = os.getppid()
        self.trials = options.trials if options.trials or options.minutes else DEFAULT_TRIALS
        self.end = time.monotonic() + 60 * options.minutes if options.minutes else None

    def run(self) -> TuningResult:
        """Run the search and the comparison.

        Raises:
            ConvoyError: If no trial was completed.
        """
        is_live = os.environ.get("CONVOY_LIVE") != "0"
        if is_live and not self.options.is_worker:
            self.runs.begin()
        pruner = make_pruner(self.params.max_epochs)
        present = {name: flatten(self.settings)[name] for name in self.space}
        with open_search(self.folder, self.name, self.params.seed, self.options.sampler, pruner) as search:
            if contains(self.space, self.settings):
                search.enqueue(present)
            if self.cluster:
                self._run_on_cluster(
                    search,
                    self.space,
                    lambda values: self.trainer.share(
                        change_settings(self.settings, round_values(values)), self.params.seed
                    ),
                    lambda trial: self._show_trial(search, trial, is_live),
                )
            else:
                search.run(
                    self.space,
                    lambda trial: self._try_settings(search, trial),
                    lambda: self._is_over(search),
                    lambda trial: self._show_trial(search, trial, is_live),
                )
            trials = search.list_trials(*ENDED)
            if not search.list_trials(TrialState.COMPLETE):
                raise ConvoyError(
                    f"none of the {len(trials)} trials was completed, as the loss diverged in all of them: lower the "
                    "ranges, above all that of recipe.lr"
                )
            best = search.study.best_trial
        tuned = round_values(best.params)
        self.ended = [self._describe_run(f"trial {each.number}", each, self.params.seed) for each in trials]
        scores: dict[str, list[float]] = {}
        if tuned != present:
            with open_search(self.folder, f"{self.name}-seeds-{best.number}", self.params.seed, "random") as seeds:
                scores = self._compare(seeds, tuned, is_live)
        return TuningResult(
            metric=self.metric,
            trials=len(trials),
            pruned=sum(each.state == TrialState.PRUNED for each in trials),
            best=best.number,
            best_epoch=best.user_attrs[BEST],
            present=present,
            tuned=tuned,
            seeds=self.seeds,
            scores=scores,
            comparison=compare(scores[PRESENT], scores[TUNED]) if scores else None,
        )

    def write_results(self, result: TuningResult, folder: Path) -> str:
        """Write the plots, a table of the trials and the result, and complete the runs in MLflow.

        Returns:
            The URL of the trials in MLflow, "" if MLflow fails.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with open_search(self.folder, self.name, self.params.seed, self.options.sampler) as search:
            title = f"{self.stage.foreach_key}, {result.trials} trials"
            files = draw_plots(search.study, self.metric, title, folder)
        files += [folder / "trials.csv", folder / "result.json"]
        pd.DataFrame([self._table_row(each) for each in self.ended]).to_csv(folder / "trials.csv", index=False)
        (folder / "result.json").write_text(json.dumps(result.describe(), indent=2) + "\n")
        metrics = {f"kept/{name}": result.best_epoch[name] for name in ("val_accuracy", "val_loss", "epoch")}
        if compared := result.comparison:
            metrics |= {
                f"compared/{name}_{self.metric}": interval.mean
                for name, interval in ((PRESENT, compared.present), (TUNED, compared.tuned))
            }
        return self.runs.write(self.ended, result.conclusion, metrics, files)

    # Trials

    def _try_settings(self, search: Search, trial: optuna.Trial) -> float:
        """Train with the settings of a trial.

        A trial that diverges, or does not fit into the memory, is pruned: it is not to be run again.
        """
        # There is nothing to conclude from before the first is completed.
        deadline = self._deadline(search) if search.list_trials(TrialState.COMPLETE) else None
        try:
            score, is_complete = self.trainer.train(
                trial, change_settings(self.settings, round_values(trial.params)), self.params.seed, deadline
            )
        except ConvoyError as error:
            # If the first fails, so may all.
            if not search.list_trials(*ENDED):
                raise
            trial.set_user_attr(FAILURE, str(error))
            is_complete = False
        if not is_complete:
            raise optuna.TrialPruned
        return score

    def _is_over(self, search: Search) -> bool:
        begun = search.list_trials(*ENDED, TrialState.RUNNING)
        if self.trials is not None and len(begun) >= self.trials:
            return True
        # The process that started this one was killed.
        if self.options.is_worker and os.getppid() != self.parent_process:
            return True
        deadline = self._deadline(search)
        has_result = bool(search.list_trials(TrialState.COMPLETE))
        return deadline is not None and has_result and time.monotonic() >= deadline

    def _deadline(self, search: Search) -> float | None:
        """Return the time at which the search is to end, so that there is time for the comparison."""
        if self.end is None:
            return None
        durations = [each.duration.total_seconds() for each in search.list_trials(TrialState.COMPLETE) if each.duration]
        return self.end - max(durations, default=0.0) * math.ceil(2 * COMPARED_SEEDS / self.options.jobs)

    def _show_trial(self, search: Search, trial: FrozenTrial, is_live: bool) -> None:
        best = trial.user_attrs.get(BEST, {})
        values = "  ".join(f"{name} {value}" for name, value in round_values(trial.params).items())
        if reason := trial.user_attrs.get(FAILURE):
            score = f"failed: {reason}"
        elif trial.state == TrialState.PRUNED:
            score = f"{self.metric} {best.get(self.metric, 0.0):.4f}, ended early after epoch {trial.last_step or 0}"
        else:
            leader = search.study.best_trial
            score = f"{self.metric} {best[self.metric]:.4f}"
            score += "  (the best so far)" if leader.number == trial.number else f"  (best: {leader.value:.4f})"
        self._say(f"trial {trial.number}  {values}  {score}")
        if is_live:
            self.runs.write([self._describe_run(f"trial {trial.number}", trial, self.params.seed)])

    def _run_on_cluster(
        self,
        search: Search,
        space: Space,
        make_job: "Callable[[Mapping[str, Any]], TrialJob]",
        show: Callable[[FrozenTrial], None],
    ) -> None:
        """Run the trials that `Search.run` would run on this machine.

        Args:
            search: The search for settings, whose trials may end early, or the one over the seeds of the comparison.
            space: The search space.
            make_job: Returns the training for a trial, by its values.
            show: Called with each trial that has ended.
        """
        from convoy.cluster.search import StudySearch, run_trials

        assert self.cluster
        search.retry_killed()
        is_comparison = space is not self.space
        ended = len(search.list_trials(*ENDED))
        count: int | None = len(search.list_trials(TrialState.WAITING))
        if not is_comparison:
            count = max(0, self.trials - ended) if self.trials is not None else None
        if count == 0:
            return
        run_trials(
            self.cluster,
            StudySearch(search, space, make_job, self.trainer.note, show),
            count=count,
            jobs=self.options.jobs if self.options.jobs > 1 else None,
            seconds=max(1.0, self.end - time.monotonic()) if self.end and not is_comparison else None,
            epochs=None if is_comparison else self.params.max_epochs,
        )

    # The comparison

    def _compare(self, seeds: Search, tuned: Mapping[str, Any], is_live: bool) -> dict[str, list[float]]:
        """Train with the present and with the tuned settings, once for each seed.

        Returns:
            The score for each seed, of the present and of the tuned settings.
        """
        settings = {PRESENT: self.settings, TUNED: change_settings(self.settings, tuned)}
        space = {"settings": CategoricalDistribution([PRESENT, TUNED]), "seed": CategoricalDistribution(self.seeds)}
        for seed in self.seeds:
            for which in settings:
                seeds.enqueue({"settings": which, "seed": seed})

        def name(trial: FrozenTrial) -> str:
            return f"{trial.params['settings']} settings, seed {trial.params['seed']}"

        def describe(trial: FrozenTrial) -> TrialRun:
            run = self._describe_run(name(trial), trial, trial.params["seed"], seeds.study.study_name)
            return dataclasses.replace(run, settings=settings[trial.params["settings"]])

        def show(trial: FrozenTrial) -> None:
            failure = trial.user_attrs.get(FAILURE)
            self._say(f"{name(trial)}  {self.metric} {trial.value:.4f}" + (f", failed: {failure}" if failure else ""))
            if is_live:
                self.runs.write([describe(trial)])

        if self.cluster:
            self._run_on_cluster(
                seeds, space, lambda values: self.trainer.share(settings[values["settings"]], values["seed"]), show
            )
        else:
            seeds.run(
                space,
                lambda trial: self.trainer.train(trial, settings[trial.params["settings"]], trial.params["seed"])[0],
                lambda: not seeds.list_trials(TrialState.WAITING),
                show,
            )
        done = seeds.list_trials(TrialState.COMPLETE)
        self.ended += [describe(trial) for trial in done]
        found = {(trial.params["settings"], trial.params["seed"]): trial.value for trial in done}
        return {which: [found[which, seed] or 0.0 for seed in self.seeds] for which in settings}

    # Descriptions

    def _describe_run(self, name: str, trial: FrozenTrial, seed: int, study: str = "") -> TrialRun:
        values = {} if study else round_values(trial.params)
        return TrialRun(name, trial, change_settings(self.settings, values), seed, study or self.name)

    def _table_row(self, each: TrialRun) -> dict[str, Any]:
        values, best = flatten(each.settings), each.trial.user_attrs.get(BEST, {})
        return {
            "run": each.name,
            "state": each.trial.state.name.lower(),
            **{name: values[name] for name in self.space},
            "seed": each.seed,
            **{name: best.get(name) for name in dict.fromkeys((self.metric, "val_accuracy", "val_loss", "epoch"))},
            "epochs": len(each.trial.user_attrs.get(HISTORY, [])),
            "failure": each.trial.user_attrs.get(FAILURE),
            "seconds": round(each.trial.duration.total_seconds(), 1) if each.trial.duration else None,
        }

    def _say(self, text: str) -> None:
        # With --json, standard output is for the result alone.
        print(text, file=sys.stderr if self.options.as_json else sys.stdout, flush=True)
