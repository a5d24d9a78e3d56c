"""Classification metrics with confidence intervals, computed from probabilities and true labels.

All intervals have a confidence of 95%. They are percentile bootstrap intervals (Efron and Tibshirani 1993), for which
images are resampled, or complete groups of images if there are groups. The seed is fixed, so that repeated calls return
identical results.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import ndtri

from convoy.core.config import Count, schema
from convoy.data.packed.packed_dataset import COLUMN, FEW
from convoy.evaluation.calibration import per_image_log_loss

# Probability that an interval does not contain the true value.
ALPHA = 0.05
QUANTILES = (ALPHA / 2, 1 - ALPHA / 2)
RESAMPLES = 2000
# Random numbers drawn at a time, chosen so that they stay in the processor's cache.
BLOCK = 2**18
# Number of confidence bins of the calibration error (Guo et al. 2017).
BINS = 15
TOP = 5
# Number of classes from which on the top-`TOP` accuracy is meaningful.
MANY = 10
# Prefix of the columns with class probabilities, followed by the class name.
PREFIX = "probability_"
COLUMNS = ["metric", "value", "low", "high"]
ERROR = "calibration_error"
# Suffixes of metric names, for calibrated and uncalibrated probabilities.
CALIBRATION_SUFFIXES = ("", "_uncalibrated")

# Quantities summed over images, by name, each of shape (..., columns of the part).
Sums = Mapping[str, np.ndarray]


@schema
class EvaluateConfig:
    """Settings of the evaluation on test images."""

    batch_size: Count  # images per batch; limits the memory use


def metrics_with_ci(
    labels: np.ndarray, probabilities: np.ndarray, uncalibrated: np.ndarray, groups: np.ndarray | None = None
) -> pd.DataFrame:
    """Compute all metrics with their confidence intervals.

    `balanced_accuracy` and `macro_f1` are means over the classes that occur, `top_5` is included from ten classes on,
    and `brier` is a sum over the classes, in [0, 2] (Brier 1950).

    Args:
        labels: (N,) class indices in [0, K).
        probabilities: (N, K) calibrated probabilities.
        uncalibrated: (N, K) probabilities before calibration.
        groups: (N,) group names of the images; an empty name means that the image is its own group.

    Returns:
        A table with one row per metric and the columns metric, value, low and high. It has no rows if there are no
        images.
    """
    if not len(labels):
        return pd.DataFrame(columns=COLUMNS)
    parts = _counts(labels, probabilities)
    if probabilities.shape[1] >= MANY:
        parts["top_5"] = _column(_rank(labels, probabilities) < TOP)
    for kind, given in zip(CALIBRATION_SUFFIXES, (probabilities, uncalibrated), strict=True):
        parts |= {f"{name}{kind}": part for name, part in _losses(labels, given).items()}
    units = resampling_units(groups, len(labels))
    sums, drawn = _sums(parts), _drawn(parts, units)
    values, spread = _figures(sums), _figures(drawn)

    classes = _effective(parts["actual"], units)
    there = classes[classes > 0]
    # The number of images with which a single proportion is as certain as the mean of the classes' proportions.
    even = len(there) ** 2 / (1 / there).sum()
    images = _effective(parts["images"], units)[0]
    counts = {"accuracy": images, "top_5": images, "balanced_accuracy": even, "macro_f1": even}
    rows = []
    for name, value in values.items():
        low, high = _interval(value, spread[name], counts.get(name, np.nan))
        if name.startswith(ERROR):
            gaps = f"gaps{name.removeprefix(ERROR)}"
            away = np.abs(drawn[gaps] / drawn["images"] - sums[gaps] / sums["images"]).sum(axis=1)
            low, high = _calibration_interval(value, spread[name], away)
        rows.append((name, float(value), float(low), float(high)))
    return pd.DataFrame(rows, columns=COLUMNS)


def per_class(
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
        A table with one row per class and the columns class, images (number of test images), and each metric with its
        bounds, such as recall, recall_low and recall_high. It has no rows if there are no images.
    """
    names = [f"{rate}{end}" for rate in ("precision", "recall", "f1") for end in ("", "_low", "_high")]
    if not len(labels):
        return pd.DataFrame(columns=["class", "images", *names])
    parts, units = _counts(labels, probabilities), resampling_units(groups, len(labels))
    sums = _sums(parts)
    values, spread = _rates(sums), _rates(_drawn(parts, units))
    table = pd.DataFrame({"class": classes, "images": sums["actual"].astype(int)})
    for rate, of in (("precision", "predicted"), ("recall", "actual"), ("f1", "actual")):
        value = np.nan_to_num(values[rate])
        low, high = _interval(value, spread[rate], _effective(parts[of], units))
        table = table.assign(**{rate: value, f"{rate}_low": low, f"{rate}_high": high})
    return table


