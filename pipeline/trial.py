"""The training of one trial of a search, on training and validation images alone."""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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

# Ray is an extra.
if TYPE_CHECKING:
    from convoy.cluster.training import Cluster
    from convoy.cluster.trial import TrialJob
    from convoy.cluster.worker import SharedImages

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
        cluster: The cluster on which the trials run; None for this machine.
    """

    def __init__(self, stage: Stage, jobs: int, cluster: "Cluster | None" = None) -> None:
        self.stage = stage
        self.jobs = jobs
        self.architecture = stage.foreach_key
        self.params = stage.validate(TrainConfig, "train")
        self.cluster = cluster
        self.trainer = None if cluster else stage.validate(TrainerConfig, "trainer")
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
        self.note(trial, trained.history, trained.failure.reason if trained.failure else "")
        remove_checkpoint(checkpoint)
        return trained.best.get(f"val_{params.selection_metric}", 0.0), trained.failure is None

    def note(self, trial: optuna.Trial, rows: Sequence[Mapping[str, float]], failure: str = "") -> None:
        """Note the epochs of a training run, the best of them, and why it failed, if it did, in its trial."""
        best = max(rows, key=lambda row: ranking_key(row, self.params.selection_metric), default={})
        trial.set_user_attr(HISTORY, rows)
        trial.set_user_attr(BEST, best)
        if failure:
            trial.set_user_attr(FAILURE, failure)

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
        if self.trainer is None:
            return classifier, self.worker[0], start
        hardware = resolve_trainer(dataclasses.replace(self.trainer, devices=1, num_nodes=1), classifier)
        hardware = resolve_determinism(hardware, classifier)
        threads = min(hardware.threads, max(1, joblib.cpu_count(only_physical_cores=True) // self.jobs))
        return classifier, dataclasses.replace(hardware, strategy="auto", threads=threads), start

    @functools.cached_property
    def worker(self) -> tuple[ResolvedTrainer, dict[str, str | int]]:
        """Hardware of a worker of the cluster for the present settings, and its environment."""
        assert self.cluster
        settings = self.stage.section(f"model.{self.architecture}")
        return self.cluster.describe_worker(models.build(self.architecture, settings, self.info))

    def share(self, settings: Mapping[str, Any], seed: int) -> "TrialJob":
        """Return the training of a trial, for a worker of the cluster."""
        from convoy.cluster.trial import TrialJob

        classifier, hardware, _ = self.build(settings, seed)
        return TrialJob(classifier, *self.shared_images, dataclasses.replace(self.params, seed=seed), hardware)

    @functools.cached_property
    def shared_images(self) -> "tuple[SharedImages, SharedImages]":
        """Training and validation images, for the workers of the cluster."""
        assert self.cluster
        train, val = (self.cluster.share(Images.load(self.images, split), split) for split in ("train", "val"))
        return train, val

    def describe(self, settings: Mapping[str, Any]) -> TrainingRecord:
        """Return the training record of a trial, without its results."""
        classifier, hardware, start = self.build(settings, self.params.seed)
        machine = self.worker[1] if self.cluster else describe_environment(hardware)
        fingerprint = self.fingerprint(settings, self.params.seed)
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
