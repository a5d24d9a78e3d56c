"""The register stage, which syncs all runs to MLflow and promotes the best model if it passes the gate."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

import convoy
from convoy import models
from convoy.core.artifact_names import (
    CALIBRATION,
    HISTORY,
    LEADERBOARD,
    METRICS,
    PER_CLASS,
    RECORD,
    TRAINING_HASHES,
    WEIGHTS,
)
from convoy.core.errors import ConvoyError
from convoy.evaluation import latency
from convoy.inference import onnx_export, predictor
from convoy.promotion import champion, ranking
from convoy.promotion.config import RegisterConfig
from convoy.registry import model_loader, versions
from convoy.reporting import report
from convoy.tracking import runs, ui_views
from convoy.tracking.store import TrackingStore, open_store
from convoy.training import hardware
from pipeline import verify
from pipeline.promote import Challenger, promote
from pipeline.stage import Stage, main
from pipeline.sync_mlflow import TrainedResult, find_result, sync_runs

PACKAGE = Path(convoy.__file__).parent


def register(stage: Stage) -> None:
    """Write the leaderboard, sync all runs to MLflow and compare the best model by validation with the champion."""
    params = stage.validate(RegisterConfig, "register")
    names = list(stage.section("model"))
    results = {name: find_result(stage, name) for name in names}
    records = {name: result.record() for name, result in results.items()}
    metrics = {name: json.loads((result.evaluated / METRICS).read_text()) for name, result in results.items()}
    best = {name: record.best for name, record in records.items() if record.best and not record.failure}
    ranked = [*ranking.rank(best), *(name for name in names if name not in best)]

    table = report.leaderboard({name: records[name] for name in ranked}, metrics)
    table.to_csv(stage.scratch / LEADERBOARD, index=False)
    trained = {name: result.trained for name, result in results.items()}
    evaluated = {name: result.evaluated for name, result in results.items()}
    concat_tables(trained, HISTORY).to_csv(stage.scratch / "curves.csv", index=False)
    concat_tables(evaluated, PER_CLASS).to_csv(stage.scratch / PER_CLASS, index=False)
    for name, record in records.items():
        if record.failure:
            print(f"{name} failed: {record.failure.reason}")
    # The comparison runs after the leaderboard is published, so that the leaderboard exists after a refusal, too.
    stage.on_published.append(lambda: compare(stage, params, {name: results[name] for name in ranked}, list(best)))


def compare(stage: Stage, params: RegisterConfig, results: dict[str, TrainedResult], trained: Sequence[str]) -> None:
    """Sync the runs of all results to MLflow and compare the first of them with the champion.

    Args:
        stage: The running register stage.
        params: The settings of the stage.
        results: The result of each architecture, in the order of the leaderboard.
        trained: The architectures whose training did not fail.

    Raises:
        ConvoyError: If all trainings failed, or the comparison is refused.
    """
    names, winner = list(stage.section("model")), next(iter(results))
    with open_store(stage.project_root, params.name) as store:
        run_ids = sync_runs(store, stage.root, names, dict(reversed(results.items())))
        ui_views.save_views(store)
        measure_latencies(store, {run_ids[name]: results[name] for name in trained if name in run_ids})
        if not trained:
            raise ConvoyError(f"the training of {', '.join(names)} failed: there is nothing to register")
        if experiment := os.environ.get("DVC_EXP_NAME"):
            print(f"{winner} is the best of experiment {experiment}; experiments never change the champion")
            return
        champion.complete_pending(store, params.name)
        version = find_or_register(store, params.name, results[winner], run_ids[winner], stage.input("preprocess"))
        compared = champion.current_version(store, params.name)
    if version == compared:
        print(f"{winner} stays the champion: models:/{params.name}@champion, version {compared}")
    else:
        promote(stage, params, Challenger(winner, version, results[winner], run_ids[winner]), compared)


def find_or_register(store: TrackingStore, name: str, result: TrainedResult, run: str, prepared: Path) -> int:
    """Return the version of the model `name` made from this result, registering it if it does not exist."""
    manifest_hash, record = result.manifest_hash(), result.record()
    if found := versions.find_version(store, name, manifest_hash):
        return int(found.version)
    files = {
        "record": result.trained / RECORD,
        "weights": result.trained / WEIGHTS,
        "calibration": result.evaluated / CALIBRATION,
        "training_hashes": prepared / TRAINING_HASHES,
    }
    with model_loader.temporary(str(result.trained), store.scratch) as scratch:
        version = versions.register(
            store,
            name=name,
            run_id=run,
            identity=manifest_hash,
            model=PACKAGE / "inference/pyfunc_model.py",
            files=files | export_onnx(record.architecture, files, result, prepared, scratch),
            code=PACKAGE,
            step=record.best.epoch if record.best else 0,
        )
    return int(version.version)


def export_onnx(
    name: str, files: Mapping[str, Path], result: TrainedResult, prepared: Path, scratch: Path
) -> dict[str, Path]:
    """Export a model to an ONNX file in `scratch` and compare its predictions with the evaluation.

    Args:
        name: The name of the architecture, for messages.
        files: The files of the registered model.
        result: The result that the files belong to.
        prepared: The output folder of the preprocess stage.
        scratch: The folder to write into.

    Returns:
        The ONNX file as `{"onnx": path}`, or an empty dict if the export fails or its predictions differ from the
        evaluation.
    """
    for file in files.values():
        (scratch / file.name).symlink_to(file.absolute())
    model, (pixels, expected) = predictor.restore(scratch), verify.sample(result.evaluated, prepared)
    onnx = scratch / onnx_export.ONNX_FILE
    try:
        onnx_export.export(model, onnx)
        difference = onnx_export.max_difference(onnx, pixels, expected)
        if not difference <= model_loader.TOLERANCE:
            raise ConvoyError(
                f"its probabilities differ by up to {difference:.2g}, more than {model_loader.TOLERANCE:g}"
            )
    except ConvoyError as error:
        print(f"{name} is registered without {onnx.name}: {error}")
        return {}
    print(f"{name}: {onnx.name} {verify.describe(len(pixels), difference)}")
    return {"onnx": onnx}


def measure_latencies(store: TrackingStore, results: Mapping[str, TrainedResult]) -> None:
    """Measure the latency of a single image and of a batch on this machine, for each run that lacks it.

    Args:
        store: The open MLflow store.
        results: The result that each run ID belongs to.
    """
    for run_id, result in results.items():
        if not runs.has_metric(store, run_id, "latency/image_ms_median"):
            record = result.record()
            name, weights = record.architecture, result.trained / WEIGHTS
            classifier = models.restore(name, record.settings, record.dataset_info, weights)
            device = hardware.select_device(record.trainer.accelerator)
            timings = latency.measure_latency(classifier.to(device))
            runs.log_latencies(store, run_id, timings, latency.describe_hardware(device))


def concat_tables(folders: Mapping[str, Path], file: str) -> pd.DataFrame:
    """Concatenate a table of every architecture, with the architecture in the column `model`."""
    tables = []
    for name, folder in folders.items():
        # A class may be named NA or 007, so names are read as strings.
        table = pd.read_csv(folder / file, dtype={"class": str}, keep_default_na=False)
        tables.append(table.assign(model=name))
    return pd.concat(tables, ignore_index=True)


if __name__ == "__main__":
    main("register", register)