def slice_metrics(predictions: pd.DataFrame) -> pd.DataFrame:
    """Compute the accuracy of each slice of the test set, which is the set of images with the same value in a column.

    Slices are made by the group and by each column of the label table that has at most `FEW` different values.

    Returns:
        A table with one row per slice and the columns column, value, images, accuracy, low and high.
    """
    tables = [pd.DataFrame(columns=["column", "value", "images", "accuracy", "low", "high"])]
    right = (predictions["actual"] == predictions["predicted"]).to_numpy(float)
    for column in predictions:
        if column != "group" and not str(column).startswith(COLUMN):
            continue
        codes, names = pd.factorize(predictions[column].to_numpy(object), sort=True)
        if not 1 <= len(names) <= FEW:
            continue
        images = _one_hot(codes, len(names))
        parts = {"images": images, "right": _one_hot(codes, len(names), right)}
        # If the slices are the groups themselves, single images are resampled within them.
        units = resampling_units(None if column == "group" else predictions.get("group"), len(codes))
        sums, drawn = _sums(parts), _drawn(parts, units)
        accuracy = sums["right"] / sums["images"]
        with np.errstate(invalid="ignore"):
            low, high = _interval(accuracy, drawn["right"] / drawn["images"], _effective(images, units))
        found = {"column": str(column).removeprefix(COLUMN), "value": names, "images": sums["images"].astype(int)}
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
    more = [name for name in images.columns if name.startswith(COLUMN) or (name == "group" and images[name].any())]
    numbers = pd.DataFrame(probabilities, columns=[f"{PREFIX}{name}" for name in classes])
    return pd.concat([table, images[more].reset_index(drop=True), numbers], axis=1)


# Metrics from sums


def _figures(sums: Sums) -> dict[str, np.ndarray]:
    images = sums["images"][..., 0]
    rates = _rates(sums)
    figures = {
        "accuracy": sums["hits"].sum(axis=-1) / images,
        "balanced_accuracy": np.nanmean(rates["recall"], axis=-1),
        "macro_f1": np.nanmean(rates["f1"], axis=-1),
    }
    if "top_5" in sums:
        figures["top_5"] = sums["top_5"][..., 0] / images
    for kind in CALIBRATION_SUFFIXES:
        figures[f"log_loss{kind}"] = sums[f"log_loss{kind}"][..., 0] / images
        figures[f"brier{kind}"] = sums[f"brier{kind}"][..., 0] / images
        figures[f"{ERROR}{kind}"] = np.abs(sums[f"gaps{kind}"]).sum(axis=-1) / images
    return figures


def _rates(sums: Sums) -> dict[str, np.ndarray]:
    """Return precision, recall and F1 of each class, NaN where a class has no images."""
    hits, actual, predicted = sums["hits"], sums["actual"], sums["predicted"]
    with np.errstate(invalid="ignore"):
        return {"precision": hits / predicted, "recall": hits / actual, "f1": 2 * hits / (actual + predicted)}


