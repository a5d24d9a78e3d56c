"""The Lightning module that trains a classifier."""

from typing import Any

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.nn import functional

from convoy.models.base import Classifier
from convoy.training.augmentation import augment, mix
from convoy.training.datamodule import Batch
from convoy.training.optimizers import make_optimizer, make_schedule


class ClassifierModule(lightning.LightningModule):
    """Lightning module that trains a classifier by its recipe.

    Metrics are summed on the device, in `train_totals`, `val_totals` and `val_counts`, and read once per epoch by
    `EpochHistory`.

    Args:
        classifier: The network; it is trained in place.
        class_weights: Weights (K,) float32 of the classes in the loss. None weights all classes equally.
        compile: Whether to compile the network by `torch.compile`.
    """

    class_weights: Tensor | None

    def __init__(self, classifier: Classifier, class_weights: Tensor | None = None, *, compile: bool = False) -> None:
        super().__init__()
        self.classifier = classifier
        self.recipe = classifier.recipe
        self.weighted_heads = torch.compile(classifier.weighted_heads) if compile else classifier.weighted_heads
        self.register_buffer("class_weights", class_weights, persistent=False)
        # Sums over the epoch: loss, correct predictions, images. No buffers, which weight averaging would average.
        self.train_totals, self.val_totals = torch.zeros(3), torch.zeros(3)
        # Validation images of each class: classified correctly, there are, predicted.
        self.val_counts = torch.zeros(3, len(classifier.info.classes))
        if self.recipe.backbone_lr_scale == 0:
            for name, parameter in classifier.named_parameters():
                parameter.requires_grad_(classifier.is_in_head(name))

    def configure_optimizers(self) -> Any:
        """Create the optimizer and the learning-rate schedule of the recipe."""
        optimizer = make_optimizer(self.classifier)
        # `trainer.estimated_stepping_batches` would load the data before the checkpoint's position is restored.
        steps = self.trainer.max_epochs * self.trainer.datamodule.steps_per_epoch  # type: ignore[attr-defined, operator]
        schedule = make_schedule(optimizer, self.recipe, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Move the totals to the device."""
        self.train_totals, self.val_totals = self.train_totals.to(self.device), self.val_totals.to(self.device)
        self.classifier.train()

    def on_train_start(self) -> None:
        """Switch the batch norms of a frozen backbone to evaluation mode, so that their statistics do not change."""
        if self.recipe.backbone_lr_scale == 0:
            for name, layer in self.classifier.named_modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not self.classifier.is_in_head(name):
                    layer.eval()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the training loss of a batch, and add its metrics to `train_totals`."""
        pixels, labels = batch
        # Not in bfloat16, whose 8 significant bits are too few for a coordinate in an image.
        with torch.autocast(self.device.type, enabled=False):
            pixels = augment(pixels, self.recipe.augment)
        x = self.classifier.normalise(pixels)
        x, targets = mix(x, labels, len(self.classifier.info.classes), self.recipe.augment)
        heads = [(weight, logits.float()) for weight, logits in self.weighted_heads(x)]
        loss, main_loss = self.compute_loss(heads, targets)
        is_cross_entropy = targets is labels and not self.recipe.label_smoothing and self.class_weights is None
        known_loss = main_loss.detach() if is_cross_entropy else None
        self.train_totals += compute_metrics(heads[0][1].detach(), labels, known_loss)
        return loss

    def compute_loss(self, heads: list[tuple[float, Tensor]], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the training loss of a batch.

        Args:
            heads: The weight in the loss and the logits (N, K) float32 of each head, the main head first.
            targets: Labels (N,) int64, or the fraction of each class (N, K) float if images are mixed.

        Returns:
            The mean over the images of the weighted sum over the heads, and the sum over the images of the main head's
            loss; both are scalars.
        """
        criterion = nn.CrossEntropyLoss(
            self.class_weights, reduction="sum", label_smoothing=self.recipe.label_smoothing
        )
        losses = [criterion(logits, targets) for _, logits in heads]
        total = torch.stack([weight * loss for (weight, _), loss in zip(heads, losses, strict=True)]).sum()
        return total / len(targets), losses[0]

    def on_validation_epoch_start(self) -> None:
        """Reset the validation metrics, and share the running statistics of the first process."""
        self.val_totals = torch.zeros(3, device=self.device)
        self.val_counts = torch.zeros(self.val_counts.shape, device=self.device)
        # Validate with the running statistics of the first process, which are the ones that are saved.
        if self.trainer.world_size > 1:
            for buffer in self.classifier.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the metrics of a validation batch to `val_totals` and `val_counts`."""
        pixels, labels = batch
        # In float32, as in inference.
        with torch.autocast(self.device.type, enabled=False):
            logits = self.classifier(pixels)
        self.val_totals += compute_metrics(logits, labels)
        classes = torch.arange(logits.shape[1], device=self.device)
        actual, predicted = labels[:, None] == classes, logits.argmax(dim=1)[:, None] == classes
        self.val_counts += torch.stack([actual & predicted, actual, predicted]).sum(dim=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the totals over all processes."""
        checkpoint["train_totals"] = self.trainer.strategy.reduce(self.train_totals.clone(), reduce_op="sum")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the totals, in the first process only because they are over all processes."""
        if self.global_rank == 0:
            self.train_totals = checkpoint["train_totals"]


def compute_metrics(logits: Tensor, labels: Tensor, loss: Tensor | None = None) -> Tensor:
    """Compute the metrics of a batch as sums over its images.

    Args:
        logits: Logits (N, K).
        labels: Labels (N,) int64.
        loss: The summed cross-entropy, if it is already known.

    Returns:
        The cross-entropy, the number of correct predictions and the number of images, as (3,) float32.
    """
    if loss is None:
        loss = functional.cross_entropy(logits, labels, reduction="sum")
    correct = (logits.argmax(dim=1) == labels).sum()
    return torch.stack([loss, correct, torch.full_like(correct, len(labels))])
