"""Embeddings of images: what the last layer of a network sees of them."""

from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from convoy.models.base import Classifier


@torch.inference_mode()
def embed(classifier: Classifier, images: Iterable[np.ndarray], batch_size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Compute the input of a network's last layer with weights, and its predictions.

    Args:
        classifier: The network; it is left in evaluation mode.
        images: N images (H, W, C) uint8 of its input size, one or more.
        batch_size: Number of images per forward pass.

    Returns:
        The embeddings (N, D) float32, and the indices (N,) of the predicted classes.
    """
    classifier.eval()
    inputs: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[:] = arguments[:1]

    # The last layer to run is the one whose input is kept last, whatever the network calls it.
    layers = [layer for layer in classifier.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    embeddings, predicted, remaining = [], [], iter(images)
    try:
        while batch := list(islice(remaining, batch_size)):
            logits = classifier(torch.tensor(np.stack(batch), device=classifier.mean.device))
            predicted.append(logits.argmax(dim=1).cpu())
            (found,) = inputs
            # A convolution as the last layer sees feature maps (N, D, H, W).
            embeddings.append((found.mean((2, 3)) if found.ndim == 4 else found.flatten(1)).float().cpu())
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(embeddings).numpy(), torch.cat(predicted).numpy()
