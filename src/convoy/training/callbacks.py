"""The callbacks that seed each step, average the weights, stop early and print a line per epoch."""

import datetime
import time
from typing import Any

import numpy as np
import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, WeightAveraging
from torch import Tensor

from convoy.core.config import SelectionMetric
from convoy.training.history import EpochHistory
from convoy.training.optimizers import compute_ema_decay


class SeedSteps(Callback):
    """Seed torch's random generators before each batch, so that a resumed training draws the same numbers.

    Args:
        seed: Seed of the training.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the generators."""
        sequence = np.random.SeedSequence([self.seed, trainer.current_epoch, batch_idx, trainer.global_rank])
        seed = int(sequence.generate_state(1, np.uint64)[0] >> 1)
        torch.default_generator.manual_seed(seed)
        if module.device.type == "cuda":
            torch.cuda.manual_seed(seed)


class EmaWeights(WeightAveraging):
    """Validate and keep the exponential moving average of the weights.

    Its decay is lower at the beginning, when the weights change most. The running statistics of batch norms are copied.

    Args:
        decay: Decay per step, in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        @torch.no_grad()
        def average(averages: list[Tensor], weights: list[Tensor], updates: Tensor | int) -> None:
            torch._foreach_lerp_(averages, weights, 1 - compute_ema_decay(decay, int(updates)))

        super().__init__(use_buffers=False, multi_avg_fn=average)


class StopEarly(EarlyStopping):
    """Early stopping on a metric that also holds for a training run that resumes after its last epoch.

    Args:
        metric: Metric on the validation images.
        patience: Epochs without improvement before the training stops.
    """

    def __init__(self, metric: SelectionMetric, patience: int) -> None:
        super().__init__(f"val_{metric}", mode="max", patience=patience, check_on_train_epoch_end=False)

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Stop at once if the patience was exhausted when the checkpoint was written."""
        trainer.should_stop = self.is_exhausted

    @property
    def is_exhausted(self) -> bool:
        """Whether this callback ends the training."""
        return self.wait_count >= self.patience


class EpochLog(Callback):
    """Print one line per epoch, for a log.

    Args:
        name: Name of the architecture.
        history: The history, of which the last row is printed.
    """

    def __init__(self, name: str, history: EpochHistory) -> None:
        self.name = name
        self.history = history

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Start the clock."""
        self.started, self.first_step = time.monotonic(), trainer.global_step

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Print the metrics, the speed and the time that is left."""
        if not trainer.is_global_zero:
            return
        row, epochs = self.history.rows[-1], trainer.max_epochs
        seconds_per_step = (time.monotonic() - self.started) / max(1, trainer.global_step - self.first_step)
        images_per_step = trainer.datamodule.train_loader.sampler.images_per_step  # type: ignore[attr-defined]
        steps_left = trainer.global_step / row["epoch"] * (epochs - row["epoch"])  # type: ignore[operator]
        left = datetime.timedelta(seconds=round(steps_left * seconds_per_step))
        print(
            f"{self.name}  epoch {row['epoch']}/{epochs}  loss {row['train_loss']:.4f}  "
            f"val_loss {row['val_loss']:.4f}  val_accuracy {row['val_accuracy']:.4f}  "
            f"{images_per_step / seconds_per_step:,.0f} images/s  {left} left",
            flush=True,
        )
