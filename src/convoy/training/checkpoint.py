"""The checkpoint from which a training run resumes bit-identically, and the callback that writes it."""

import os
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from convoy.core.errors import ConvoyError, describe_error
from convoy.training.history import COLUMNS
from convoy.training.termination import GracefulExit

# Steps after which the processes of a distributed training agree on whether to write a checkpoint and to exit.
SYNC_STEPS = 16


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replace the checkpoint atomically, so that it always holds the last completely written state."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: If the file cannot be written; the previous checkpoint is kept.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Write to the same file system, so that the file can be renamed.
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        # Torch raises this if the disk is full.
        except RuntimeError as error:
            raise OSError(*getattr(error.__context__, "args", (str(error),))) from error
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            # The rename must be on disk, too.
            os.fsync(folder)
        finally:
            os.close(folder)


class ResumeCheckpoint(Checkpoint):
    """Write a checkpoint within an epoch, at its end and on SIGTERM, where Lightning resumes bit-identically.

    That is where an optimizer step has just ended and the epoch has not, and where an epoch has ended. Elsewhere, as in
    a validation, Lightning would resume at another batch or without the validation metrics.

    Args:
        file: Path of the checkpoint. None disables checkpoints.
        minutes: Interval between checkpoints within an epoch.
        exit: The handler of SIGTERM, after which a checkpoint is written and the training exits.
        resumed_step: Steps that the checkpoint has, from which this training resumes.
    """

    def __init__(self, file: Path | None, minutes: float, exit: GracefulExit, resumed_step: int = 0) -> None:
        self.file = file
        self.minutes = minutes
        self.exit = exit
        self.resumed_step = resumed_step
        self.last_save = time.monotonic()

    def setup(self, trainer: lightning.Trainer, module: lightning.LightningModule, stage: str) -> None:
        """Check that processes that train together resume from the same step.

        Raises:
            ConvoyError: If only some machines have the checkpoint.
        """
        extremes = torch.tensor([self.resumed_step, -self.resumed_step], device=trainer.strategy.root_device)
        last, first = trainer.strategy.reduce(extremes, reduce_op="max").tolist()
        if last != -first:
            raise ConvoyError(
                f"the machines begin at different steps, {-first} and {last}, because not all have the checkpoint: put "
                "artifacts/.cache/checkpoints on a disk that they share, or remove it on all of them"
            )

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write a checkpoint if one is due, and exit after SIGTERM."""
        has_stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not has_stepped or batch_idx + 1 == trainer.num_training_batches:
            return
        if trainer.world_size > 1 and trainer.global_step % SYNC_STEPS:
            return
        is_terminated = self._is_any(trainer, self.exit.was_requested)
        if is_terminated or self._is_any(trainer, time.monotonic() > self.last_save + 60 * self.minutes):
            self._save(trainer)
        if is_terminated:
            self.exit.exit()

    # Lightning calls this hook of a `Checkpoint` after those of all other callbacks and of the module.
    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Write a checkpoint, and exit after SIGTERM."""
        self._save(trainer)
        if self._is_any(trainer, self.exit.was_requested):
            self.exit.exit()

    def _is_any(self, trainer: lightning.Trainer, decision: bool) -> bool:
        return trainer.strategy.reduce_boolean_decision(decision, all=False)

    def _save(self, trainer: lightning.Trainer) -> None:
        self.last_save = time.monotonic()
        if self.file is None:
            return
        try:
            trainer.save_checkpoint(self.file)
        except OSError as error:
            print(f"no checkpoint could be written ({error}); the training continues", flush=True)


def read_checkpoint(file: Path, module: lightning.LightningModule, max_epochs: int) -> dict[str, Any] | None:
    """Read a checkpoint, and check that the training can resume from it.

    Args:
        file: Path of the checkpoint.
        module: The module that is trained.
        max_epochs: Number of epochs of the training.

    Returns:
        The checkpoint, or None if there is none. If the file cannot be read or is invalid, the reason is printed, and
        None is returned.
    """
    try:
        # The archive has a checksum for each tensor, which torch does not verify.
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        _check(checkpoint, module, max_epochs)
        return checkpoint
    except FileNotFoundError:
        return None
    # Torch may raise any exception for a broken file, and so may the check of its contents.
    except Exception as error:
        message = describe_error(error, 200)
        reason = message if type(error) is ValueError else f"{type(error).__name__}: {message}"
        print(f"{file} can't be used, so the training starts from the beginning: {reason}", flush=True)
        return None


def remove_checkpoint(file: Path) -> None:
    """Remove a checkpoint, and its folder if that is then empty."""
    file.unlink(missing_ok=True)
    # A process that was killed while writing leaves its temporary file.
    for leftover in file.parent.glob(f"{file.stem}.*"):
        leftover.unlink()
    if file.parent.is_dir() and not any(file.parent.iterdir()):
        file.parent.rmdir()


def _check(checkpoint: Any, module: lightning.LightningModule, max_epochs: int) -> None:
    """Raise an exception if a checkpoint is not of this training."""
    history = checkpoint["callbacks"]["EpochHistory"]
    rows, own = history["rows"], module.state_dict()
    for part in ("loops", "optimizer_states", "lr_schedulers", "train_totals", "ImageDataModule"):
        if not len(checkpoint[part]):
            raise ValueError(f"it has no {part}")
    if not 0 <= checkpoint["epoch"] <= max_epochs or len(rows) > max_epochs:
        raise ValueError(f"epoch {checkpoint['epoch']} of a training run of {max_epochs} epochs")
    if any(not set(COLUMNS) <= set(row) for row in rows) or [row["epoch"] for row in rows] != list(
        range(1, len(rows) + 1)
    ):
        raise ValueError("it has no complete history")
    if history["best"] not in (rows or [{}]):
        raise ValueError("the best epoch is not in the history")
    best = {f"classifier.{name}": tensor for name, tensor in history["weights"].items()}
    totals = {"train_totals": checkpoint["train_totals"]}
    _check_tensors(checkpoint["state_dict"], own)
    _check_tensors(best, own if rows else {})
    _check_tensors(totals, {"train_totals": torch.zeros(3)})


def _check_tensors(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    if set(tensors) != set(own):
        raise ValueError("its weights are those of another network")
    for name, tensor in tensors.items():
        if (tensor.shape, tensor.dtype) != (own[name].shape, own[name].dtype) or not tensor.isfinite().all():
            raise ValueError(f"{name}: {list(tensor.shape)} {tensor.dtype}, or it holds NaN or infinity")
