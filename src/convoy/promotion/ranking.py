"""The ranking that selects the challenger among the trained architectures."""

from collections.abc import Mapping

from convoy.training.record import EpochMetrics


def rank(best: Mapping[str, EpochMetrics]) -> list[str]:
    """Rank architectures, best first, by validation accuracy, then by validation loss, then by name.

    Test metrics are excluded on purpose: the test metrics of a model that was selected by them are biased upwards.

    Args:
        best: The metrics of each architecture's best epoch.
    """
    return sorted(best, key=lambda name: (-best[name].val_accuracy, best[name].val_loss, name))
