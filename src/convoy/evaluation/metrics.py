"""Classification metrics with confidence intervals, computed from probabilities and true labels.

All intervals have a confidence of 95%. They are percentile bootstrap intervals (Efron and Tibshirani 1993), for which
images are resampled, or complete groups of images if there are groups. The seed is fixed, so that repeated calls return
identical results.
"""

from collections.abc import Mapping
from typing import get_args

import numpy as np
import pandas as pd
from scipy import sparse

from convoy.core.config import PositiveInt, SelectionMetric, schema
from convoy.core.selection_metric import selection_score
from convoy.data.packed.packed_dataset import COLUMN_PREFIX, MAX_SLICE_VALUES
from convoy.evaluation.bootstrap import (
    BLOCK_SIZE,
    QUANTILES,
    bootstrap_sums,
    confidence_interval,
    effective_counts,
    resampling_units,
)
from convoy.evaluation.calibration import per_image_log_loss

# Number of confidence bins of the calibration error (Guo et al. 2017).
CALIBRATION_BINS = 15
TOP_K = 5
# Number of classes from which on the top-`TOP_K` accuracy is meaningful.
MIN_CLASSES_FOR_TOP5 = 10
# Effective number of images below which a metric of a class or of a slice is marked. The interval of a recall of 0.9 is
# then wider than 0.2.
MIN_READABLE_IMAGES = 30
# Prefix of the columns with class probabilities, followed by the class name.
PROBABILITY_PREFIX = "probability_"
# Name of the accuracy with flip averaging.
FLIP_AVERAGED = "accuracy_flip_averaged"
METRIC_COLUMNS = ["metric", "value", "low", "high"]
CALIBRATION_ERROR = "calibration_error"
# Suffixes of metric names, for calibrated and uncalibrated probabilities.
CALIBRATION_SUFFIXES = ("", "_uncalibrated")

# Quantities summed over images, by name, each of shape (..., columns of the part).
Sums = Mapping[str, np.ndarray]


@schema
class EvaluateConfig:
    """Settings of the evaluation on test images."""

    batch_size: PositiveInt  # images per batch; limits the memory use
    # Whether to compute the accuracy of the mean prediction for each image and its mirror image, too. It is a metric of
    # its own, because the registered model predicts from the image alone.
    flip_average: bool = False


def metrics_with_ci(
    labels: np.ndarray,
    probabilities: np.ndarray,
    uncalibrated: np.ndarray,
    groups: np.ndarray | None = None,
    flip_averaged: np.ndarray | None = None,
) -> pd.DataFrame:
    """Compute all metrics with their confidence intervals.

    `balanced_accuracy` and `macro_f1` are means over the classes that occur, `top_5` is included from ten classes on,
    `brier` is a sum over the classes, in [0, 2] (Brier 1950), and `accuracy_flip_averaged` is included if the
    predictions for it are given.

    Args:
        labels: (N,) class indices in [0, K).
        probabilities: (N, K) calibrated probabilities.
        uncalibrated: (N, K) probabilities before calibration.
        groups: (N,) group names of the images; an empty name means that the image is its own group.
        flip_averaged: (N, K) means of the probabilities for each image and its mirror image.

    Returns:
        A table with one row per metric and the columns metric, value, low and high. It has no rows if there are no
        images.
    """
    if not len(labels):
        return pd.DataFrame(columns=METRIC_COLUMNS)
    parts = _count_images(labels, probabilities)
    if probabilities.shape[1] >= MIN_CLASSES_FOR_TOP5:
        parts["top_5"] = _column(_rank_actual_class(labels, probabilities) < TOP_K)
    if flip_averaged is not None:
        parts[FLIP_AVERAGED] = _column(flip_averaged.argmax(axis=1) == labels)
    for suffix, variant in zip(CALIBRATION_SUFFIXES, (probabilities, uncalibrated), strict=True):
        parts |= {f"{name}{suffix}": part for name, part in _compute_losses(labels, variant).items()}
    units = resampling_units(groups, len(labels))
    sums, resampled = _sum_images(parts), _sum_resampled_images(parts, units)
    values, resampled_values = _compute_metrics(sums), _compute_metrics(resampled)

    classes = effective_counts(parts["actual"], units)
    present = classes[classes > 0]
    # Number of images for which a single proportion is as certain as the mean of the classes' proportions.
    mean_count = len(present) ** 2 / (1 / present).sum()
    images = effective_counts(parts["images"], units)[0]
    counts = {
        "accuracy": images,
        FLIP_AVERAGED: images,
        "top_5": images,
        "balanced_accuracy": mean_count,
        "macro_f1": mean_count,
    }
    rows = []
    for name, value in values.items():
        low, high = confidence_interval(value, resampled_values[name], counts.get(name, np.nan))
        if name.startswith(CALIBRATION_ERROR):
            gaps = f"gaps{name.removeprefix(CALIBRATION_ERROR)}"
            distances = np.abs(resampled[gaps] / resampled["images"] - sums[gaps] / sums["images"]).sum(axis=1)
            low, high = _calibration_interval(value, resampled_values[name], distances)
        rows.append((name, float(value), float(low), float(high)))
    return pd.DataFrame(rows, columns=METRIC_COLUMNS)


