"""What a worker of a Ray cluster runs: its part of a training run, and the report of each checkpoint."""

import contextlib
import dataclasses
import io
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as lightning
import ray
import ray.train
from pytorch_lightning.callbacks import Checkpoint
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer
from ray.util.queue import Queue

from convoy.core.errors import ConvoyError
from convoy.data.packed.arrays import Images
from convoy.models.base import Classifier
from convoy.recipe import TrainConfig
from convoy.training.checkpoint import AtomicCheckpointIO, ResumeCheckpoint
from convoy.training.datamodule import ImageDataModule
from convoy.training.determinism import resolve_determinism
from convoy.training.hardware import TrainerConfig, describe_environment, resolve_trainer
from convoy.training.history import EpochHistory
from convoy.training.record import ResolvedTrainer
from convoy.training.trainer import TrainResult, fit

CHECKPOINT = "last.ckpt"


@dataclasses.dataclass(frozen=True)
class SharedImages:
    """Images of a split as workers find them.

    Args:
        pixels: Pixels (N, H, W, C) uint8 in Ray's object store. None if workers read them from `folder`.
        labels: Labels (N,) int64.
        folder: Folder with the packed images.
        split: Name of the split.
    """

    pixels: "ray.ObjectRef | None"
    labels: np.ndarray
    folder: Path
    split: str

    def open(self) -> Images:
        """Return the images.

        Raises:
            ConvoyError: If this node can't read them.
        """
        if self.pixels is not None:
            return Images(ray.get(self.pixels), self.labels)
        try:
            images = Images.load(self.folder, self.split)
        except OSError as error:
            raise ConvoyError(
                f"node {socket.gethostname()} can't read the images ({error}): put the project on a disk that all "
                "nodes share, or raise trainer.max_upload_gb"
            ) from error
        if not np.array_equal(images.labels, self.labels):
            raise ConvoyError(
                f"node {socket.gethostname()} has other images in {self.folder}: all nodes must share one disk"
            )
        return images


@dataclasses.dataclass(frozen=True)
class Job:
    """A training run, as it is sent to the workers."""

    classifier: Classifier
    train: SharedImages
    val: SharedImages
    params: TrainConfig
    hardware: ResolvedTrainer
    environment: Mapping[str, str | int]  # in which the record says that it ran
    messages: Queue  # receives `{"line": text}` for each line that the first worker prints


class LineSender(io.TextIOBase):
    """A file that puts each line into a queue.

    Args:
        messages: The queue.
    """

    def __init__(self, messages: Queue) -> None:
        self.messages = messages
        self.text = ""

    def write(self, text: str) -> int:
        """Put the lines that are complete into the queue."""
        *lines, self.text = (self.text + text).split("\n")
        for line in lines:
            self.messages.put({"line": line})
        return len(text)


def describe_worker(
    trainer: TrainerConfig, classifier: Classifier, cpus: float
) -> tuple[ResolvedTrainer, dict[str, str | int]]:
    """Choose hardware, precision and threads for a training run by the node that this runs on, and describe them.

    Args:
        trainer: Settings of a worker.
        classifier: The network to train.
        cpus: Processors that are reserved for the worker.
    """
    hardware = resolve_determinism(resolve_trainer(trainer, classifier), classifier)
    if trainer.threads == "auto":
        hardware = dataclasses.replace(hardware, threads=max(1, min(hardware.threads, int(cpus))))
    return hardware, describe_environment(hardware)


def train(config: Mapping[str, Job]) -> TrainResult:
    """Train together with the other workers, from the last checkpoint that was reported.

    Args:
        config: The training, under "job".

    Raises:
        ConvoyError: If this node differs from the one that was described, or the training can't run.
    """
    job = config["job"]
    found = describe_environment(job.hardware)
    if different := [name for name, value in found.items() if value != job.environment[name]]:
        values = ", ".join(f"{name} {found[name]}, not {job.environment[name]}" for name in different)
        raise ConvoyError(
            f"node {socket.gethostname()} differs from the others, and so would its results ({values}): give the nodes "
            "the same packages and processors, or choose equal ones by trainer.resources"
        )
    data = ImageDataModule(job.train.open(), job.val.open(), job.classifier.recipe, job.params.seed)
    is_first = ray.train.get_context().get_world_rank() == 0
    output = contextlib.redirect_stdout(LineSender(job.messages)) if is_first else contextlib.nullcontext()
    with output, tempfile.TemporaryDirectory() as folder:
        if checkpoint := ray.train.get_checkpoint():
            checkpoint.to_directory(folder)
        file = Path(folder) / CHECKPOINT
        return fit(
            job.classifier,
            data,
            job.params,
            job.hardware,
            file,
            [ReportCheckpoint(file)],
            **(distributed_arguments() if job.hardware.num_nodes > 1 else {}),
        )


def distributed_arguments() -> dict[str, Any]:
    """Return the arguments of a Trainer for several workers.

    One worker trains without them: even alone, DDP rounds differently from a training run on one machine.
    """
    return {
        "strategy": RayDDPStrategy(),
        "plugins": [RayLightningEnvironment(), AtomicCheckpointIO()],
        # Ray's context has the number of workers, and the device of this one.
        "devices": "auto",
        "num_nodes": 1,
    }


class ReportCheckpoint(Checkpoint):
    """Report each checkpoint to Ray, which stores it, and the history with it.

    Args:
        file: The file that `ResumeCheckpoint` writes, in a folder of its own.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.reported = 0.0

    def setup(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        """Let Ray check the Trainer, and find the callbacks whose state is reported."""
        if trainer.world_size > 1:
            prepare_trainer(trainer)
        (self.resume,) = (each for each in trainer.callbacks if isinstance(each, ResumeCheckpoint))  # type: ignore[attr-defined]
        (self.history,) = (each for each in trainer.callbacks if isinstance(each, EpochHistory))  # type: ignore[attr-defined]
        self.reported = self.resume.last_save

    # Lightning calls the hooks of this callback after those of `ResumeCheckpoint`, which comes before it.

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report the checkpoint that was written after this step, if any."""
        self._report(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Report the checkpoint of the epoch."""
        self._report(trainer)

    def _report(self, trainer: lightning.Trainer) -> None:
        # All workers write a checkpoint at the same step, and have to report it together.
        if self.resume.last_save == self.reported:
            return
        self.reported = self.resume.last_save
        is_written = trainer.is_global_zero and self.file.exists()
        checkpoint = ray.train.Checkpoint.from_directory(str(self.file.parent)) if is_written else None
        ray.train.report({"rows": self.history.rows}, checkpoint=checkpoint)
