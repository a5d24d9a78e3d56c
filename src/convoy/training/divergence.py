"""The callback that stops a training run whose loss diverges."""

import math
import time
from typing import Any

import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback

from convoy.training.optimizers import current_lr
from convoy.training.record import FailureInfo

# Multiple of the loss of random guessing above which the training is considered to diverge.
MAX_LOSS_RATIO = 1000
# Interval at which the loss is read from the device.
LOSS_CHECK_S = 1  # seconds


class TrainingDiverged(Exception):
    """Raised when a training run diverges.

    Args:
        failure: The reason and the position of the failure.
    """

    def __init__(self, failure: FailureInfo) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class StopOnDivergence(Callback):
    """Stop a training run whose loss is NaN or far above that of random guessing, and name the first such step.

    The loss is read once a second, and before a checkpoint is written, because reading it blocks the host.

    Args:
        classes: Number of classes.
    """

    def __init__(self, classes: int) -> None:
        self.max_loss = MAX_LOSS_RATIO * math.log(max(2, classes))
        self.first_bad_step = torch.tensor(-1)
        self.last_check = time.monotonic()
        self.step = 0
        # Learning rates of the steps since the last check.
        self.lrs: dict[int, float] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Move the flag to the device."""
        self.first_bad_step = self.first_bad_step.to(module.device)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the step, which `global_step` counts as done after its last batch, and its learning rate."""
        self.step = trainer.global_step
        self.lrs[self.step] = current_lr(trainer.optimizers[0])

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note the step if it is the first with a bad loss."""
        is_good = outputs["loss"] * trainer.accumulate_grad_batches < self.max_loss
        self.first_bad_step = torch.where((self.first_bad_step >= 0) | is_good, self.first_bad_step, self.step)
        # Several processes check together, when a checkpoint is due.
        if trainer.world_size == 1 and time.monotonic() > self.last_check + LOSS_CHECK_S:
            self.check(trainer)

    def on_validation_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Stop the training if it has diverged."""
        self.check(trainer)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stop the training, rather than write a checkpoint, if it has diverged."""
        self.check(trainer)

    def check(self, trainer: lightning.Trainer) -> None:
        """Raise TrainingDiverged if there was a bad step."""
        step = int(trainer.strategy.reduce(self.first_bad_step.clone(), reduce_op="max"))
        if step >= 0:
            epoch = step // count_steps_per_epoch(trainer) + 1
            reason = "the loss is NaN, or a thousand times the loss of random guessing"
            raise TrainingDiverged(FailureInfo(reason, epoch, step + 1, self.lrs[step]))
        self.last_check = time.monotonic()
        self.lrs.clear()


def count_steps_per_epoch(trainer: lightning.Trainer) -> int:
    """Return the number of optimizer steps in an epoch."""
    return int(trainer.num_training_batches // trainer.accumulate_grad_batches)
