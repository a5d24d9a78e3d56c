"""Promotion: which of the trained architectures is the best, and whether it is good enough to be registered."""

from collections.abc import Mapping

from convoy.config import ConvoyError, Share, schema


@schema
class Register:
    """Where runs and models go, and what a model must reach."""

    name: str  # of the MLflow experiment and of the registered model
    floor: Share  # validation accuracy below which nothing is registered


def rank(best: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The architectures, best first: by highest validation accuracy, then by lowest validation loss, then by name.

    `best` holds the best epoch of each architecture. Test figures take no part: a model that is chosen by them
    looks better than it is.
    """
    return sorted(best, key=lambda name: (-best[name]["val_accuracy"], best[name]["val_loss"], name))


def check_floor(name: str, best: Mapping[str, float], params: Register) -> None:
    """Raises ConvoyError where the chosen architecture is below the floor (or its score is no number)."""
    score = best["val_accuracy"]
    if not score >= params.floor:
        raise ConvoyError(
            f"{name} scored {score:.4f} in validation, below register.floor={params.floor}: nothing is registered"
        )
