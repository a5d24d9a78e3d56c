"""The checkpoint file, from which a training resumes with bit-identical results."""

import math
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import InstanceOf, ValidationError
from torch import Tensor

from convoy.core.config import NonNegativeFloat, NonNegativeInt, describe_validation_error, schema
from convoy.core.errors import describe_error

Tensors = dict[str, InstanceOf[Tensor]]


class Checkpoint:
    """Checkpoint file that is replaced atomically, so that it always holds the last completely written state.

    Args:
        file: Path of the checkpoint.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def save(self, state: dict[str, Any]) -> None:
        """Write a state atomically.

        Args:
            state: Tensors and plain values.

        Raises:
            OSError: If the file cannot be written; the previous state is kept.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # Write to the same file system, so that the file can be renamed.
        temporary = self.file.with_suffix(f".{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.file)
        # Torch raises this if the disk is full.
        except RuntimeError as error:
            raise OSError(*getattr(error.__context__, "args", (str(error),))) from error
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(self.file.parent, os.O_RDONLY)
        try:
            # The rename must be on disk, too.
            os.fsync(folder)
        finally:
            os.close(folder)

    def load(self, check: Callable[[dict[str, Any]], None] = lambda state: None) -> dict[str, Any] | None:
        """Load the last state, with its tensors on the CPU.

        Args:
            check: Called with the state; it raises an exception if the state is invalid.

        Returns:
            The state, or None if there is none. If the file cannot be read or is invalid, the reason is printed, and
            None is returned.
        """
        try:
            # The archive has a checksum for each tensor, which torch does not verify.
            with zipfile.ZipFile(self.file) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} is damaged")
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError(f"it holds a {type(state).__name__} instead of a dict")
            check(state)
            return state
        except FileNotFoundError:
            return None
        # Torch may raise any exception for a broken file, and so may the check of its contents.
        except Exception as error:
            print(
                f"{self.file} can't be used, so the training starts from the beginning: {_describe_reason(error)}",
                flush=True,
            )
            return None

    def remove(self) -> None:
        """Remove the file, and its folder if that is then empty."""
        self.file.unlink(missing_ok=True)
        # A process that was killed while writing leaves its temporary file.
        for leftover in self.file.parent.glob(f"{self.file.stem}.*"):
            leftover.unlink()
        if self.file.parent.is_dir() and not any(self.file.parent.iterdir()):
            self.file.parent.rmdir()


def _describe_reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return describe_validation_error(error)
    message = describe_error(error, 200)
    return message if type(error) is ValueError else f"{type(error).__name__}: {message}"


@schema
class State:
    """Contents of a checkpoint: the state that the rest of the training depends on."""

    epoch: NonNegativeInt  # completed epochs
    step: NonNegativeInt  # completed steps in the current epoch
    minutes: NonNegativeFloat  # training time so far
    classifier: Tensors  # state dict of the trained weights
    average: Tensors | None  # state dict of the exponential moving average of the weights
    optimizer: dict[int, Tensors]  # index of a parameter -> its optimizer state
    running_totals: InstanceOf[Tensor]  # (3,); sums over the current epoch: loss, correct predictions, images
    first_bad_step: InstanceOf[Tensor]  # (); first step with a loss that is NaN or too large, or -1
    history: list[dict[str, int | float]]  # one row per completed epoch
    best: dict[str, int | float]  # row of the best epoch
    weights: Tensors  # state dict of the best epoch

    def check(
        self,
        *,
        epochs: int,
        steps: int,
        batch_size: int,
        columns: Sequence[str],
        weights: Mapping[str, Tensor],
        parameters: Sequence[Tensor],
        state_keys: set[str],
    ) -> None:
        """Check that a training can be in this state.

        Args:
            epochs: Largest number of epochs of the training.
            steps: Steps per epoch.
            batch_size: Images per step.
            columns: Keys of a row of the history.
            weights: State dict of the classifier, for names, shapes and dtypes.
            parameters: Parameters that the optimizer trains, in its order.
            state_keys: Keys of the optimizer state of each parameter.

        Raises:
            ValueError: If the training cannot be in this state.
        """
        done = self.epoch * steps + self.step
        if self.step > steps or done > epochs * steps:
            raise ValueError(
                f"epoch {self.epoch}, step {self.step} of a training of {epochs} epochs with {steps} steps each"
            )
        if [row.get("epoch") for row in self.history] != list(range(1, self.epoch + 1)):
            raise ValueError(f"the history does not hold the epochs 1 to {self.epoch}")
        for row in self.history:
            if set(row) != set(columns) or min(row["train_accuracy"], row["val_accuracy"], row["lr"]) < 0:
                raise ValueError(f"not a row of a history: {row}")
        if self.best != max(self.history, key=ranking_key, default={}):
            raise ValueError("the best epoch is not the best of the history")
        _check_tensors("classifier", self.classifier, weights)
        if self.average is not None:
            _check_tensors("average", self.average, weights)
        _check_tensors("weights", self.weights, weights if self.epoch else {})
        _check_tensors("running_totals", {"": self.running_totals}, {"": torch.zeros(3)})
        _check_tensors("first_bad_step", {"": self.first_bad_step}, {"": torch.tensor(-1)})
        _, correct, images = self.running_totals.tolist()
        # The sums are float32, which counts exactly only up to 16 million images.
        if not 0 <= correct <= images or not math.isclose(images, self.step * batch_size, rel_tol=1e-3):
            raise ValueError(
                f"running_totals {self.running_totals.tolist()} after {self.step} steps of {batch_size} images"
            )
        if not -1 <= self.first_bad_step < epochs * steps:
            raise ValueError(f"first_bad_step {int(self.first_bad_step)}")
        if set(self.optimizer) != set(range(len(parameters)) if done and state_keys else ()):
            raise ValueError("the optimizer state is of other parameters")
        for number, tensors in self.optimizer.items():
            own = {name: torch.tensor(0.0) if name == "step" else parameters[number] for name in state_keys}
            _check_tensors(f"optimizer.{number}", tensors, own)
            if "step" in tensors and tensors["step"] != done:
                raise ValueError(f"the optimizer has taken {tensors['step']} steps instead of {done}")


def ranking_key(epoch: Mapping[str, float]) -> tuple[float, float]:
    """Return the sort key that ranks epochs by validation accuracy, then by validation loss."""
    return epoch["val_accuracy"], -epoch["val_loss"]


def _check_tensors(name: str, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise ValueError if names, shapes or dtypes differ from `own`, or if a value is NaN or infinite."""
    if set(tensors) != set(own):
        raise ValueError(f"{name}: its names are not those of this network")
    for key, tensor in tensors.items():
        if (tensor.shape, tensor.dtype, tensor.layout) != (own[key].shape, own[key].dtype, torch.strided):
            raise ValueError(f"{name}.{key}: {list(tensor.shape)} {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}.{key}: NaN or infinite")
