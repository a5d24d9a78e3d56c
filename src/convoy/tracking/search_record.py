"""The contents of the MLflow runs of a search for settings: one for the search, and one for each trial below it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from convoy.tracking.run_record import FINGERPRINT_TAG, HistoryRow, RunRecord, describe_training
from convoy.training.record import TrainingRecord

# Tag by which MLflow shows a run below another.
PARENT_TAG = "mlflow.parentRunId"


def describe_search(
    record: TrainingRecord,
    fingerprint: str,
    ranges: Mapping[str, str],
    provenance: Mapping[str, str],
    note: str = "",
    metrics: Mapping[str, float] | None = None,
    files: Sequence[Path] = (),
) -> RunRecord:
    """Create the run of a search.

    Args:
        record: Training record with the present settings, without results.
        fingerprint: Fingerprint of the search.
        ranges: Where each setting may be, which become parameters named `search.<setting>`.
        provenance: Tags that are never overwritten.
        note: Result of the search, for people.
        metrics: Metrics of the best settings.
        files: Files to upload as artifacts.
    """
    run = describe_training(record, {}, provenance)
    title = f"search for settings of {record.architecture} on {record.data.name}"
    tags = {FINGERPRINT_TAG: fingerprint, "mlflow.note.content": f"{title}: {note}" if note else title}
    return dataclasses.replace(
        run,
        name=f"tune {record.architecture}",
        params={**run.params, **{f"search.{name}": text for name, text in ranges.items()}},
        tags={**run.tags, **tags},
        metrics=metrics or {},
        files=files,
    )


def describe_trial(
    record: TrainingRecord,
    fingerprint: str,
    name: str,
    parent: str,
    status: str,
    history: Sequence[HistoryRow],
    best: HistoryRow,
    provenance: Mapping[str, str],
) -> RunRecord:
    """Create the run of a trial that has ended.

    Args:
        record: Training record with the settings of the trial, without results.
        fingerprint: Fingerprint of the trial.
        name: Name of the run.
        parent: ID of the run of the search.
        status: FINISHED, KILLED for a trial that was pruned, or FAILED.
        history: Metrics of each epoch.
        best: Metrics of the best epoch; empty if there was none.
        provenance: Tags that are never overwritten.
    """
    run = describe_training(record, {}, provenance)
    return dataclasses.replace(
        run,
        name=name,
        tags={**run.tags, FINGERPRINT_TAG: fingerprint, PARENT_TAG: parent},
        metrics={f"kept/{key}": best[key] for key in ("val_accuracy", "val_loss", "epoch") if key in best},
        history=history,
        status=status,
    )
