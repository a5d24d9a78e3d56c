"""The checkpoint: the state of a training on disk, always whole, from which it goes on to the same bits."""

import math
import os
import textwrap
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import InstanceOf, ValidationError
from torch import Tensor

from convoy.config import NotNegative, Whole, schema

Tensors = dict[str, InstanceOf[Tensor]]


class Checkpoint:
    """One file, replaced in one step: whoever reads it finds the last state that was written whole, or none."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def save(self, state: dict[str, Any]) -> None:
        """Write tensors and plain values. Raises OSError where it can't; then the state before is still there."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_suffix(f".{os.getpid()}")  # on the same file system, so that it can take the name
        try:
            with beside.open("wb") as opened:
                torch.save(state, opened)
                opened.flush()
                os.fsync(opened.fileno())
            beside.replace(self.file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(*getattr(error.__context__, "args", (str(error),))) from error
        finally:
            beside.unlink(missing_ok=True)
        folder = os.open(self.file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too
        finally:
            os.close(folder)

    def load(self, check: Callable[[dict[str, Any]], None] = lambda state: None) -> dict[str, Any] | None:
        """Return the last state, its tensors on the CPU; None where there is none.

        Where it can't be read, or `check` raises, one line says so, and None is returned as well.
        """
        try:
            with zipfile.ZipFile(self.file) as archive:  # which has a checksum for each tensor, that torch ignores
                if spoiled := archive.testzip():
                    raise ValueError(f"{spoiled} is damaged")
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise ValueError(f"it holds a {type(state).__name__}")
            check(state)
            return state
        except FileNotFoundError:
            return None
        # torch raises whatever a broken file leads it to, and so may a check of what such a file holds
        except Exception as error:
            print(f"{self.file} can't be used, so the training starts from the beginning: {_reason(error)}", flush=True)
            return None

    def remove(self) -> None:
        """Remove the file, and its folder where nothing else is in it."""
        self.file.unlink(missing_ok=True)
        for left in self.file.parent.glob(f"{self.file.stem}.*"):
            left.unlink()  # of a process that was killed while it wrote
        if self.file.parent.is_dir() and not any(self.file.parent.iterdir()):
            self.file.parent.rmdir()


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'][0].lower()}{first['msg'][1:]}"
    said = textwrap.shorten(str(error), 200)
    return said if type(error) is ValueError else f"{type(error).__name__}: {said}"


@schema
class State:
    """What a checkpoint of a training holds: all that the training depends on from there on."""

    epoch: Whole  # epochs done
    step: Whole  # steps done in the epoch under way
    minutes: NotNegative  # trained so far
    classifier: Tensors
    average: Tensors | None  # the running mean of the weights
    optimizer: dict[int, Tensors]  # of each parameter, by its number
    sums: InstanceOf[Tensor]  # (3,) of the epoch under way: loss, correct predictions, images
    bad_step: InstanceOf[Tensor]  # () the first step with a loss that is NaN or too large; -1
    history: list[dict[str, int | float]]
    best: dict[str, int | float]
    weights: Tensors  # of the best epoch

    def check(
        self,
        *,
        epochs: int,
        steps: int,
        batch_size: int,
        columns: Sequence[str],
        weights: Mapping[str, Tensor],
        parameters: Sequence[Tensor],
        kept: set[str],
    ) -> None:
        """Raise ValueError where a training of so many epochs of so many steps can't be in this state.

        `columns` are those of its history, `weights` the classifier's at any moment, `parameters` those that the
        optimizer trains, in its order, and `kept` the names of what it keeps of each.
        """
        done = self.epoch * steps + self.step
        if self.step > steps or done > epochs * steps:
            raise ValueError(
                f"epoch {self.epoch}, step {self.step} of a training of {epochs} epochs, {steps} steps each"
            )
        if [row.get("epoch") for row in self.history] != list(range(1, self.epoch + 1)):
            raise ValueError(f"the history of {self.epoch} epochs has other epochs")
        for row in self.history:
            if set(row) != set(columns) or min(row["train_accuracy"], row["val_accuracy"], row["lr"]) < 0:
                raise ValueError(f"no row of a history: {row}")
        if self.best != max(self.history, key=merit, default={}):
            raise ValueError("the best epoch is not the best of the history")
        _check_tensors("classifier", self.classifier, weights)
        if self.average is not None:
            _check_tensors("average", self.average, weights)
        _check_tensors("weights", self.weights, weights if self.epoch else {})
        _check_tensors("sums", {"": self.sums, "bad": self.bad_step}, {"": torch.zeros(3), "bad": torch.tensor(-1)})
        _, correct, images = self.sums.tolist()
        # in float32, where more than 16 million images are no longer counted one by one
        if not 0 <= correct <= images or not math.isclose(images, self.step * batch_size, rel_tol=1e-3):
            raise ValueError(f"sums of {self.sums.tolist()} after {self.step} steps of {batch_size} images")
        if not -1 <= self.bad_step < epochs * steps:
            raise ValueError(f"bad_step {int(self.bad_step)}")
        if set(self.optimizer) != set(range(len(parameters)) if done and kept else ()):
            raise ValueError("the optimizer has other parameters")
        for number, tensors in self.optimizer.items():
            own = {name: torch.tensor(0.0) if name == "step" else parameters[number] for name in kept}
            _check_tensors(f"optimizer.{number}", tensors, own)
            if "step" in tensors and tensors["step"] != done:
                raise ValueError(f"the optimizer has done {tensors['step']} steps of {done}")


def merit(epoch: Mapping[str, float]) -> tuple[float, float]:
    """By which epochs are compared: accuracy, then loss."""
    return epoch["val_accuracy"], -epoch["val_loss"]


def _check_tensors(name: str, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise ValueError where names, shapes or types are not as in `own`, or a number is NaN or infinite."""
    if set(tensors) != set(own):
        raise ValueError(f"{name}: other names than those of this network")
    for key, tensor in tensors.items():
        if (tensor.shape, tensor.dtype, tensor.layout) != (own[key].shape, own[key].dtype, torch.strided):
            raise ValueError(f"{name}.{key}: {list(tensor.shape)} {tensor.dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}.{key}: NaN or infinite")
