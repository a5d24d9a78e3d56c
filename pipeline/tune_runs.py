"""The runs of a search in MLflow, in an experiment of their own beside that of the training runs."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from convoy.core.errors import ConvoyError
from convoy.core.hashing import hash_json
from convoy.tracking import provenance, runs, search_record, ui_views
from convoy.tracking.run_record import RunRecord
from convoy.tracking.store import TrackingStore, open_store
from convoy.training.record import TrainingRecord
from pipeline.stage import Stage
from pipeline.trial import BEST, FAILURE, HISTORY

STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED"}


@dataclasses.dataclass(frozen=True)
class TrialRun:
    """A trial that has ended, and how it is shown."""

    name: str
    trial: FrozenTrial
    settings: Mapping[str, Any]  # of the architecture
    seed: int
    study: str


class SearchRuns:
    """Writer of the runs of a search: one for the search, and below it one for each trial, each exactly once.

    MLflow does not affect the search: if it fails, one line says so, and the next call of `write` completes the runs.

    Args:
        stage: The train stage of the architecture.
        record: Training record with the present settings, without results.
        study: Name of the study.
        ranges: Where each setting may be.
    """

    def __init__(self, stage: Stage, record: TrainingRecord, study: str, ranges: Mapping[str, str]) -> None:
        self.stage = stage
        self.record = record
        self.study = study
        self.ranges = ranges
        self.provenance = provenance.provenance_tags(stage.root) | {
            "why": "tuning",
            "mlflow.source.name": "pipeline/tune.py",
        }
        self.has_reported_outage = False

    def write(
        self,
        trials: Sequence[TrialRun],
        note: str = "",
        metrics: Mapping[str, float] | None = None,
        files: Sequence[Path] = (),
    ) -> str:
        """Write the runs of trials, and end the run of the search if there is a note.

        Args:
            trials: Trials that have ended.
            note: Result of the search, for people; empty while it runs.
            metrics: Metrics of the best settings.
            files: Files to upload to the run of the search.

        Returns:
            The URL of the view of all trials, "" if MLflow fails.
        """

        def write(store: TrackingStore) -> str:
            parent = self._find_parent(store)
            for each in trials:
                self._write_trial(store, each, parent)
            if note:
                search = dataclasses.replace(self._describe(note, metrics, files), status="FINISHED")
                runs.sync_run(store, search, hash_json([note, metrics]), _now_ms())
            return store.address + self._save_view(store)

        return self._use_store(write)

    def _describe(
        self, note: str = "", metrics: Mapping[str, float] | None = None, files: Sequence[Path] = ()
    ) -> RunRecord:
        return search_record.describe_search(
            self.record, hash_json([self.study]), self.ranges, self.provenance, note, metrics, files
        )

    def begin(self) -> None:
        """Show that the search runs, and that searches whose process is gone do not."""

        def begin(store: TrackingStore) -> str:
            runs.mark_killed_runs(store)
            return runs.start_run(store, self._describe(), runs.name_process(), _now_ms()) or ""

        self._use_store(begin)

    def _find_parent(self, store: TrackingStore) -> str:
        """Return the ID of the run of the search, which is created if it does not exist."""
        found = runs.find_run(store, hash_json([self.study]))
        if found is None:
            runs.start_run(store, self._describe(), runs.name_process(), _now_ms())
            found = runs.find_run(store, hash_json([self.study]))
        assert found
        return found.info.run_id

    def _use_store(self, work: Callable[[TrackingStore], str]) -> str:
        """Return what `work` returns for the open store, or "" after reporting, once, that MLflow fails."""
        try:
            with open_store(self.stage.project_root, f"{self.stage.params['register']['name']}-tuning") as store:
                return work(store)
        except ConvoyError as error:
            if not self.has_reported_outage:
                self.has_reported_outage = True
                print(f"convoy: {error}. The search goes on without MLflow", file=sys.stderr, flush=True)
            return ""

    def _write_trial(self, store: TrackingStore, each: TrialRun, parent: str) -> None:
        trial, fingerprint = each.trial, hash_json([each.study, each.trial.number])
        status = "FAILED" if FAILURE in trial.user_attrs else STATUS[trial.state]
        history, best = trial.user_attrs.get(HISTORY, []), trial.user_attrs.get(BEST, {})
        results = hash_json([status, history])
        found = runs.find_run(store, fingerprint)
        if found and runs.is_synced(found, status, results):
            return
        record = self.record.model_copy(
            update={"settings": each.settings, "train": dataclasses.replace(self.record.train, seed=each.seed)}
        )
        run = search_record.describe_trial(
            record, fingerprint, each.name, parent, status, history, best, self.provenance
        )
        begun, ended = (
            int(when.timestamp() * 1000) for when in (trial.datetime_start, trial.datetime_complete) if when
        )
        with runs.run_lock(store, fingerprint, timeout=60):
            runs.start_run(store, run, runs.name_process(), begun)
            runs.sync_run(store, run, results, ended)

    def _save_view(self, store: TrackingStore) -> str:
        columns = ["metrics.kept/val_accuracy", "metrics.kept/val_loss", "metrics.kept/epoch", "params.model"]
        columns += [f"params.{name}" for name in self.ranges if name.startswith("recipe.")]
        columns += ["params.train.seed", "tags.data"]
        return ui_views.save_table(
            store.client,
            store.experiment.experiment_id,
            "trials",
            columns,
            "metrics.kept/val_accuracy",
            is_ascending=False,
        )


def _now_ms() -> int:
    return int(time.time() * 1000)
