"""The optimizer of a recipe, its learning-rate schedule, and the moving average of the weights."""

import math

import torch
from torch import Tensor

from convoy.models.base import Classifier
from convoy.recipe import RecipeConfig


def make_optimizer(classifier: Classifier) -> torch.optim.Optimizer:
    """Create the optimizer of the classifier's recipe.

    Biases and normalisation layers have no weight decay. Each parameter group's entry `lr_scale` is its fraction of the
    learning rate.
    """
    recipe = classifier.recipe
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in classifier.named_parameters():
        lr_scale = 1.0 if classifier.is_in_head(name) else recipe.backbone_lr_scale
        decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
        if parameter.requires_grad:
            groups.setdefault((lr_scale, decay), []).append(parameter)
    tables = [{"params": group, "lr_scale": scale, "weight_decay": decay} for (scale, decay), group in groups.items()]
    if recipe.optimizer == "sgd":
        nesterov = recipe.momentum > 0
        return torch.optim.SGD(tables, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, fused=True)
    return torch.optim.AdamW(tables, lr=recipe.lr, betas=(recipe.momentum, 0.999), fused=True)


def optimizer_state_keys(recipe: RecipeConfig) -> set[str]:
    """Return the keys of the state that the recipe's optimizer has for each parameter after its first step."""
    if recipe.optimizer == "adamw":
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"momentum_buffer"} if recipe.momentum else set()


def compute_lr_fraction(step: int, steps: int, warmup_fraction: float) -> float:
    """Compute the learning rate at a step, as a fraction of the peak learning rate.

    It rises linearly during the warm-up and then follows a cosine to 0 (Loshchilov & Hutter 2017, without restarts).

    Args:
        step: Step, from 0.
        steps: Number of steps of the complete training.
        warmup_fraction: Fraction of the steps used for the warm-up, in [0, 1].

    Returns:
        The fraction, in [0, 1].
    """
    warm = warmup_fraction * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1.0, steps - warm)))


def set_lr(optimizer: torch.optim.Optimizer, recipe: RecipeConfig, fraction: float) -> None:
    """Set the learning rate of each parameter group, and its momentum if the schedule is `one_cycle`.

    Args:
        optimizer: Optimizer made by `make_optimizer`.
        recipe: Training settings of the architecture.
        fraction: Fraction of the peak learning rate, in [0, 1].
    """
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr * fraction * group["lr_scale"]
        if recipe.schedule == "one_cycle":
            momentum = max(0.0, recipe.momentum - 0.1 * fraction)
            if recipe.optimizer == "sgd":
                group["momentum"] = momentum
            else:
                group["betas"] = (momentum, 0.999)


@torch.no_grad()
def update_ema(average: Classifier, classifier: Classifier, decay: float) -> None:
    """Update the exponential moving average of a classifier's weights in place.

    Args:
        average: The classifier that holds the average; its buffers become copies of those of `classifier`.
        classifier: The classifier that is trained.
        decay: Weight of the old average, in [0, 1).
    """
    torch._foreach_lerp_(list(average.parameters()), list(classifier.parameters()), 1 - decay)
    for kept, current in zip(average.buffers(), classifier.buffers(), strict=True):
        kept.copy_(current)
