"""Checks of the promotion gate on the challenger itself: test images, accuracy, calibration, size and latency."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from convoy.core.config import SelectionMetric
from convoy.core.text import truncate_names
from convoy.evaluation.metrics import calibration_error, calibration_noise
from convoy.promotion.config import GateConfig
from convoy.promotion.evidence import AlignedPredictions, ModelEvidence
from convoy.promotion.paired_metric import PairedDifference
from convoy.promotion.statistics import detectable_gain

Outcome = Literal["pass", "info", "warn", "hold", "reject"]


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """The result of one check: its outcome, its value, its limit and a message."""

    check: str
    outcome: Outcome  # info and warn never block a promotion
    value: float | None  # None: unknown
    limit: str
    message: str

    @property
    def passed(self) -> bool | None:
        """Whether the check passed, or `None` if it is only informative."""
        return {"pass": True, "hold": False, "reject": False}.get(self.outcome)


# The evidence


def check_test_images(new: AlignedPredictions, config: GateConfig) -> CheckResult:
    """Check that there are enough test images."""
    images, minimum = len(new.sha256), config.min_test_images
    outcome: Outcome = "pass" if images >= minimum else "hold"
    return CheckResult(
        "test images", outcome, images, f"at least {minimum}", f"{images} test images, at least {minimum} are needed"
    )


def describe_detectable_gain(images: int, difference: PairedDifference, config: GateConfig) -> CheckResult:
    """Report the smallest gain in the metric that these test images could show.

    Args:
        images: Number of test images.
        difference: The difference between challenger and champion. Without a champion, that between the challenger and
            the actual classes: two models can hardly disagree more often than they err, so the errors of the new
            champion stand in for its disagreement with a later challenger.
        config: The criteria to apply.
    """
    # Models that never disagree give no estimate. One image is then assumed to be different.
    error = max(difference.standard_error, 1 / images)
    gain = detectable_gain(error, config.alpha)
    message = f"{images} test images can show a gain of about {gain:.4f} in {label_metric(difference.metric)}"
    return CheckResult("detectable gain", "info", gain, "none", message)


def check_training_overlap(models: Sequence[ModelEvidence], excluded: int) -> CheckResult:
    """Check that the training images of all models are known; models trained on test images were refused before.

    Args:
        models: All compared models.
        excluded: Number of test images excluded as near-duplicates of training images.
    """
    unknown = [model.name for model in models if model.training_hashes is None or not len(model.training_hashes)]
    message = (
        f"the training images of {truncate_names(unknown)} are unknown"
        if unknown
        else "no model was trained on a test image"
    )
    if excluded:
        message += f"; {excluded} other test images are excluded, as near-duplicates of training images"
    return CheckResult("training overlap", "hold" if unknown else "pass", None if unknown else 0, "0", message)


def check_test_set_uses(uses: int, config: GateConfig) -> CheckResult:
    """Warn if many models were evaluated on the same test images."""
    message, limit = f"evaluation {uses} on these test images", config.max_test_set_uses
    if uses > limit:
        message += f", more than the limit of {limit}: add new test images"
    return CheckResult("test set uses", "warn" if uses > limit else "info", uses, f"at most {limit}", message)


# The challenger alone


def check_score(new: AlignedPredictions, metric: SelectionMetric, config: GateConfig) -> CheckResult:
    """Check that the metric reaches the configured minimum."""
    score, label = new.score(metric), label_metric(metric)
    outcome: Outcome = "pass" if score >= config.min_accuracy else "reject"
    message = f"{new.name} has test {label} {score:.4f}, minimum {config.min_accuracy}"
    return CheckResult(label, outcome, score, f"at least {config.min_accuracy}", message)


def check_majority_class(new: AlignedPredictions, metric: SelectionMetric) -> CheckResult:
    """Check that the metric is higher than that of always predicting the most frequent class."""
    score, label = new.score(metric), label_metric(metric)
    names, counts = np.unique(new.actual.astype(str), return_counts=True)
    majority = str(names[counts.argmax()])
    baseline = dataclasses.replace(new, predicted=np.full(len(new.actual), majority, object)).score(metric)
    message = f"{new.name} has test {label} {score:.4f}, always predicting {majority!r} would have {baseline:.4f}"
    outcome: Outcome = "pass" if score > baseline else "reject"
    return CheckResult("majority class", outcome, score, f"above {baseline:.4f}", message)


def pass_first_champion(new: AlignedPredictions, metric: SelectionMetric) -> CheckResult:
    """Pass, as there never was a champion to compare with."""
    message = f"{new.name} may become the first champion, with test {label_metric(metric)} {new.score(metric):.4f}"
    return CheckResult("first champion", "pass", 0, "no champion before", message)


def describe_calibration(models: Sequence[AlignedPredictions], seed: int) -> CheckResult:
    """Report the calibration error of each model and that of perfectly calibrated probabilities."""
    described, errors, noises = [], [], []
    for model in models:
        confidence = model.probabilities.max(axis=1)
        errors.append(float(calibration_error(confidence, model.is_correct)))
        noises.append(calibration_noise(confidence, seed))
        described.append(f"{model.name} {errors[-1]:.4f} (perfectly calibrated: {noises[-1]:.4f})")
    message = f"calibration error: {', '.join(described)}"
    return CheckResult("calibration", "info", errors[0], f"noise {noises[0]:.4f}", message)


def check_parameters(challenger: ModelEvidence, config: GateConfig) -> CheckResult:
    """Check the number of parameters, if it is limited."""
    count, limit = challenger.parameters, config.max_parameters
    message = "the parameters were not counted" if count is None else f"{challenger.name} has {count} parameters"
    if not limit:
        return CheckResult("parameters", "info", count, "no limit", message)
    outcome: Outcome = "hold" if count is None else "pass" if count <= limit else "reject"
    return CheckResult("parameters", outcome, count, f"at most {limit}", f"{message}, limit {limit}")


def check_latency(challenger: ModelEvidence, champion: ModelEvidence | None, config: GateConfig) -> CheckResult:
    """Check the latency as a multiple of the champion's, if it is limited."""
    limit = config.max_latency_ratio
    if champion is None:
        return CheckResult("latency", "info", None, "no champion before", "no champion to compare the latency with")
    if challenger.latency is None or champion.latency is None:
        ratio, message = None, "the latency was not measured for both models"
    else:
        ratio = challenger.latency / champion.latency
        message = f"the latency of {challenger.name} is {format_value(ratio)} times that of {champion.name}"
    if not limit:
        return CheckResult("latency", "info", ratio, "no limit", message)
    outcome: Outcome = "hold" if ratio is None else "pass" if ratio <= limit else "reject"
    return CheckResult("latency", outcome, ratio, f"at most {limit} times", f"{message}, limit {limit} times")


def label_metric(metric: SelectionMetric) -> str:
    """Return the name of a metric as written in a sentence."""
    return metric.replace("_", " ").replace("f1", "F1")


def quote(names: Sequence[str]) -> str:
    """Quote names and join them, truncating a long list."""
    return truncate_names([repr(name) for name in names])


def format_value(value: float | None) -> str:
    """Format a value for a table or a message."""
    if value is None:
        return "unknown"
    if float(value).is_integer():
        return str(int(value))
    return f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.2g}"
