"""The training of one trial of a search, on training and validation images alone."""

import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import joblib
import optuna
import torch

from convoy import models
from convoy.core.artifact_names import DATA_PROFILE, DATASET_INFO
from convoy.core.hashing import hash_json
from convoy.data.packed.arrays import Images
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models.base import Classifier
from convoy.recipe import TrainConfig
from convoy.search.pruning import ReportTrial
from convoy.training import init_weights
from convoy.training.checkpoint import remove_checkpoint
from convoy.training.datamodule import ImageDataModule
from convoy.training.determinism import resolve_determinism
from convoy.training.hardware import TrainerConfig, describe_environment, resolve_trainer
from convoy.training.history import ranking_key
from convoy.training.record import ResolvedTrainer, TrainingRecord
from convoy.training.trainer import fit
from pipeline.stage import Stage
from pipeline.train import describe_training, fetch_weights

# The files of prepared images that a search opens. Settings that were chosen by the test images would look better on
# them than they are, so their files are not among these.
IMAGE_FILES = (DATASET_INFO, *(f"{split}_{part}.npy" for split in ("train", "val") for part in ("pixels", "labels")))
# User attributes of a trial: the rows of its epochs, the best of them, and why it failed.
HISTORY, BEST, FAILURE = "history", "best", "failure"


class TrialTrainer:
    """Trains an architecture with the settings of a trial, as the train stage would, but on one device.

    Args:
        stage: The train stage of the architecture.
        jobs: Trials that run at the same time, among which the processor is divided.
    """

    def __init__(self, stage: Stage, jobs: int) -> None:
        self.stage = stage
        self.jobs = jobs
        self.architecture = stage.foreach_key
        self.params = stage.validate(TrainConfig, "train")
        self.trainer = stage.validate(TrainerConfig, "trainer")
        self.prepared = stage.input("preprocess", only=[*IMAGE_FILES, DATA_PROFILE])
        self.images = stage.input(stage.images_name(), only=IMAGE_FILES)
        self.info = DatasetInfo.load(self.images / DATASET_INFO)
        self.identity = stage.fingerprint("search", jobs)
        self.checkpoints = stage.project_root / "artifacts/.cache/tuning/checkpoints"

    def train(
        self, trial: optuna.Trial, settings: Mapping[str, Any], seed: int, deadline: float | None = None
    ) -> tuple[float, bool]:
        """Train, and note the epochs and the best of them in the trial.

        A trial that another process has begun continues from its checkpoint.

        Args:
            trial: The trial.
            settings: Settings of the architecture.
            seed: Seed of the training.
            deadline: Time by `time.monotonic()` after which the training ends. None for no limit.

        Returns:
            The selection metric on the validation images, 0 if the training failed in its first epoch; and whether
            the training was completed.

        Raises:
            optuna.TrialPruned: If the trial was pruned, or the time is up.
        """
        params = dataclasses.replace(self.params, seed=seed)
        report = ReportTrial(trial, params.selection_metric, deadline)
        checkpoint = self.checkpoints / self.fingerprint(settings, seed)[:12] / "last.ckpt"
        try:
            classifier, hardware, _ = self.build(settings, seed)
            data = ImageDataModule(
                Images.load(self.images, "train"), Images.load(self.images, "val"), classifier.recipe, seed
            )
            # A line for each epoch would hide those of the trials. The progress bar of a terminal stays.
            with contextlib.redirect_stdout(io.StringIO()):
                trained = fit(classifier, data, params, hardware, checkpoint, [report])
        except optuna.TrialPruned:
            self.note(trial, report.rows)
            remove_checkpoint(checkpoint)
            raise
        self.note(trial, trained.history)
        remove_checkpoint(checkpoint)
        if trained.failure:
            trial.set_user_attr(FAILURE, trained.failure.reason)
        return trained.best.get(f"val_{params.selection_metric}", 0.0), trained.failure is None

    def note(self, trial: optuna.Trial, rows: Sequence[Mapping[str, float]]) -> None:
        """Note the epochs of a training run, and the best of them, in its trial."""
        best = max(rows, key=lambda row: ranking_key(row, self.params.selection_metric), default={})
        trial.set_user_attr(HISTORY, rows)
        trial.set_user_attr(BEST, best)

    def build(
        self, settings: Mapping[str, Any], seed: int
    ) -> tuple[Classifier, ResolvedTrainer, init_weights.InitialWeights]:
        """Build the classifier, choose the hardware for it, and describe its initial weights."""
        torch.manual_seed(seed)
        classifier = models.build(self.architecture, settings, self.info)
        classifier.init_from_images(Images.load(self.images, "train").pixels)
        start = init_weights.init_weights(
            classifier, self.architecture, settings, lambda init, folder: fetch_weights(self.stage, init, folder)
        )
        hardware = resolve_trainer(dataclasses.replace(self.trainer, devices=1, num_nodes=1), classifier)
        hardware = resolve_determinism(hardware, classifier)
        threads = min(hardware.threads, max(1, joblib.cpu_count(only_physical_cores=True) // self.jobs))
        return classifier, dataclasses.replace(hardware, strategy="auto", threads=threads), start

    def describe(self, settings: Mapping[str, Any]) -> TrainingRecord:
        """Return the training record of a trial, without its results."""
        classifier, hardware, start = self.build(settings, self.params.seed)
        fingerprint, machine = self.fingerprint(settings, self.params.seed), describe_environment(hardware)
        return describe_training(
            self.architecture,
            settings,
            self.params,
            hardware,
            classifier,
            self.prepared,
            start,
            fingerprint,
            machine,
        )

    def fingerprint(self, settings: Mapping[str, Any], seed: int) -> str:
        """Return the fingerprint of a training run in the search, as a hexadecimal sha256."""
        return hash_json([self.identity, settings, seed])
