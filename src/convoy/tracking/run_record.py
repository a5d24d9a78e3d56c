"""The contents of an MLflow run: parameters, tags, metrics and files of a training and its evaluation."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from convoy.training.record import DatasetVersion, TrainingRecord

# Tag of a run: the hash of the settings, data and code that define its training.
FINGERPRINT_TAG = "convoy.identity"
# The metrics of an epoch: "epoch", counted from 1, and those in the history, such as "val_loss".
HistoryRow = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A training run as shown in MLflow, with its evaluation once there is one."""

    name: str
    params: Mapping[str, object]  # by dotted name, one value each
    tags: Mapping[str, str]  # tags that are updated; includes FINGERPRINT_TAG
    provenance: Mapping[str, str]  # tags that are never overwritten: commit, who, why
    data: DatasetVersion
    history: Sequence[HistoryRow] = ()
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    files: Sequence[Path] = ()
    status: str = "RUNNING"  # RUNNING, FINISHED or FAILED


def describe_training(record: TrainingRecord, tags: Mapping[str, str], provenance: Mapping[str, str]) -> RunRecord:
    """Describe the MLflow run of a training that has started.

    Args:
        record: Training record, with everything known when training starts.
        tags: Additional tags, which are updated.
        provenance: Tags that are never overwritten.
    """
    settings, environment, data = record.settings, record.environment, record.data
    architecture = {name: value for name, value in settings.items() if name not in ("init", "recipe")}
    threads = f"{environment['threads']} thread{'s' * (environment['threads'] != 1)}"
    processes = f", {environment['processes']} processes" if environment["processes"] != 1 else ""
    versions = {name: environment[name] for name in ("python", "torch", "pytorch-lightning", "numpy")}
    return RunRecord(
        name=record.architecture,
        params={
            "model": record.architecture,
            **dict(flatten(architecture, "model")),
            "init": settings["init"],
            "dataset": data.name,
            "preprocess.size": record.dataset_info.size,
            "split.seed": data.split_seed,
            "train.seed": record.train.seed,
            "train.max_epochs": record.train.max_epochs,
            **dict(flatten(settings["recipe"], "recipe")),
        },
        tags={
            "mlflow.note.content": f"{record.architecture} on {data.name}",
            **tags,
            FINGERPRINT_TAG: record.fingerprint,
            "data": data_tag(record),
            "hardware": f"{environment['device']}, {environment['instructions']}, {threads}, "
            f"{environment['precision']}{processes}",
            "software": ", ".join(f"{name} {version}" for name, version in versions.items()),
        },
        provenance=provenance,
        data=data,
    )


def data_tag(record: TrainingRecord) -> str:
    """Return the value of the tag `data`, which names a version of the data."""
    return f"{record.data.name}@{record.data.digest}"


def describe_result(
    record: TrainingRecord,
    metrics: Mapping[str, float],
    history: Sequence[HistoryRow],
    tags: Mapping[str, str],
    provenance: Mapping[str, str],
    files: Sequence[Path],
    validation: Mapping[str, float],
) -> RunRecord:
    """Describe the MLflow run of a training that has ended.

    Args:
        record: Complete training record.
        metrics: Test metrics by name, logged as `test/<name>`.
        history: Metrics of each epoch.
        tags: Additional tags, which are updated.
        provenance: Tags that are never overwritten.
        files: Files to upload as artifacts.
        validation: Metrics on the validation images by name, logged as `validation/<name>`.
    """
    best, max_epochs, failure = record.best, record.train.max_epochs, record.failure
    weights = [file for file in files if file.suffix == ".safetensors"]
    note = ""
    if failure:
        note = f"failed in epoch {failure.epoch} of {max_epochs}, {failure.reason}"
    elif best:
        note = (
            f"{best.val_accuracy:.4f} in validation (epoch {best.epoch} of {max_epochs}), "
            f"{metrics['accuracy']:.4f} on test images"
        )
    run = describe_training(record, tags, provenance)
    return dataclasses.replace(
        run,
        tags={**run.tags, "mlflow.note.content": f"{run.tags['mlflow.note.content']}: {note}"},
        metrics={
            **({f"kept/{name}": getattr(best, name) for name in ("val_accuracy", "val_loss", "epoch")} if best else {}),
            **{f"test/{name}": value for name, value in metrics.items()},
            **{f"validation/{name}": value for name, value in validation.items()},
            "parameters": record.parameters,
            "multiply_adds": record.macs,
            **({"megabytes": sum(file.stat().st_size for file in weights) / 1e6} if weights else {}),
        },
        history=history,
        files=files,
        status="FAILED" if failure else "FINISHED",
    )


def flatten(value: object, name: str) -> Iterator[tuple[str, object]]:
    """Yield each number or text in nested settings under its dotted name, so that MLflow can filter and sort by it.

    For example, `{"widths": [6, 16]}` with the name "model" yields `model.widths.0` and `model.widths.1`.
    """
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from flatten(part, f"{name}.{key}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from flatten(part, f"{name}.{number}")
    else:
        # As in YAML, which the settings are written in.
        yield name, str(value).lower() if isinstance(value, bool) else value
