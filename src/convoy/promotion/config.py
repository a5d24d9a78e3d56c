"""Promotion: which of the trained architectures is the challenger, and what it must show to become the champion."""

from collections.abc import Mapping

from convoy.config import Name, schema
from convoy.promotion.gate import GateConfig


@schema
class RegisterConfig:
    """Where runs and models go, and what a model must show."""

    name: Name  # of the MLflow experiment and of the registered model
    gate: GateConfig


def rank(best: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The architectures, best first: by highest validation accuracy, then by lowest validation loss, then by name.

    `best` holds the best epoch of each architecture. Test figures take no part: a model that is chosen by them
    looks better than it is.
    """
    return sorted(best, key=lambda name: (-best[name]["val_accuracy"], best[name]["val_loss"], name))
