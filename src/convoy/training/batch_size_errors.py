"""Error messages for batch sizes that can't be trained, with batch sizes that can."""

import gc
import math

import numpy as np
import torch

from convoy.models.base import Classifier
from convoy.training.datamodule import ImageData
from convoy.training.record import ResolvedTrainer

# Part of torch's error message for a batch norm over a single value.
BATCH_NORM_ERROR = "Expected more than 1 value per channel"


def describe_too_large(classifier: Classifier, data: ImageData, hardware: ResolvedTrainer) -> str:
    """Return the error message for a batch that exceeds the GPU's memory, with settings that fit."""
    gc.collect()
    name, processes = type(classifier).__name__.lower(), hardware.devices * hardware.nodes
    images_per_process = math.ceil(classifier.recipe.batch_size / processes)
    size = math.ceil(images_per_process / classifier.recipe.accumulate_grad_batches)
    # Lightning may have moved it to another device.
    classifier.to(data.train_store.device)
    fits = size // 2
    while fits and not fits_in_memory(classifier, data, hardware, fits):
        fits //= 2
    problem = f"{name}: a batch of {size} images does not fit into the memory of the GPU"
    if not fits:
        return f"{problem}, and neither does one image: use smaller images, or a smaller network"
    return (
        f"{problem}, but {fits} do: set model.{name}.recipe.batch_size={fits * processes}, "
        f"or model.{name}.recipe.accumulate_grad_batches={math.ceil(images_per_process / fits)} to keep the batch size"
    )


def describe_too_small(classifier: Classifier) -> str:
    """Return the error message for a batch norm that gets one image at a time, reduced to one pixel."""
    name = type(classifier).__name__.lower()
    return (
        f"{name}: batch norm can't be trained on one image at a time: raise model.{name}.recipe.batch_size, or lower "
        f"model.{name}.recipe.accumulate_grad_batches"
    )


def fits_in_memory(classifier: Classifier, data: ImageData, hardware: ResolvedTrainer, size: int) -> bool:
    """Return whether computing the gradients of a batch of `size` images fits into memory."""
    classifier.zero_grad()
    rows = np.arange(size) % len(data.train)
    try:
        pixels, _ = data.train_store.gather(rows)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=hardware.precision == "bfloat16"):
            heads = classifier.weighted_heads(classifier.normalise(pixels))
        torch.stack([logits.float().sum() for _, logits in heads]).sum().backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        classifier.zero_grad()
        torch.cuda.empty_cache()
    return True