def per_class_metrics(
    classes: list[str], labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray | None = None
) -> pd.DataFrame:
    """Compute precision, recall and F1 of each class with their confidence intervals.

    A metric that is undefined because there are no images is 0, with the interval from 0 to 1.

    Args:
        classes: The K class names.
        labels: (N,) class indices in [0, K).
        probabilities: (N, K) probabilities.
        groups: (N,) group names of the images; an empty name means that the image is its own group.

    Returns:
        A table with one row per class and the columns class, images (number of test images, on which recall and F1
        rest), predicted (number of images predicted as the class, on which the precision rests), too_few_images
        (whether there are fewer than `MIN_READABLE_IMAGES` of the class), and each metric with its bounds, such as
        recall, recall_low and recall_high. It has no rows if there are no images.
    """
    names = [f"{rate}{end}" for rate in ("precision", "recall", "f1") for end in ("", "_low", "_high")]
    if not len(labels):
        return pd.DataFrame(columns=["class", "images", "predicted", "too_few_images", *names])
    parts, units = _count_images(labels, probabilities), resampling_units(groups, len(labels))
    sums = _sum_images(parts)
    values, resampled_values = _compute_rates(sums), _compute_rates(_sum_resampled_images(parts, units))
    table = pd.DataFrame(
        {
            "class": classes,
            "images": sums["actual"].astype(int),
            "predicted": sums["predicted"].astype(int),
            "too_few_images": effective_counts(parts["actual"], units) < MIN_READABLE_IMAGES,
        }
    )
    for rate, of in (("precision", "predicted"), ("recall", "actual"), ("f1", "actual")):
        value = np.nan_to_num(values[rate])
        low, high = confidence_interval(value, resampled_values[rate], effective_counts(parts[of], units))
        table = table.assign(**{rate: value, f"{rate}_low": low, f"{rate}_high": high})
    return table


def slice_metrics(predictions: pd.DataFrame) -> pd.DataFrame:
    """Compute the accuracy of each slice of the test set, which is the set of images with the same value in a column.

    Slices are made by the group and by each column of the label table with at most `MAX_SLICE_VALUES` values.

    Returns:
        A table with one row per slice and the columns column, value, images, too_few_images (whether there are fewer
        than `MIN_READABLE_IMAGES`), accuracy, low and high.
    """
    tables = [pd.DataFrame(columns=["column", "value", "images", "too_few_images", "accuracy", "low", "high"])]
    correct = (predictions["actual"] == predictions["predicted"]).to_numpy(float)
    for column in predictions:
        if column != "group" and not str(column).startswith(COLUMN_PREFIX):
            continue
        codes, names = pd.factorize(predictions[column].to_numpy(object), sort=True)
        if not 1 <= len(names) <= MAX_SLICE_VALUES:
            continue
        images = _one_hot(codes, len(names))
        parts = {"images": images, "correct": _one_hot(codes, len(names), correct)}
        # If the slices are the groups themselves, single images are resampled within them.
        units = resampling_units(None if column == "group" else predictions.get("group"), len(codes))
        sums, resampled = _sum_images(parts), _sum_resampled_images(parts, units)
        accuracy = sums["correct"] / sums["images"]
        counts = effective_counts(images, units)
        with np.errstate(invalid="ignore"):
            low, high = confidence_interval(accuracy, resampled["correct"] / resampled["images"], counts)
        found = {
            "column": str(column).removeprefix(COLUMN_PREFIX),
            "value": names,
            "images": sums["images"].astype(int),
            "too_few_images": counts < MIN_READABLE_IMAGES,
        }
        tables.append(pd.DataFrame(found | {"accuracy": accuracy, "low": low, "high": high}))
    return pd.concat(tables[1:], ignore_index=True) if len(tables) > 1 else tables[0]


