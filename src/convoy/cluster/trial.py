"""What a worker of a Ray cluster runs for a trial of a search."""

import contextlib
import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as lightning
import ray
from pytorch_lightning.callbacks import Callback
from ray import tune

from convoy.cluster.worker import SharedImages
from convoy.core.errors import ConvoyError
from convoy.models.base import Classifier
from convoy.recipe import TrainConfig
from convoy.training.datamodule import ImageDataModule
from convoy.training.history import EpochHistory
from convoy.training.record import ResolvedTrainer
from convoy.training.trainer import fit

# Keys of a report: the selection metric, the epoch, the history, whether the training ended by itself, and why it
# failed.
SCORE, EPOCH, ROWS, COMPLETE, FAILURE = "score", "epoch", "rows", "is_complete", "failure"


@dataclasses.dataclass(frozen=True)
class TrialJob:
    """The training of a trial, as it is sent to a worker."""

    classifier: Classifier
    train: SharedImages
    val: SharedImages
    params: TrainConfig
    hardware: ResolvedTrainer


def train(config: Mapping[str, Any]) -> None:
    """Train with the settings of a trial.

    Args:
        config: A reference to the `TrialJob`, under "job".
    """
    job: TrialJob = ray.get(config["job"])
    metric = f"val_{job.params.selection_metric}"
    data = ImageDataModule(job.train.open(), job.val.open(), job.classifier.recipe, job.params.seed)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            trained = fit(job.classifier, data, job.params, job.hardware, None, [ReportEpochs(metric)])
    except ConvoyError as error:
        tune.report({SCORE: 0.0, EPOCH: 0, ROWS: [], COMPLETE: False, FAILURE: str(error)})
        return
    failure = trained.failure.reason if trained.failure else ""
    tune.report(
        {
            SCORE: trained.best.get(metric, 0.0),
            EPOCH: len(trained.history),
            ROWS: trained.history,
            COMPLETE: not failure,
            FAILURE: failure,
        }
    )


class ReportEpochs(Callback):
    """Report each epoch to Ray Tune, which may then end the trial.

    Args:
        metric: Column of the history.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Report the epoch, except the last one, which the end of the trial reports."""
        (history,) = (each for each in trainer.callbacks if isinstance(each, EpochHistory))  # type: ignore[attr-defined]
        row = history.rows[-1]
        if row["epoch"] < (trainer.max_epochs or 0):
            report = {SCORE: row[self.metric], EPOCH: row["epoch"], ROWS: history.rows}
            tune.report(report | {COMPLETE: False, FAILURE: ""})
