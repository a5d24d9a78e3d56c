"""The evaluate stage, which evaluates one trained architecture on test images that no training has used."""

import json
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch

from convoy import models
from convoy.core.artifact_names import (
    CALIBRATION,
    IMAGE_TABLE,
    INTERVALS,
    METRICS,
    PER_CLASS,
    PREDICTIONS,
    RECORD,
    SLICES,
    VALIDATION,
    WEIGHTS,
)
from convoy.core.csv_file import write_csv
from convoy.core.errors import ConvoyError
from convoy.core.text import truncate_names
from convoy.data.packed.arrays import Images
from convoy.evaluation.calibration import apply_temperature, fit_temperature, per_image_log_loss
from convoy.evaluation.metrics import (
    FLIP_AVERAGED,
    MIN_READABLE_IMAGES,
    EvaluateConfig,
    metrics_with_ci,
    per_class_metrics,
    prediction_table,
    slice_metrics,
    validation_table,
)
from convoy.models.base import predict
from convoy.training import hardware
from convoy.training.record import TrainingRecord
from pipeline.stage import Stage, main

# Test metrics in metrics.json; intervals.csv has all.
SHOWN_TEST_METRICS = ("accuracy", FLIP_AVERAGED, "macro_f1", "log_loss")


def evaluate(stage: Stage) -> None:
    """Evaluate one trained architecture on the test images."""
    params = stage.validate(EvaluateConfig, "evaluate")
    trained, prepared = stage.input(f"train/{stage.foreach_key}"), stage.input("preprocess")
    resized = stage.images()
    record = TrainingRecord.load(trained / RECORD)
    info = record.dataset_info
    test, val = Images.load(resized, "test"), Images.load(resized, "val")
    images = pd.read_parquet(prepared / IMAGE_TABLE).query("split == 'test'")
    # There is no model to evaluate after a failed training, so the tables stay empty.
    if record.failure:
        test, images = Images(test.pixels[:0], test.labels[:0]), images[:0]
        val = Images(val.pixels[:0], val.labels[:0])
        uncalibrated = probabilities = uncalibrated_val = np.empty((0, len(info.classes)))
        flip_averaged = None
        calibration = {}
    else:
        classifier = models.restore(record.architecture, record.settings, info, trained / WEIGHTS)
        # The results are bit-identical only with the same number of threads.
        torch.set_num_threads(record.trainer.threads)
        classifier.to(hardware.select_device(record.trainer.accelerator))
        try:
            uncalibrated_val = predict(classifier, val.pixels, params.batch_size)
            uncalibrated = predict(classifier, test.pixels, params.batch_size)
            mirrored = (
                predict(classifier, np.flip(test.pixels, axis=2), params.batch_size) if params.flip_average else None
            )
        except torch.OutOfMemoryError:
            raise ConvoyError(
                f"{params.batch_size} images do not fit into the memory of the GPU: lower evaluate.batch_size"
            ) from None
        flip_averaged = None if mirrored is None else (uncalibrated + mirrored) / 2
        fit = fit_temperature(val.labels, uncalibrated_val)
        calibrated_val = apply_temperature(uncalibrated_val, fit.temperature)
        calibration = {
            "temperature": fit.temperature,
            "fitted_temperature": fit.fitted,
            "cross_validated_gain": fit.gain,
            "cross_validated_gain_error": fit.gain_error,
            "p_value": fit.p_value,
            "val_log_loss": float(per_image_log_loss(val.labels, calibrated_val).mean()),
            "val_log_loss_uncalibrated": float(per_image_log_loss(val.labels, uncalibrated_val).mean()),
        }
        probabilities = apply_temperature(uncalibrated, fit.temperature)

    groups = images["group"].to_numpy()
    table = prediction_table(info.classes, images, probabilities)
    table.to_parquet(stage.scratch / PREDICTIONS, index=False)
    write_csv(table[["actual", "predicted"]], stage.scratch / "confusion.csv")
    validation_table(info.classes, val.labels, uncalibrated_val).to_parquet(stage.scratch / VALIDATION, index=False)
    per_class = per_class_metrics(info.classes, test.labels, probabilities, groups)
    write_csv(per_class, stage.scratch / PER_CLASS)
    write_csv(slice_metrics(table), stage.scratch / SLICES)
    intervals = metrics_with_ci(test.labels, probabilities, uncalibrated, groups, flip_averaged)
    intervals.to_csv(stage.scratch / INTERVALS, index=False)
    metrics = dict(zip(intervals["metric"], intervals["value"], strict=True))
    for name, values in ((METRICS, select_metrics(record, metrics)), (CALIBRATION, calibration)):
        (stage.scratch / name).write_text(json.dumps(values, indent=2) + "\n")
    shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if not name.endswith("_uncalibrated"))
    print(f"{stage.foreach_key}: {shown or 'its training failed'}")
    if few := list(per_class["class"][per_class["too_few_images"].astype(bool)]):
        print(
            f"{stage.foreach_key}: fewer than {MIN_READABLE_IMAGES} test images of {truncate_names(few)}: read their "
            f"metrics in {PER_CLASS} with their intervals"
        )
    if metrics:
        print(
            f"{stage.foreach_key}: {fit.describe()}; the log loss on test images is {metrics['log_loss']:.4f}, "
            f"uncalibrated {metrics['log_loss_uncalibrated']:.4f}"
        )


def select_metrics(record: TrainingRecord, metrics: Mapping[str, float]) -> dict[str, float]:
    """Select the metrics that DVC shows: those to choose settings by come first, and few test metrics last.

    Args:
        record: The record of the training.
        metrics: The test metrics by name.

    Returns:
        The metrics by name; empty if the training failed.
    """
    if record.best is None or record.failure:
        return {}
    selection = f"val_{record.train.selection_metric}"
    validation = {name: getattr(record.best, name) for name in (selection, "val_accuracy", "val_loss")}
    return {
        **validation,
        "best_epoch": record.best.epoch,
        **{f"test_{name}": metrics[name] for name in SHOWN_TEST_METRICS if name in metrics},
    }


if __name__ == "__main__":
    main("evaluate", evaluate, "architecture")
