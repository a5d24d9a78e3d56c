"""Runs as MLflow holds them: find one by its ID or its architecture, and read what its training and evaluation left."""

import dataclasses
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from mlflow.entities import Run as MlflowRun

from convoy.core.artifact_names import HISTORY, RECORD, WEIGHTS
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.core.yaml_parser import parse_yaml
from convoy.tracking.runs import checksums_of
from convoy.tracking.store import TrackingStore
from convoy.training.record import TrainingRecord

# A file of a run: the part of dvc.lock with the stages that it comes from.
DVC_LOCK = "dvc.lock"
# A file of a run: data.lock as its fetch stage left it.
DATA_LOCK = "data.lock"
# The files that tell what a run was made from and what came out.
RUN_FILES = (RECORD, HISTORY, WEIGHTS, DVC_LOCK, DATA_LOCK)
RUN_ID_PART = re.compile("[0-9a-f]{1,32}")
MAX_LISTED_RUNS = 5
# The status of a run without a result.
UNFINISHED = ("RUNNING", "SCHEDULED", "KILLED")


@dataclasses.dataclass(frozen=True)
class LoggedRun:
    """A run that has ended, with its files in a local folder."""

    run_id: str
    status: str  # FINISHED or FAILED
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    folder: Path
    initial_weights: Path | None = None  # the weights of another run that it started from

    @property
    def name(self) -> str:
        """Return the name for messages: the first digits of the ID, and the architecture."""
        return f"{self.run_id[:8]} ({self.record.architecture})"

    @property
    def commit(self) -> str:
        """Return the commit that the run was made at, followed by " with changes" if there were any; "" if unknown."""
        return self.tags.get("commit", "")

    @property
    def commit_id(self) -> str:
        """Return the commit that the run was made at, "" if unknown."""
        return self.commit.partition(" ")[0]

    @property
    def weights(self) -> Path | None:
        """Return the file of the weights, or None if the training failed."""
        return self.folder / WEIGHTS if (self.folder / WEIGHTS).exists() else None

    @cached_property
    def record(self) -> TrainingRecord:
        """Load the training record, converted from earlier formats."""
        return TrainingRecord.load(self.folder / RECORD)

    @cached_property
    def stages(self) -> Mapping[str, Any]:
        """Return the stages that made the run, as in dvc.lock; empty for a run that does not have them."""
        file = self.folder / DVC_LOCK
        return parse_yaml(file.read_text())["stages"] if file.exists() else {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Return the sections of params.yaml that the stages read, by dotted name; empty without `stages`."""
        sections: dict[str, Any] = {}
        for stage in self.stages.values():
            sections |= stage.get("params", {}).get("params.yaml", {})
        # The resize stage reads the settings of all architectures.
        sections.pop("model", None)
        return sections


def find(store: TrackingStore, name: str) -> MlflowRun:
    """Find a run that has ended.

    Args:
        store: Tracking store.
        name: An architecture, for its newest run in the experiment, or the ID of a run of any experiment, of which the
            first digits suffice.

    Raises:
        ConvoyError: If there is no such run, there are several, or it has not ended.
    """
    found = _find_newest(store, name) or _find_by_id(store, name)
    if found is None:
        ours = store.client.search_runs([store.experiment.experiment_id])
        names = sorted({run.info.run_name or "" for run in ours})
        known = f"the experiment {store.experiment.name} has runs of {', '.join(names)}" if names else "there are none"
        raise ConvoyError(
            f"MLflow has no run {name}: give the ID of a run, its first digits, or an architecture, which stands for "
            f"its newest run; {known}"
        )
    if found.info.status in UNFINISHED:
        raise ConvoyError(
            f"run {found.info.run_id} has no result, its status is {found.info.status}: wait until it has ended, or "
            "name another run"
        )
    return found


def _find_newest(store: TrackingStore, architecture: str) -> MlflowRun | None:
    if not re.fullmatch(r"[\w.-]+", architecture):
        return None
    # MLflow's filters have neither "in" nor "or" for a status.
    wanted = [f"attributes.run_name = '{architecture}'", *(f"attributes.status != '{each}'" for each in UNFINISHED)]
    runs = store.client.search_runs(
        [store.experiment.experiment_id],
        " and ".join(wanted),
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    return runs[0] if runs else None


def _find_by_id(store: TrackingStore, start: str) -> MlflowRun | None:
    if not RUN_ID_PART.fullmatch(start):
        return None
    # Runs of other data sets and the trials of searches are in other experiments.
    experiments = [each.experiment_id for each in store.client.search_experiments()]
    runs = store.client.search_runs(experiments, f"attributes.run_id LIKE '{start}%'", max_results=MAX_LISTED_RUNS)
    if len(runs) > 1:
        ids = ", ".join(f"{run.info.run_id[: len(start) + 4]} ({run.info.run_name})" for run in runs)
        raise ConvoyError(f"several runs begin with {start}, such as {ids}: give more digits")
    return runs[0] if runs else None


def download(store: TrackingStore, found: MlflowRun, folder: Path) -> LoggedRun:
    """Download the files of a run that tell what it was made from and what came out, and verify their checksums.

    Raises:
        ConvoyError: If the run is not that of a training, or a file was changed.
    """
    run_id, checksums = found.info.run_id, checksums_of(found)
    held = {file.path for file in store.client.list_artifacts(run_id)}
    if not {RECORD, HISTORY} <= held:
        raise ConvoyError(
            f"run {run_id} ({found.info.run_name}) has no {RECORD} and {HISTORY}: it is not the run of a training that "
            "`convoy run` has logged completely; `convoy sync` completes those of the current results"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(held.intersection(RUN_FILES)):
        store.client.download_artifacts(run_id, name, str(folder))
        # Runs of the first version have no checksums.
        if checksums.get(name, sha256(folder / name)) != sha256(folder / name):
            raise ConvoyError(f"{name} of run {run_id} is not what its training left: find out who changed it")
    return LoggedRun(run_id, found.info.status, found.data.tags, found.data.metrics, folder)
