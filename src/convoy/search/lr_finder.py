"""The learning-rate finder: a short training with an increasing learning rate (Smith 2017)."""

import numpy as np
import pandas as pd
import torch

from convoy.core.errors import ConvoyError
from convoy.models.base import Classifier
from convoy.recipe import TrainConfig
from convoy.training.batch_size_errors import describe_too_large
from convoy.training.datamodule import ImageData, split_batch
from convoy.training.module import ClassifierModule
from convoy.training.record import ResolvedTrainer
from convoy.training.seeding import seed_step

# Range of the learning rates.
MIN_LR, MAX_LR = 1e-5, 10.0
# Number of learning rates, each tried for one step.
SWEEP_STEPS = 150
# Decay per step of the moving average of the loss.
LOSS_SMOOTHING = 0.9
# The sweep ends when the smoothed loss reaches this multiple of its minimum so far.
DIVERGENCE_RATIO = 4


def sweep_learning_rates(classifier: Classifier, data: ImageData, hardware: ResolvedTrainer) -> pd.DataFrame:
    """Train with an exponentially increasing learning rate until the loss diverges, and record the smoothed loss.

    Args:
        classifier: The classifier; its weights are not usable afterwards.
        data: Images to train on.
        hardware: Hardware, precision and number of threads.

    Returns:
        A table with one row per step, `SWEEP_STEPS` rows at most, and the columns `lr` and `loss`.

    Raises:
        ConvoyError: If a batch does not fit into the memory of the GPU.
    """
    try:
        return _sweep(classifier, data, hardware)
    except torch.OutOfMemoryError:
        pass
    # Not in the except block, where the error still references the tensors that fill the memory.
    raise ConvoyError(describe_too_large(classifier, data, hardware))


def _sweep(classifier: Classifier, data: ImageData, hardware: ResolvedTrainer) -> pd.DataFrame:
    device = torch.device("cuda" if hardware.accelerator == "gpu" else "cpu")
    torch.set_num_threads(hardware.threads)
    params = TrainConfig(seed=data.seed, max_epochs=1, patience=0, max_minutes=0.0, checkpoint_minutes=1.0)
    module = ClassifierModule(classifier, data, params, hardware).to(device)
    module.running_totals = module.running_totals.to(device)
    module.progress.close()
    optimizer = module.configure_optimizers()
    data.set_rank(device, 0, 1)
    rows: list[dict[str, float]] = []
    mean = 0.0
    for number, lr in enumerate(np.geomspace(MIN_LR, MAX_LR, SWEEP_STEPS)):
        data.epoch, step = divmod(number, data.steps)
        seed_step(data.seed, number, data.rank, device)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        pixels, labels = data.batch(step)
        optimizer.zero_grad()
        loss = 0.0
        for micro_batch in split_batch(pixels, labels, module.recipe.accumulate_grad_batches):
            micro_batch_loss = module.compute_loss(*micro_batch) / len(labels)
            micro_batch_loss.backward()
            loss += micro_batch_loss.item()
        optimizer.step()
        mean = LOSS_SMOOTHING * mean + (1 - LOSS_SMOOTHING) * loss
        rows.append({"lr": lr, "loss": mean / (1 - LOSS_SMOOTHING ** (number + 1))})
        lowest = min(row["loss"] for row in rows)
        if not rows[-1]["loss"] < DIVERGENCE_RATIO * lowest:
            break
    return pd.DataFrame(rows)


def suggest_learning_rate(table: pd.DataFrame) -> float:
    """Return the learning rate with the steepest decrease of the loss, among those up to its minimum.

    Args:
        table: The result of `sweep_learning_rates`.

    Raises:
        ConvoyError: If the loss is finite for fewer than two learning rates.
    """
    falling = table[np.isfinite(table["loss"])].reset_index(drop=True)
    if len(falling) < 2:
        raise ConvoyError(f"the loss is NaN even at a learning rate of {MIN_LR:g}: set grad_clip_norm to 1.0")
    until = max(2, int(falling["loss"].idxmin()) + 1)
    slopes = np.gradient(falling["loss"].to_numpy())[:until]
    return float(falling["lr"].iloc[int(slopes.argmin())])
