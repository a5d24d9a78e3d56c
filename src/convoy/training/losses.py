"""The training loss of a batch, and the metrics that are summed over an epoch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def compute_loss(
    heads: Sequence[tuple[float, Tensor]],
    labels: Tensor,
    targets: Tensor,
    class_weights: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Compute the training loss of a batch, and the metrics of its main head.

    Args:
        heads: The weight in the loss and the logits (N, K) float32 of each head, the main head first.
        labels: Labels (N,) int64.
        targets: `labels`, or the fraction of each class (N, K) float if images are mixed.
        class_weights: Weights (K,) float32 of the classes in the loss. None weights all classes equally.
        label_smoothing: Probability mass moved from the true class to all classes, in [0, 1].

    Returns:
        The loss, a scalar, summed over the images and weighted over the heads; and the result of `batch_metrics`.
    """
    losses = [
        functional.cross_entropy(logits, targets, class_weights, label_smoothing=label_smoothing, reduction="sum")
        for _, logits in heads
    ]
    is_cross_entropy = targets is labels and not label_smoothing and class_weights is None
    metrics = batch_metrics(heads[0][1].detach(), labels, losses[0].detach() if is_cross_entropy else None)
    return torch.stack([weight * loss for (weight, _), loss in zip(heads, losses, strict=True)]).sum(), metrics


def batch_metrics(logits: Tensor, labels: Tensor, loss: Tensor | None = None) -> Tensor:
    """Compute the metrics of a batch as sums over its images.

    Args:
        logits: Logits (N, K).
        labels: Labels (N,) int64.
        loss: The summed cross-entropy, if it is already known.

    Returns:
        The loss, the number of correct predictions and the number of images, as (3,) float32 on the batch's device.
    """
    if loss is None:
        loss = functional.cross_entropy(logits, labels, reduction="sum")
    correct = (logits.argmax(dim=1) == labels).sum()
    return torch.stack([loss, correct, torch.full_like(correct, len(labels))])
