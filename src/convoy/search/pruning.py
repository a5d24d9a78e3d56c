"""The callback that reports a training to Optuna, and ends it early if other trials were better by the same epoch."""

import time

import optuna
import pytorch_lightning as lightning
from pytorch_lightning.callbacks import Callback

from convoy.core.config import SelectionMetric
from convoy.training.history import EpochHistory


class ReportTrial(Callback):
    """Report the validation metric of each epoch to a trial, and raise `optuna.TrialPruned` where its pruner says so.

    Args:
        trial: Trial that the training belongs to.
        metric: Metric on the validation images.
        deadline: Time by `time.monotonic()` after which the training ends with its epoch. None for no limit.
    """

    def __init__(self, trial: optuna.Trial, metric: SelectionMetric, deadline: float | None = None) -> None:
        self.trial = trial
        self.metric = metric
        self.deadline = deadline
        self.rows: list[dict[str, float]] = []

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Report the epochs before a checkpoint."""
        (history,) = (each for each in trainer.callbacks if isinstance(each, EpochHistory))  # type: ignore[attr-defined]
        self.rows = history.rows
        for row in self.rows:
            self._report(row)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Report the epoch, and end the training if it is to be pruned."""
        self._report(self.rows[-1])
        # There is nothing to save after the last epoch.
        if self.rows[-1]["epoch"] == trainer.max_epochs:
            return
        is_late = self.deadline is not None and time.monotonic() > self.deadline
        if is_late or self.trial.should_prune():
            raise optuna.TrialPruned

    def _report(self, row: dict[str, float]) -> None:
        self.trial.report(row[f"val_{self.metric}"], int(row["epoch"]))
