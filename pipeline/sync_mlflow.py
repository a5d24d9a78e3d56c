"""Sync of the results in artifacts/ to MLflow, so that every run is there completely and exactly once.

It completes runs that are missing in MLflow for any reason: a server that was down or stopped during an upload, a
deleted database, or results that DVC's cache restored on another machine. The register stage does the same. This
module is not a stage.
"""

import dataclasses
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from filelock import Timeout

from convoy.core.artifact_names import (
    DATA_CARD,
    HISTORY,
    INTERVALS,
    MANIFEST,
    PER_CLASS,
    PREDICTIONS,
    RECORD,
    WEIGHTS,
)
from convoy.core.config import SelectionMetric
from convoy.core.errors import ConvoyError, describe_error
from convoy.core.hashing import sha256
from convoy.core.yaml_parser import parse_yaml
from convoy.promotion.config import RegisterConfig
from convoy.promotion.ranking import ValidatedModel
from convoy.reporting import report
from convoy.tracking import provenance, run_record, runs, ui_views
from convoy.tracking.logged_run import DATA_LOCK, DVC_LOCK
from convoy.tracking.store import TrackingStore, open_store
from convoy.training.record import TrainingRecord
from pipeline.stage import Stage

LIVE_TIMEOUT_S = 40  # to wait for a process that still reports a training run


@dataclasses.dataclass(frozen=True)
class TrainedResult:
    """The complete outputs of the training of one architecture and of its evaluation."""

    trained: Path
    evaluated: Path
    report: tuple[Path, ...] = ()  # files of its report, which MLflow shows; () if there is no report

    def manifest_hash(self) -> str:
        """Return the sha256 of both manifests, which covers every file of the result."""
        manifests = [(folder / MANIFEST).read_bytes() for folder in (self.trained, self.evaluated)]
        return hashlib.sha256(b"".join(manifests)).hexdigest()

    def shown_hash(self) -> str:
        """Return the sha256 of everything that MLflow shows of the result, which includes its report."""
        if not self.report:
            return self.manifest_hash()
        checksums = [sha256(file) for file in self.report]
        return hashlib.sha256("".join([self.manifest_hash(), *checksums]).encode()).hexdigest()

    def record(self) -> TrainingRecord:
        """Load the training record."""
        return TrainingRecord.load(self.trained / RECORD)

    def test_metrics(self) -> dict[str, float]:
        """Load the test metrics; there are none if the training failed."""
        table = pd.read_csv(self.evaluated / INTERVALS)
        return dict(zip(table["metric"], table["value"], strict=True))


def sync_results(root: Path) -> None:
    """Sync the runs of the current results to MLflow, each completely and exactly once.

    A result that is missing or damaged is left out with a message.

    Args:
        root: The project folder.
    """
    stage = Stage(root, "register")
    results = {}
    for name in stage.section("model"):
        try:
            results[name] = find_result(stage, name)
        except ConvoyError as error:
            print(f"{name} is left out: {error}")
    params = stage.validate(RegisterConfig, "register")
    with open_store(stage.project_root, params.name) as store:
        sync_runs(store, root, list(stage.section("model")), results, params.selection_metric)
        table, curves = ui_views.save_views(store)
    print(f"MLflow shows {len(results)} runs:\n  leaderboard  {table}\n  curves       {curves}")


def find_result(stage: Stage, name: str) -> TrainedResult:
    """Return the result of an architecture.

    Raises:
        ConvoyError: If the result is missing or damaged, or the evaluation belongs to another training run.
    """
    report_files: tuple[Path, ...] = ()
    if (stage.root / "artifacts/report" / MANIFEST).exists():
        folder = stage.input("report")
        report_files = (*sorted((folder / name).glob("*")), folder / DATA_CARD)
    result = TrainedResult(stage.input(f"train/{name}"), stage.input(f"evaluate/{name}"), report_files)
    stages = _locked_stages(stage.root / "dvc.lock")
    trained = _hashes(stages, f"train@{name}", "outs").get(f"artifacts/train/{name}")
    evaluated = _hashes(stages, f"evaluate@{name}", "deps").get(f"artifacts/train/{name}")
    if trained != evaluated:
        raise ConvoyError("its evaluation belongs to an earlier training run: run `convoy run`")
    return result


def _locked_stages(file: Path) -> dict[str, Any]:
    """Return the stages of dvc.lock, or an empty dict if the file does not exist."""
    try:
        return (parse_yaml(file.read_text()) or {}).get("stages", {}) if file.exists() else {}
    # The file may hold the markers of a merge conflict.
    except (yaml.YAMLError, AttributeError) as error:
        raise ConvoyError(
            f"dvc.lock can't be read: resolve the merge conflict, and run `convoy run` ({describe_error(error)})"
        ) from None


def _hashes(stages: Mapping[str, Any], stage: str, kind: str) -> dict[str, str]:
    return {entry["path"]: entry.get("md5", "") for entry in stages.get(stage, {}).get(kind, [])}


