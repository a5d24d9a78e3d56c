"""The finder: a first guess of the learning rate, from one short training in which it grows (Smith 2017)."""

import numpy as np
import pandas as pd
import torch

from convoy.errors import ConvoyError
from convoy.models.base import Classifier
from convoy.recipe import TrainConfig
from convoy.training.datamodule import ImageData
from convoy.training.hardware import ResolvedTrainer
from convoy.training.module import ClassifierModule, too_large

LOWEST, HIGHEST = 1e-5, 10.0
STEPS = 150
SMOOTH = 0.9  # decay, in a step, of the running mean of the loss
HOPELESS = 4  # times the lowest loss so far


def sweep_learning_rates(classifier: Classifier, data: ImageData, choice: ResolvedTrainer) -> pd.DataFrame:
    """The smoothed loss at each learning rate: a row for each step, with the columns lr and loss.

    The rate grows by the same factor from step to step until the loss has left all hope; the weights are spoilt.
    Raises ConvoyError as `training.fit` does.
    """
    try:
        return _tried(classifier, data, choice)
    except torch.OutOfMemoryError:
        pass
    raise ConvoyError(too_large(classifier, data, choice))  # here, where the error no longer holds what is in memory


def _tried(classifier: Classifier, data: ImageData, choice: ResolvedTrainer) -> pd.DataFrame:
    device = torch.device("cuda" if choice.accelerator == "gpu" else "cpu")
    torch.set_num_threads(choice.threads)
    once = TrainConfig(max_epochs=1, patience=0, max_minutes=0.0, checkpoint_minutes=1.0)
    training = ClassifierModule(classifier, data, once, choice, None).to(device)
    training.sums = training.sums.to(device)
    training.progress.close()
    optimizer = training.configure_optimizers()
    data.share(device, 0, 1)
    rows: list[dict[str, float]] = []
    mean = 0.0
    for number, lr in enumerate(np.geomspace(LOWEST, HIGHEST, STEPS)):
        data.epoch, step = divmod(number, data.steps)
        training.seed(number)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"]
        pixels, labels = data.batch(step)
        optimizer.zero_grad()
        loss = 0.0
        for piece in training.pieces(pixels, labels):
            part = training.loss(*piece) / len(labels)
            part.backward()
            loss += part.item()
        optimizer.step()
        mean = SMOOTH * mean + (1 - SMOOTH) * loss
        rows.append({"lr": lr, "loss": mean / (1 - SMOOTH ** (number + 1))})
        lowest = min(row["loss"] for row in rows)
        if not rows[-1]["loss"] < HOPELESS * lowest:
            break
    return pd.DataFrame(rows)


def suggest_learning_rate(table: pd.DataFrame) -> float:
    """The learning rate at which the loss falls fastest, of those before its lowest.

    Raises ConvoyError where the loss was a number too seldom to tell.
    """
    falling = table[np.isfinite(table["loss"])].reset_index(drop=True)
    if len(falling) < 2:
        raise ConvoyError(f"the loss is no number at a learning rate of {LOWEST:g} already: set clip_norm to 1.0")
    until = max(2, int(falling["loss"].idxmin()) + 1)
    slopes = np.gradient(falling["loss"].to_numpy())[:until]
    return float(falling["lr"].iloc[int(slopes.argmin())])
