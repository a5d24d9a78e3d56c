"""Promotion settings, and the ranking that selects the challenger among the trained architectures."""

from collections.abc import Mapping

from convoy.core.config import Name, schema
from convoy.promotion.gate import GateConfig


@schema
class RegisterConfig:
    """Where runs and models are registered, and the criteria for a promotion."""

    name: Name  # name of the MLflow experiment and of the registered model
    gate: GateConfig


def rank(best: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Rank architectures, best first, by validation accuracy, then by validation loss, then by name.

    Test metrics are excluded on purpose: the test metrics of a model that was selected by them are biased upwards.

    Args:
        best: The metrics of each architecture's best epoch, with the keys `val_accuracy` and `val_loss`.
    """
    return sorted(best, key=lambda name: (-best[name]["val_accuracy"], best[name]["val_loss"], name))