def calibration(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Compute the expected calibration error.

    Args:
        confidence: (N,) probability of the predicted class, in [0, 1].
        right: (..., N) booleans, whether the prediction is correct.

    Returns:
        The calibration errors, of shape (...), in [0, 1].
    """
    bins = _bins(confidence)
    order = np.argsort(bins, kind="stable")
    starts = np.unique(bins[order], return_index=True)[1]
    gaps = np.add.reduceat((right - confidence)[..., order], starts, axis=-1)
    return np.abs(gaps).sum(axis=-1) / len(confidence)


def calibration_noise(confidence: np.ndarray, seed: int, simulations: int = 200) -> float:
    """Estimate the mean calibration error that perfectly calibrated probabilities would show, by simulation.

    Args:
        confidence: (N,) probability of the predicted class, in [0, 1].
        seed: Seed of the simulation.
        simulations: Number of simulated test sets.
    """
    random = np.random.default_rng(seed)
    step = max(1, BLOCK // len(confidence))
    parts = [
        calibration(confidence, random.random((min(step, simulations - start), len(confidence))) < confidence)
        for start in range(0, simulations, step)
    ]
    return float(np.concatenate(parts).mean())


def _bins(confidence: np.ndarray) -> np.ndarray:
    return np.minimum((confidence * BINS).astype(int), BINS - 1)


# Parts: quantities that are summed over images, each of shape (N, columns of the part)


def _counts(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, sparse.csr_array]:
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    return {
        "images": _column(np.ones(len(labels))),
        "actual": _one_hot(labels, classes),
        "predicted": _one_hot(predicted, classes),
        "hits": _one_hot(labels, classes, labels == predicted),
    }


def _losses(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, sparse.csr_array]:
    actual = probabilities[np.arange(len(labels)), labels]
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    return {
        "log_loss": _column(per_image_log_loss(labels, probabilities)),
        "brier": _column(np.square(probabilities).sum(axis=1) - 2 * actual + 1),
        "gaps": _one_hot(_bins(confidence), BINS, right - confidence),
    }


def _rank(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
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


# Intervals


def resampled(columns: sparse.csr_array, units: sparse.csr_array | None, seed: int = 0) -> np.ndarray:
    """Return bootstrap sums of columns over resampled images, or over resampled groups of images.

    Args:
        columns: (N, M) values of each image.
        units: (U, N) membership of images in groups, as from `resampling_units`. `None` resamples single images.
        seed: Seed of the resampling.

    Returns:
        (RESAMPLES, M) sums, each over as many draws as there are images or groups.
    """
    turned = (columns if units is None else units @ columns).T.tocsr()
    count = turned.shape[1]
    random = np.random.default_rng(seed)
    sums = np.empty((RESAMPLES, turned.shape[0]))
    step = max(1, BLOCK // count)
    for start in range(0, RESAMPLES, step):
        here = min(step, RESAMPLES - start)
        drawn = random.integers(0, count, (here, count)) * here + np.arange(here)[:, None]
        # How often each unit is drawn in each resample.
        times = np.bincount(drawn.ravel(), minlength=count * here).reshape(count, here)
        sums[start : start + here] = (turned @ times.astype(float)).T
    return sums


def resampling_units(groups: np.ndarray | pd.Series | None, count: int) -> sparse.csr_array | None:
    """Return a (U, N) matrix that assigns each image to its group, or `None` if every image is its own group.

    Args:
        groups: (N,) group names; an image with an empty name becomes a group of its own.
        count: Number of images N.
    """
    if groups is None:
        return None
    names = np.asarray(groups, object)
    codes = pd.factorize(names)[0]
    alone = names == ""
    codes[alone] = count + np.arange(alone.sum())
    codes = np.unique(codes, return_inverse=True)[1]
    return _one_hot(codes, codes.max(initial=-1) + 1).T.tocsr() if codes.max(initial=-1) + 1 < count else None


def _sums(parts: Mapping[str, sparse.csr_array]) -> dict[str, np.ndarray]:
    return {name: np.asarray(part.sum(axis=0)) for name, part in parts.items()}


def _drawn(parts: Mapping[str, sparse.csr_array], units: sparse.csr_array | None) -> dict[str, np.ndarray]:
    ends = np.cumsum([part.shape[1] for part in parts.values()])
    sums = resampled(sparse.hstack(list(parts.values()), format="csr"), units)
    return dict(zip(parts, np.split(sums, ends[:-1], axis=1), strict=True))


def _effective(part: sparse.csr_array, units: sparse.csr_array | None) -> np.ndarray:
    """Return the effective number of images if all images of a group carried the same information (Kish 1965)."""
    sums = part if units is None else units @ part
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.asarray(sums.sum(axis=0)) ** 2 / np.asarray(sums.power(2).sum(axis=0)))


def _interval(value: np.ndarray, drawn: np.ndarray, count: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper bounds of values (...), from R resamples (R, ...) of each.

    If the bounds are equal, for example because every image is correct, the resamples carry no information. The
    interval is then Wilson's (1927) for a proportion in `count` images.
    """
    drawn = np.where(np.isnan(drawn).all(axis=0), 0.0, drawn)
    low, high = np.nanquantile(drawn, QUANTILES, axis=0)
    square = ndtri(QUANTILES[1]) ** 2
    middle = (count * value + square / 2) / (count + square)
    margin = np.sqrt(square * (count * value * (1 - value) + square / 4)) / (count + square)
    flat = low == high
    low = np.where(flat, np.maximum(middle - margin, 0), low)
    high = np.where(flat, np.minimum(middle + margin, 1), high)
    return np.minimum(low, value), np.maximum(high, value)


def _calibration_interval(error: np.ndarray, drawn: np.ndarray, away: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper bounds of a calibration error.

    Noise increases a calibration error, and resampling adds noise once more, so that all percentiles may be above the
    true value. The lower bound is therefore the error minus the most that noise can add, by the triangle inequality.
    The upper bound is a percentile reflected at the error.

    Args:
        error: The calibration error.
        drawn: (R,) calibration errors of the resamples.
        away: (R,) distances between the bin gaps of each resample and those of all images.
    """
    low, high = error - np.quantile(away, QUANTILES[1]), 2 * error - np.quantile(drawn, QUANTILES[0])
    return np.maximum(low, 0), np.clip(high, error, 1)
