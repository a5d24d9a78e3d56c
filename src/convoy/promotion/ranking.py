"""The ranking of the trained architectures on validation images, and the choice of the challenger.

Test metrics are excluded on purpose: those of a model that was selected by them are biased upwards.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pandas as pd

from convoy.core.artifact_names import VALIDATION
from convoy.core.config import SelectionMetric
from convoy.core.text import truncate_names
from convoy.promotion.checks import label_metric
from convoy.promotion.paired_metric import compare_metric, score_predictions
from convoy.training.record import TrainingRecord


@dataclasses.dataclass(frozen=True)
class ValidatedModel:
    """A trained architecture with its predictions for the validation images."""

    name: str
    predictions: pd.DataFrame  # columns actual, predicted and log_loss, one row per image
    parameters: int  # of the network
    macs: int  # multiply-accumulate operations for one image, which unlike latencies have no noise

    @classmethod
    def load(cls, record: TrainingRecord, evaluated: Path) -> "ValidatedModel":
        """Load the predictions of a trained architecture from the output folder of its evaluation."""
        predictions = pd.read_parquet(evaluated / VALIDATION, columns=["actual", "predicted", "log_loss"])
        return cls(record.architecture, predictions, record.parameters, record.macs)

    def score(self, metric: SelectionMetric) -> float:
        """Return a metric of the predictions."""
        actual, predicted = (self.predictions[name].to_numpy(object) for name in ("actual", "predicted"))
        return score_predictions(metric, actual, predicted)

    def summarize(self, metric: SelectionMetric) -> dict[str, float]:
        """Return the metrics that architectures are compared by: accuracy, the selection metric and the log loss."""
        scores = {name: self.score(name) for name in dict.fromkeys(("accuracy", metric))}  # type: ignore[arg-type]
        return scores | {"loss": float(self.predictions["log_loss"].mean())}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The architecture to compare with the champion, and why it was chosen."""

    name: str
    reason: str


def rank(models: Sequence[ValidatedModel], metric: SelectionMetric) -> list[ValidatedModel]:
    """Rank architectures, best first, by a metric on the validation images, then by log loss, then by name."""
    return sorted(
        models, key=lambda model: (-model.score(metric), float(model.predictions["log_loss"].mean()), model.name)
    )


def choose(ranked: Sequence[ValidatedModel], metric: SelectionMetric, prefer: Literal["best", "small"]) -> Choice:
    """Choose the challenger among the ranked architectures.

    An architecture counts as equal to the best if it is behind by at most one standard error of their paired
    difference (the one-standard-error rule of Breiman et al. 1984).

    Args:
        ranked: The architectures, best first.
        metric: The metric that they were ranked by.
        prefer: `best` chooses the first. `small` chooses, among it and the equal ones that have neither more parameters
            nor more MACs, the one with the fewest parameters.
    """
    best, *others = ranked
    equal = [model for model in others if _is_equal(best, model, metric)]
    reason = f"{best.name} is best in validation, with {label_metric(metric)} {best.score(metric):.4f}"
    if equal:
        names = truncate_names([model.name for model in equal])
        verb = "is" if len(equal) == 1 else "are"
        reason += f"; {names} {verb} within one standard error of it on {len(best.predictions)} images"
    if prefer == "best":
        return Choice(best.name, reason)
    smaller = [model for model in equal if model.parameters <= best.parameters and model.macs <= best.macs]
    chosen = min([best, *smaller], key=lambda model: (model.parameters, model.macs))
    if chosen is best:
        return Choice(best.name, f"{reason}; no equally good one is smaller and faster")
    reason += f"; {chosen.name} is chosen (register.prefer: small), with {chosen.parameters:,} instead of "
    return Choice(
        chosen.name, f"{reason}{best.parameters:,} parameters and {chosen.macs:,} instead of {best.macs:,} MACs"
    )


def _is_equal(best: ValidatedModel, model: ValidatedModel, metric: SelectionMetric) -> bool:
    actual, new = (best.predictions[name].to_numpy(object) for name in ("actual", "predicted"))
    found = compare_metric(actual, new, model.predictions["predicted"].to_numpy(object), metric, alpha=0.05, seed=0)
    # One image of difference is exactly one standard error, but for rounding.
    return found.gain <= found.standard_error + 1e-12
