"""The decision to stop a training at the end of an epoch."""

from collections.abc import Mapping

from convoy.recipe import TrainConfig


def find_reason_to_stop(params: TrainConfig, epoch: int, best: Mapping[str, float], minutes: float) -> str:
    """Return the setting that ends the training after the current epoch, or an empty string.

    Args:
        params: Settings that limit the length of the training.
        epoch: Number of completed epochs.
        best: Row of the best epoch in the history; empty before the first epoch has ended.
        minutes: Training time so far.
    """
    if epoch >= params.max_epochs:
        return "max_epochs"
    if params.patience and epoch - int(best.get("epoch", 0)) >= params.patience:
        return "patience"
    # Another epoch as long as the average epoch so far would exceed the limit.
    if params.max_minutes and epoch and minutes * (1 + 1 / epoch) > params.max_minutes:
        return "max_minutes"
    return ""
