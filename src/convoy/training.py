"""Training: a classifier and its data through Lightning, the best epoch by validation kept."""

import dataclasses
import logging
import math
import platform
import sys
import warnings
from importlib.metadata import version
from typing import Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, TQDMProgressBar
from torch import Tensor

from convoy.classifier import Classifier
from convoy.config import ConvoyError, Count, schema
from convoy.datamodule import ImageData


@schema
class Train:
    """What all architectures have in common when they are trained."""

    max_epochs: Count
    accelerator: Literal["auto", "cpu", "gpu", "mps", "tpu"]  # auto: a GPU where there is one
    threads: Count  # of the CPU; sums are split among them, so their number is part of what makes the same bits


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training leaves."""

    weights: dict[str, Tensor]  # of the best epoch, on the CPU
    history: list[dict[str, float]]  # for each epoch, from 1: epoch, lr, and loss and accuracy on train and val
    best: dict[str, float]  # the row of `history` with the highest val_accuracy, then the lowest val_loss
    environment: dict[str, str | int]  # what the bits depend on beside code, settings and data


def fit(classifier: Classifier, data: ImageData, params: Train) -> Trained:
    """Train `classifier` on `data`: the same bits for the same settings, data, versions, instruction set and threads.

    Raises ConvoyError where the loss is no longer a number.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # batches come whole from memory
    warnings.filterwarnings("ignore", ".*log_every_n_steps.*")  # logged by epoch
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)  # Lightning 2.6 on torch 2.15
    torch.set_num_threads(params.threads)
    keeper = BestEpoch()
    terminal = sys.stderr.isatty()
    trainer = Trainer(
        accelerator=params.accelerator,
        devices=1,
        max_epochs=params.max_epochs,
        deterministic=True,
        logger=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=terminal,
        callbacks=[keeper, TQDMProgressBar(refresh_rate=10)] if terminal else [keeper],
    )
    trainer.fit(classifier, data)
    return Trained(keeper.weights, keeper.history, keeper.best, environment(trainer, params))


class BestEpoch(Checkpoint):
    """Keeps the history of all epochs, and the weights of the best.

    A Checkpoint because Lightning calls those after all metrics of the epoch are in.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.weights: dict[str, Tensor] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: value.item() for name, value in sorted(trainer.callback_metrics.items())}
        number = trainer.current_epoch + 1
        epoch = {"epoch": number, "lr": trainer.optimizers[0].param_groups[0]["lr"], **metrics}
        self.history.append(epoch)
        if not all(map(math.isfinite, epoch.values())):
            name = type(pl_module).__name__.lower()
            raise ConvoyError(
                f"the loss of {name} is no longer a number in epoch {number}, "
                f"at a learning rate of {epoch['lr']:.3g}: lower model.{name}.recipe.lr"
            )
        if not self.best or _rank(epoch) > _rank(self.best):
            self.best = epoch
            self.weights = {name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()}
        if not trainer.progress_bar_callback:
            print(
                f"epoch {number}/{trainer.max_epochs}  loss {epoch['train_loss']:.4f}  "
                f"val_loss {epoch['val_loss']:.4f}  val_accuracy {epoch['val_accuracy']:.4f}",
                flush=True,
            )


def _rank(epoch: dict[str, float]) -> tuple[float, float]:
    return epoch["val_accuracy"], -epoch["val_loss"]


def environment(trainer: Trainer, params: Train) -> dict[str, str | int]:
    """The versions and the hardware that decide the bits."""
    device = trainer.strategy.root_device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in ("numpy", "pytorch-lightning", "torch")},
        "device": gpu or device.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": params.threads,
    }