def prediction_table(classes: list[str], images: pd.DataFrame, probabilities: np.ndarray) -> pd.DataFrame:
    """Build the table of predictions with one row per image.

    Args:
        classes: The K class names.
        images: The images, with the columns sha256 and label and N rows in the order of `probabilities`. Its columns
            of the label table are copied, and its group column too if any image has a group.
        probabilities: (N, K) probabilities.

    Returns:
        A table with the columns sha256, actual, predicted, the copied columns and the probability of each class.
    """
    table = pd.DataFrame({"sha256": images["sha256"].to_numpy(), "actual": images["label"].to_numpy()})
    table["predicted"] = np.array(classes, dtype=object)[probabilities.argmax(axis=1)]
    more = [
        name for name in images.columns if name.startswith(COLUMN_PREFIX) or (name == "group" and images[name].any())
    ]
    numbers = pd.DataFrame(probabilities, columns=[f"{PROBABILITY_PREFIX}{name}" for name in classes])
    return pd.concat([table, images[more].reset_index(drop=True), numbers], axis=1)


def validation_table(classes: list[str], labels: np.ndarray, probabilities: np.ndarray) -> pd.DataFrame:
    """Build the table of validation images, by which architectures are ranked and labels are doubted.

    Args:
        classes: The K class names.
        labels: (N,) class indices in [0, K).
        probabilities: (N, K) uncalibrated probabilities, as calibration would use the same images.

    Returns:
        A table with one row per image, in the order of the arguments, and the columns actual, predicted, log_loss and
        the probability of each class as float32.
    """
    names = np.array(classes, dtype=object)
    table = pd.DataFrame(
        {
            "actual": names[labels],
            "predicted": names[probabilities.argmax(axis=1)],
            "log_loss": per_image_log_loss(labels, probabilities),
        }
    )
    columns = [f"{PROBABILITY_PREFIX}{name}" for name in classes]
    return pd.concat([table, pd.DataFrame(probabilities.astype(np.float32), columns=columns)], axis=1)


# Metrics from sums


def _compute_metrics(sums: Sums) -> dict[str, np.ndarray]:
    images = sums["images"][..., 0]
    metrics = {
        metric: selection_score(metric, sums["hits"], sums["actual"], sums["predicted"])
        for metric in get_args(SelectionMetric)
    }
    for name in (FLIP_AVERAGED, "top_5"):
        if name in sums:
            metrics[name] = sums[name][..., 0] / images
    for suffix in CALIBRATION_SUFFIXES:
        metrics[f"log_loss{suffix}"] = sums[f"log_loss{suffix}"][..., 0] / images
        metrics[f"brier{suffix}"] = sums[f"brier{suffix}"][..., 0] / images
        metrics[f"{CALIBRATION_ERROR}{suffix}"] = np.abs(sums[f"gaps{suffix}"]).sum(axis=-1) / images
    return metrics