def sync_runs(
    store: TrackingStore,
    root: Path,
    names: Sequence[str],
    results: Mapping[str, TrainedResult],
    metric: SelectionMetric,
) -> dict[str, str]:
    """Sync the runs of results to MLflow, each completely and exactly once.

    A run that already shows its result costs one query. Errors of MLflow are not caught; calling the function again
    completes the sync.

    Args:
        store: The open MLflow store.
        root: The project folder.
        names: All architectures in params.yaml.
        results: The results to sync, by architecture.
        metric: The metric that runs are ranked by.

    Returns:
        The run id of each architecture. A run that is still being trained and is not in MLflow yet is left out.
    """
    runs.mark_killed_runs(store)
    records = {name: result.record() for name, result in results.items()}
    common = {}
    if set(results) == set(names):
        fingerprints = sorted(record.fingerprint for record in records.values())
        common["reproduction"] = hashlib.sha256("".join(fingerprints).encode()).hexdigest()[:12]
    run_ids = {}
    for name in results:
        record, result, shown_hash = records[name], results[name], results[name].shown_hash()
        fingerprint, status = record.fingerprint, "FAILED" if record.failure else "FINISHED"
        tags = {**common, "mlflow.runColor": report.architecture_colour(name)}
        found = runs.find_run(store, fingerprint)
        if found and runs.is_synced(found, status, shown_hash):
            runs.set_tags(store, found, tags)
            run_ids[name] = found.info.run_id
            continue
        try:
            with (
                runs.run_lock(store, fingerprint, LIVE_TIMEOUT_S),
                tempfile.TemporaryDirectory(dir=store.scratch) as folder,
            ):
                run = build_run(record, result, metric, tags, provenance.provenance_tags(root), Path(folder))
                inputs = write_inputs(root, name, Path(folder))
                run = dataclasses.replace(run, files=[*run.files, *inputs])
                end_time = int((result.trained / MANIFEST).stat().st_mtime * 1000)
                run_ids[name] = runs.sync_run(store, run, shown_hash, end_time)
            print(f"{name}: its run is now complete in MLflow")
        except Timeout:
            print(f"{name} is being trained: its run is completed afterwards")
            if found:
                run_ids[name] = found.info.run_id
    if records:
        runs.rank_runs(store, run_record.data_tag(next(iter(records.values()))), metric)
    return run_ids


def build_run(
    record: TrainingRecord,
    result: TrainedResult,
    metric: SelectionMetric,
    tags: Mapping[str, str],
    origin: Mapping[str, str],
    scratch: Path,
) -> run_record.RunRecord:
    """Collect everything that the run of a result holds, writing plots and rounded tables into `scratch`."""
    trained, evaluated = result.trained, result.evaluated
    metrics, validation = result.test_metrics(), {}
    files = [trained / RECORD, trained / HISTORY, *result.report]
    files += [round_table(evaluated / name, scratch / name) for name in (PER_CLASS, INTERVALS)]
    if not record.failure:
        plot, title = scratch / "confusion.png", f"{record.architecture} on test images"
        predictions = pd.read_parquet(evaluated / PREDICTIONS, columns=["actual", "predicted"])
        report.draw_confusion(predictions, record.dataset_info.classes, title, plot)
        files += [trained / WEIGHTS, plot]
        metrics |= accuracy_interval(evaluated / INTERVALS)
        validation = ValidatedModel.load(record, evaluated).summarize(metric)
    history: list[Any] = pd.read_csv(trained / HISTORY).to_dict("records")
    return run_record.describe_result(record, metrics, history, tags, origin, files, validation)


def write_inputs(root: Path, name: str, scratch: Path) -> list[Path]:
    """Return files that tell from which images, settings and code a result was made, so that it can be made again.

    Args:
        root: The project folder.
        name: The architecture.
        scratch: The folder to write into.
    """
    stages = _locked_stages(root / "dvc.lock")
    own = ("fetch", "preprocess", "resize", f"train@{name}", f"evaluate@{name}")
    locked = {stage: stages[stage] for stage in own if stage in stages}
    (scratch / DVC_LOCK).write_text(yaml.safe_dump({"schema": "2.0", "stages": locked}, sort_keys=False))
    return [*([scratch / DVC_LOCK] if locked else []), *(file for file in [root / DATA_LOCK] if file.exists())]


def round_table(file: Path, target: Path) -> Path:
    """Write a table with four decimal places, as MLflow shows all digits, and return its new file."""
    # A class may be named NA or 007, so all but numbers with a decimal point stay as they are.
    table = pd.read_csv(file, dtype={"class": str}, keep_default_na=False)
    table.to_csv(target, index=False, float_format="%.4f")
    return target


def accuracy_interval(file: Path) -> dict[str, float]:
    """Return the bounds of the test accuracy as metrics, from a table of intervals."""
    row = pd.read_csv(file).query("metric == 'accuracy'")
    return {f"accuracy_{end}": value for end in ("low", "high") for value in row[end].tolist()}
