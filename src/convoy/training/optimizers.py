"""The optimizer of a recipe, its learning-rate schedule, and the decay of the weight average."""

import math

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from convoy.models.base import Classifier
from convoy.recipe import RecipeConfig

# Difference between the largest and the smallest momentum of the one-cycle schedule (Smith & Topin 2018).
MOMENTUM_CYCLE = 0.1


def make_optimizer(classifier: Classifier) -> torch.optim.Optimizer:
    """Create the optimizer of the classifier's recipe.

    Biases and normalisation layers have no weight decay. Biases and the backbone have learning rates of their own.
    """
    recipe = classifier.recipe
    peak_lr = recipe.lr * (recipe.batch_size / recipe.lr_batch_size if recipe.lr_batch_size else 1.0)
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in classifier.named_parameters():
        lr_scale = 1.0 if classifier.is_in_head(name) else recipe.backbone_lr_scale
        lr_scale *= recipe.bias_lr_scale if name.endswith("bias") else 1.0
        decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
        if parameter.requires_grad:
            groups.setdefault((lr_scale, decay), []).append(parameter)
    tables = [
        {"params": group, "lr": peak_lr * lr_scale, "lr_scale": lr_scale, "weight_decay": decay}
        for (lr_scale, decay), group in groups.items()
    ]
    # Lightning does not clip the gradients of a fused optimizer in mixed precision.
    is_fused = recipe.grad_clip_norm == 0
    if recipe.optimizer == "sgd":
        nesterov = recipe.momentum > 0
        return torch.optim.SGD(tables, momentum=recipe.momentum, nesterov=nesterov, fused=is_fused)
    return torch.optim.AdamW(tables, betas=(recipe.momentum, 0.999), fused=is_fused)


def make_schedule(optimizer: torch.optim.Optimizer, recipe: RecipeConfig, steps: int) -> LRScheduler:
    """Create the learning-rate schedule of a recipe, which is advanced after each optimizer step.

    Args:
        optimizer: Optimizer made by `make_optimizer`.
        recipe: Training settings of the architecture.
        steps: Number of steps of the complete training.
    """
    if recipe.schedule == "one_cycle":
        # OneCycleLR divides by zero if one of its two phases has one step.
        warm = min(max(1.5, recipe.warmup_fraction * steps), steps - 0.5)
        return OneCycleLR(
            optimizer,
            [group["lr"] for group in optimizer.param_groups],
            total_steps=steps,
            pct_start=warm / steps,
            base_momentum=max(0.0, recipe.momentum - MOMENTUM_CYCLE),
            max_momentum=recipe.momentum,
        )
    return LambdaLR(optimizer, lambda step: compute_lr_fraction(step, steps, recipe.warmup_fraction, recipe.schedule))


def compute_lr_fraction(step: int, steps: int, warmup_fraction: float, schedule: str = "cosine") -> float:
    """Compute the learning rate at a step, as a fraction of the peak learning rate.

    It rises linearly during the warm-up and then falls to 0, either along a cosine (Loshchilov & Hutter 2017, without
    restarts) or linearly.

    Args:
        step: Step, from 0.
        steps: Number of steps of the complete training.
        warmup_fraction: Fraction of the steps used for the warm-up, in [0, 1].
        schedule: How it falls: "cosine" or "linear".

    Returns:
        The fraction, in [0, 1].
    """
    warm = warmup_fraction * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = (step - warm) / max(1.0, steps - warm)
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """Return the learning rate of the weights of the heads."""
    return next(group["lr"] for group in optimizer.param_groups if group["lr_scale"] == 1)


def compute_ema_decay(ema_decay: float, updates: int) -> float:
    """Compute the decay of the weight average, which rises at the beginning, when the weights change most.

    Args:
        ema_decay: Decay of the recipe, in [0, 1).
        updates: Number of updates of the average so far.
    """
    return min(ema_decay, (1 + updates) / (10 + updates))