def _compute_rates(sums: Sums) -> dict[str, np.ndarray]:
    """Return precision, recall and F1 of each class, NaN where a class has no images."""
    hits, actual, predicted = sums["hits"], sums["actual"], sums["predicted"]
    with np.errstate(invalid="ignore"):
        return {"precision": hits / predicted, "recall": hits / actual, "f1": 2 * hits / (actual + predicted)}


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Compute the expected calibration error.

    Args:
        confidence: (N,) probability of the predicted class, in [0, 1].
        correct: (..., N) booleans, whether the prediction is correct.

    Returns:
        The calibration errors, of shape (...), in [0, 1].
    """
    bins = _assign_bins(confidence)
    order = np.argsort(bins, kind="stable")
    starts = np.unique(bins[order], return_index=True)[1]
    gaps = np.add.reduceat((correct - confidence)[..., order], starts, axis=-1)
    return np.abs(gaps).sum(axis=-1) / len(confidence)


def calibration_noise(confidence: np.ndarray, seed: int, simulations: int = 200) -> float:
    """Estimate the mean calibration error that perfectly calibrated probabilities would show, by simulation.

    Args:
        confidence: (N,) probability of the predicted class, in [0, 1].
        seed: Seed of the simulation.
        simulations: Number of simulated test sets.
    """
    random = np.random.default_rng(seed)
    step = max(1, BLOCK_SIZE // len(confidence))
    parts = [
        calibration_error(confidence, random.random((min(step, simulations - start), len(confidence))) < confidence)
        for start in range(0, simulations, step)
    ]
    return float(np.concatenate(parts).mean())


def _assign_bins(confidence: np.ndarray) -> np.ndarray:
    return np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)


# Parts: quantities that are summed over images, each of shape (N, columns of the part)


def _count_images(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, sparse.csr_array]:
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    return {
        "images": _column(np.ones(len(labels))),
        "actual": _one_hot(labels, classes),
        "predicted": _one_hot(predicted, classes),
        "hits": _one_hot(labels, classes, labels == predicted),
    }


def _compute_losses(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, sparse.csr_array]:
    actual = probabilities[np.arange(len(labels)), labels]
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    return {
        "log_loss": _column(per_image_log_loss(labels, probabilities)),
        "brier": _column(np.square(probabilities).sum(axis=1) - 2 * actual + 1),
        "gaps": _one_hot(_assign_bins(confidence), CALIBRATION_BINS, correct - confidence),
    }


def _rank_actual_class(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the rank of each image's actual class, (N,), which is the number of classes with a higher probability.

    Of classes with equal probabilities the first ranks higher, as in the choice of the predicted class.
    """
    actual = probabilities[np.arange(len(labels)), labels][:, None]
    before = np.arange(probabilities.shape[1]) < labels[:, None]
    return ((probabilities > actual) | (before & (probabilities == actual))).sum(axis=1)


def _column(values: np.ndarray) -> sparse.csr_array:
    return sparse.csr_array(np.asarray(values, float)[:, None])


def _one_hot(codes: np.ndarray, width: int, values: np.ndarray | float = 1.0) -> sparse.csr_array:
    at = (np.arange(len(codes)), codes)
    return sparse.csr_array((np.broadcast_to(np.asarray(values, float), len(codes)), at), (len(codes), width))


# Sums and intervals


def _sum_images(parts: Mapping[str, sparse.csr_array]) -> dict[str, np.ndarray]:
    return {name: np.asarray(part.sum(axis=0)) for name, part in parts.items()}


def _sum_resampled_images(
    parts: Mapping[str, sparse.csr_array], units: sparse.csr_array | None
) -> dict[str, np.ndarray]:
    ends = np.cumsum([part.shape[1] for part in parts.values()])
    sums = bootstrap_sums(sparse.hstack(list(parts.values()), format="csr"), units)
    return dict(zip(parts, np.split(sums, ends[:-1], axis=1), strict=True))


def _calibration_interval(
    error: np.ndarray, resampled: np.ndarray, distances: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper bounds of a calibration error.

    Noise increases a calibration error, and resampling adds noise once more, so that all percentiles may be above the
    true value. The lower bound is therefore the error minus the most that noise can add, by the triangle inequality.
    The upper bound is a percentile reflected at the error.

    Args:
        error: The calibration error.
        resampled: (R,) calibration errors of the resamples.
        distances: (R,) distances between the bin gaps of each resample and those of all images.
    """
    low, high = error - np.quantile(distances, QUANTILES[1]), 2 * error - np.quantile(resampled, QUANTILES[0])
    return np.maximum(low, 0), np.clip(high, error, 1)
