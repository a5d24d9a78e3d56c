"""The callback that records the metrics of each epoch and keeps the best weights."""

import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from convoy.core.config import SelectionMetric
from convoy.core.selection_metric import selection_score
from convoy.training.divergence import TrainingDiverged, count_steps_per_epoch
from convoy.training.module import ClassifierModule
from convoy.training.optimizers import current_lr
from convoy.training.record import FailureInfo

# Keys of a row of the training history, which may have more.
COLUMNS = ["epoch", "lr", "train_accuracy", "train_loss", "val_accuracy", "val_loss"]


class EpochHistory(Callback):
    """Record the metrics of each epoch, and keep the weights of the best one.

    It must come before `EmaWeights`, which puts the averaged weights into the network only while it is validated.

    Args:
        metric: Metric on the validation images by which the best epoch is kept. Unless it is the accuracy, the rows
            have one more column for it.
    """

    def __init__(self, metric: SelectionMetric) -> None:
        self.metric = metric
        self.rows: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.weights: dict[str, Tensor] = {}
        self.lr = 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the learning rate, which the schedule changes after the step."""
        self.lr = current_lr(trainer.optimizers[0])

    def on_validation_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Append the epoch to the history, and keep its weights if it is the best so far."""
        assert isinstance(module, ClassifierModule)
        totals = trainer.strategy.reduce(torch.stack([module.train_totals, module.val_totals]), reduce_op="sum")
        (loss, correct, count), (val_loss, val_correct, val_count) = totals.tolist()
        row = {
            "epoch": trainer.current_epoch + 1,
            "lr": self.lr,
            "train_accuracy": correct / count,
            "train_loss": loss / count,
            "val_accuracy": val_correct / val_count,
            "val_loss": val_loss / val_count,
        }
        if not math.isfinite(row["val_loss"]):
            step = (trainer.current_epoch + 1) * count_steps_per_epoch(trainer)
            reason = "the validation loss is NaN or infinite"
            raise TrainingDiverged(FailureInfo(reason, trainer.current_epoch + 1, step, self.lr))
        if self.metric != "accuracy":
            counts = trainer.strategy.reduce(module.val_counts, reduce_op="sum")
            row[f"val_{self.metric}"] = float(selection_score(self.metric, *counts.cpu().numpy()))
        self.rows.append(row)
        if not self.best or ranking_key(row, self.metric) > ranking_key(self.best, self.metric):
            self.best = row
            self.weights = {
                name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                for name, value in module.classifier.state_dict().items()
            }
        module.train_totals = torch.zeros_like(module.train_totals)
        shown = {name: row[name] for name in dict.fromkeys(("train_loss", "val_accuracy", f"val_{self.metric}"))}
        module.log_dict(shown, prog_bar=True, sync_dist=trainer.world_size > 1)

    def state_dict(self) -> dict[str, Any]:
        """Return the history and the best weights."""
        return {"rows": self.rows, "best": self.best, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history and the best weights."""
        self.rows, self.best, self.weights = state_dict["rows"], state_dict["best"], state_dict["weights"]


def ranking_key(epoch: Mapping[str, float], metric: SelectionMetric) -> tuple[float, float]:
    """Return the sort key that ranks epochs by a metric on the validation images, then by the validation loss."""
    return epoch[f"val_{metric}"], -epoch["val_loss"]
