"""The learning-rate finder: a short training with an increasing learning rate (Smith 2017)."""

import dataclasses
import tempfile

import numpy as np
import pandas as pd
from pytorch_lightning.tuner import Tuner

from convoy.core.errors import ConvoyError
from convoy.models.base import Classifier
from convoy.training.datamodule import ImageDataModule
from convoy.training.record import ResolvedTrainer
from convoy.training.trainer import explain_errors, make_module, make_trainer

# Range of the learning rates.
MIN_LR, MAX_LR = 1e-5, 10.0
# Number of learning rates, each tried for one step.
SWEEP_STEPS = 150


def sweep_learning_rates(classifier: Classifier, data: ImageDataModule, hardware: ResolvedTrainer) -> pd.DataFrame:
    """Train with an exponentially increasing learning rate until the loss diverges, and record the smoothed loss.

    All layers have the same learning rate, whatever `backbone_lr_scale` is.

    Args:
        classifier: The classifier.
        data: Images to train on.
        hardware: Hardware, precision and number of threads; one device is used.

    Returns:
        A table with one row per step, `SWEEP_STEPS` rows at most, and the columns `lr` and `loss`.

    Raises:
        ConvoyError: If a batch does not fit into the memory of the GPU.
    """
    alone = dataclasses.replace(hardware, devices=1, num_nodes=1, strategy="auto")
    with tempfile.TemporaryDirectory() as folder, explain_errors(classifier):
        trainer = make_trainer(
            classifier, alone, max_epochs=SWEEP_STEPS, enable_checkpointing=False, default_root_dir=folder
        )
        module = make_module(classifier, data, alone)
        finder = Tuner(trainer).lr_find(
            module, datamodule=data, min_lr=MIN_LR, max_lr=MAX_LR, num_training=SWEEP_STEPS, update_attr=False
        )
    assert finder
    return pd.DataFrame(finder.results)


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
