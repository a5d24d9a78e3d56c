"""The result of a training: the best weights, the history, and the reason why it ended."""

import dataclasses

from torch import Tensor

from convoy.training.record import FailureInfo

# Keys of a row of the training history.
COLUMNS = ["epoch", "lr", "train_accuracy", "train_loss", "val_accuracy", "val_loss"]


class TrainingDiverged(Exception):
    """Raised when a training diverges; `ClassifierModule.failure` holds the details."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Result of a training; if it failed, it covers the epochs before the failure."""

    weights: dict[str, Tensor]  # state dict of the best epoch, on the CPU
    history: list[dict[str, float]]  # one row per epoch, with the keys `COLUMNS`; epochs count from 1
    best: dict[str, float]  # the row of `history` with the highest val_accuracy, then the lowest val_loss
    stopped: str  # setting that ended the training (max_epochs, patience or max_minutes), or "failure"
    failure: FailureInfo | None
