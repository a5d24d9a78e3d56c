"""The classifier: what every architecture is to Lightning, an abstract module from pixels to a trained class."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional

from convoy.config import Count, NotNegative, Positive, Share, schema
from convoy.datamodule import Augment
from convoy.task import Task


@schema
class Recipe:
    """How one architecture is trained."""

    batch_size: Count  # images in an optimizer step
    optimizer: Literal["sgd", "adamw"]  # sgd is with Nesterov momentum
    lr: Positive  # the highest learning rate, reached after the warm-up
    momentum: Share  # of sgd; beta1 of adamw
    weight_decay: NotNegative  # on weights; never on biases and norms
    warmup: Share  # of all steps: linear from 0 to lr, then a cosine to 0
    label_smoothing: Share  # probability mass moved from the true class to all classes
    augment: Augment


class Classifier(LightningModule, ABC):
    """Maps images, uint8 (N, H, W, C), to logits (N, K). A network defines `logits` and nothing else.

    Normalisation is part of the module (mean and std are buffers, saved with the weights), so that training
    and serving can't differ.
    """

    mean: Tensor
    std: Tensor

    # ABC is needed: LightningModule alone does not enforce @abstractmethod
    def __init__(self, task: Task, recipe: Recipe) -> None:
        super().__init__()
        self.task = task
        self.recipe = recipe
        self._sums: dict[str, Tensor] = {}  # of each split: loss, right answers, images
        self.register_buffer("mean", torch.tensor(task.mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(task.std).view(1, -1, 1, 1))

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) -> logits (N, K)."""

    def heads(self, x: Tensor) -> list[tuple[float, Tensor]]:
        """The weight in the loss and the logits (N, K) of every head that is trained."""
        return [(1.0, self.logits(x))]

    def normalise(self, pixels: Tensor) -> Tensor:
        """(N, H, W, C) uint8 -> (N, C, H, W) float, of mean 0 and standard deviation 1 in the training set."""
        # whole rows at a time: over channels that lie side by side, the loops would be three values long
        width = pixels.shape[2]
        mean, std = (values.flatten().repeat(width) for values in (self.mean, self.std))  # (W * C,)
        rows = pixels.flatten(2).float().div_(255).sub_(mean).div_(std)  # (N, H, W * C)
        return rows.unflatten(2, (width, -1)).permute(0, 3, 1, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, H, W, C) uint8 -> logits (N, K)."""
        return self.logits(self.normalise(pixels))

    # What Lightning calls while it trains. Loss and accuracy are summed on the device, and read once an epoch.

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, labels = batch
        heads = self.heads(self.normalise(pixels))
        self._add("train", heads[0][1].detach(), labels)
        smoothing = self.recipe.label_smoothing
        losses = [
            weight * functional.cross_entropy(logits, labels, label_smoothing=smoothing) for weight, logits in heads
        ]
        return torch.stack(losses).sum()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        pixels, labels = batch
        self._add("val", self(pixels), labels)

    def on_train_epoch_start(self) -> None:
        self._sums["train"] = torch.zeros(3, device=self.device)

    def on_validation_epoch_start(self) -> None:
        self._sums["val"] = torch.zeros(3, device=self.device)

    def on_train_epoch_end(self) -> None:
        self._report("train")

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def _add(self, split: str, logits: Tensor, labels: Tensor) -> None:
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(dim=1) == labels).sum()
        self._sums[split] += torch.stack([loss, correct, torch.tensor(len(labels), device=loss.device)])

    def _report(self, split: str) -> None:
        loss, correct, count = self._sums[split].tolist()
        self.log_dict({f"{split}_loss": loss / count, f"{split}_accuracy": correct / count}, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        recipe = self.recipe
        decayed = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer: torch.optim.Optimizer
        if recipe.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
        else:
            optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.momentum, 0.999))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps, recipe.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warm_cosine(step: int, steps: int, warmup: float) -> float:
    """The share of the highest learning rate at `step` of `steps`: linear for `warmup` of them, then a cosine to 0
    (Loshchilov & Hutter 2017, without restarts)."""
    warm = warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))


@torch.inference_mode()
def predict(classifier: Classifier, pixels: np.ndarray, batch_size: int) -> np.ndarray:
    """Probabilities (N, K) float64 of images (N, H, W, C) uint8, in evaluation mode, on the classifier's device."""
    classifier.eval()
    batches = [
        classifier(torch.tensor(pixels[start : start + batch_size], device=classifier.device)).double().softmax(dim=1)
        for start in range(0, len(pixels), batch_size)
    ]
    return torch.cat(batches).cpu().numpy()
