"""Resuming: an interrupted training ends bit-identical, and damaged checkpoints are not used."""

import dataclasses
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convoy import models
from convoy.training import module, termination
from convoy.training.checkpoint import Checkpoint
from convoy.training.record import ResolvedTrainer
from training_fixtures import CPU, are_equal, build, train


class Interrupted(Checkpoint):
    """Saves after every step, and ends the process, as it were, after so many."""

    def __init__(self, file: Path, after: int) -> None:
        super().__init__(file)
        self.left = after

    def save(self, state: dict[str, Any]) -> None:
        super().save(state)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


EVERYTHING = {
    "batch_size": 32,
    "augment": {"mixup": 0.2, "cutmix": 0.2, "random_erasing": 0.2},
    "ema_decay": 0.9,
    "class_balance": "sampler",
    "schedule": "one_cycle",
    "accumulate_grad_batches": 2,
    "grad_clip_norm": 1.0,
}


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("lenet", {}), ("alexnet", {}), ("lenet", EVERYTHING), ("resnet", EVERYTHING | {"optimizer": "adamw"})],
    ids=["lenet", "alexnet, which drops out", "lenet with everything", "resnet with everything, adamw"],
)
def test_training_resumes_bit_identically_after_any_step(name: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    interrupt_and_compare(tmp_path / "last.pt", CPU, name, **recipe)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_resumes_bit_identically(tmp_path: Path) -> None:
    interrupt_and_compare(tmp_path / "last.pt", dataclasses.replace(CPU, compile=True), "alexnet")


def interrupt_and_compare(file: Path, hardware: ResolvedTrainer, name: str, **recipe: Any) -> None:
    undisturbed = train(build(name=name, **recipe), hardware=hardware)
    for after in (1, 1, 2, 3, 1):  # of 3 epochs of 3 steps; at an epoch's end two saves follow each other
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(build(name=name, **recipe), 0, Interrupted(file, after), hardware, checkpoint_minutes=1e-9)
    resumed = train(build(name=name, **recipe), 0, Checkpoint(file), hardware)
    assert are_equal(resumed.weights, undisturbed.weights)
    assert resumed.history == undisturbed.history
    assert resumed.best == undisturbed.best


def test_finished_training_resumes_without_a_step(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "last.pt")
    first = train(build(), checkpoint=checkpoint)
    again = train(build(1), checkpoint=checkpoint)
    assert are_equal(first.weights, again.weights)
    assert first.history == again.history


def replace_at(*path: Any, value: Any) -> Callable[[dict[str, Any]], Any]:
    """A change of a state: the value at this path, or what a function makes of it."""

    def change(state: dict[str, Any]) -> dict[str, Any]:
        inner = state
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value(inner.get(path[-1])) if callable(value) else value
        return state

    return change


def fill_with_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}


NO_STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda state: list(state.values()),
    "a tensor": lambda state: torch.zeros(3),
    "nothing": lambda state: {},
    "weights alone": lambda state: state["classifier"],
    "keys that are numbers": lambda state: {1: state},
    "another key": replace_at("more", value=1),
    "no step": lambda state: {key: value for key, value in state.items() if key != "step"},
    "epoch -1": replace_at("epoch", value=-1),
    "epoch 2": replace_at("epoch", value=2),
    "epoch 10**9": replace_at("epoch", value=10**9),
    "epoch 1.0": replace_at("epoch", value=1.0),
    "epoch True": replace_at("epoch", value=True),
    "epoch as text": replace_at("epoch", value="1"),
    "epoch as a tensor": replace_at("epoch", value=torch.tensor(1)),
    "the epoch before": replace_at("epoch", value=0),
    "step -1": replace_at("step", value=-1),
    "step of another epoch": replace_at("step", value=4),
    "step 10**9": replace_at("step", value=10**9),
    "the step before": replace_at("step", value=1),
    "NaN minutes": replace_at("minutes", value=math.nan),
    "negative minutes": replace_at("minutes", value=-1.0),
    "weights of another network": replace_at("classifier", value={"layer": torch.zeros(2)}),
    "weights of another shape": replace_at("weights", "c1.weight", value=torch.zeros(2)),
    "weights of another type": replace_at("classifier", "c1.weight", value=Tensor.double),
    "a missing weight": replace_at("weights", value=lambda weights: dict(list(weights.items())[1:])),
    "NaN weights": replace_at("classifier", value=fill_with_nan),
    "NaN weights of the best epoch": replace_at("weights", value=fill_with_nan),
    "no weights of the best epoch": replace_at("weights", value={}),
    "an average that is not asked for": replace_at("average", value=lambda _: {}),
    "no optimizer": replace_at("optimizer", value={}),
    "an optimizer of other parameters": replace_at(
        "optimizer", value=lambda kept: {number + 1: kept[number] for number in kept}
    ),
    "a momentum of another shape": replace_at("optimizer", 0, "momentum_buffer", value=torch.zeros(1)),
    "NaN momentum": replace_at("optimizer", 0, value=fill_with_nan),
    "another optimizer": replace_at("optimizer", 0, value={"exp_avg": torch.zeros(1)}),
    "sums of another shape": replace_at("running_totals", value=torch.zeros(2)),
    "NaN sums": replace_at("running_totals", value=torch.tensor([math.nan, 1.0, 64.0])),
    "negative sums": replace_at("running_totals", value=torch.tensor([1.0, -1.0, 64.0])),
    "more correct than there are": replace_at("running_totals", value=torch.tensor([1.0, 65.0, 64.0])),
    "sums of more images": replace_at("running_totals", value=torch.tensor([1.0, 1.0, 96.0])),
    "sums as a list": replace_at("running_totals", value=[1.0, 1.0, 64.0]),
    "bad step -2": replace_at("first_bad_step", value=torch.tensor(-2)),
    "bad step 10**9": replace_at("first_bad_step", value=torch.tensor(10**9)),
    "a longer history": replace_at("history", value=lambda rows: rows * 2),
    "no history": replace_at("history", value=[]),
    "history without a column": replace_at("history", value=[{"epoch": 1}]),
    "history with NaN": replace_at("history", value=lambda rows: [rows[0] | {"val_loss": math.nan}]),
    "history with text": replace_at("history", value=lambda rows: [rows[0] | {"lr": "high"}]),
    "another best epoch": replace_at("best", value=lambda row: row | {"val_accuracy": 1.0, "val_loss": 0.0}),
    "no best epoch": replace_at("best", value={}),
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a training of 3 epochs of 3 steps, after 5 steps."""
    file = tmp_path_factory.mktemp("begun") / "last.pt"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(build(), checkpoint=Interrupted(file, after=6), checkpoint_minutes=1e-9)
    return file


@pytest.mark.parametrize("change", NO_STATES.values(), ids=NO_STATES.keys())
def test_invalid_checkpoint_is_named_and_not_used(
    change: Callable[[dict[str, Any]], Any], interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Checkpoint(tmp_path / "last.pt")
    state = torch.load(interrupted, weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 2)
    torch.save(change(state), checkpoint.file)
    trained = train(build(), checkpoint=checkpoint, max_epochs=3)
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{checkpoint.file} can't be used, so the training starts from the beginning: ")
    assert len(first) < len(str(checkpoint.file)) + 400
    assert not any("resuming" in line for line in others)
    assert [row["epoch"] for row in trained.history] == [1, 2, 3]
    # and it is replaced by a good one
    assert train(build(1), checkpoint=checkpoint).history == trained.history


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize(
    "recipe", [{"momentum": 0.0}, {"optimizer": "adamw", "ema_decay": 0.5, "accumulate_grad_batches": 2}], ids=str
)
def test_every_architecture_resumes_from_its_checkpoint(
    name: str, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe | {"batch_size": 32}
    for after in (1, 3):
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(build(name=name, **recipe), 0, Interrupted(tmp_path / "last.pt", after), checkpoint_minutes=1e-9)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(build(name=name, **recipe), 0, Interrupted(tmp_path / "last.pt", 1), checkpoint_minutes=1e-9)
    said = capsys.readouterr().out
    assert "resuming after 0 epochs and 1 steps" in said
    assert "resuming after 1 epochs and 0 steps" in said
    assert "can't be used" not in said


@pytest.mark.parametrize("where", ["_step", "on_train_batch_end", "on_validation_epoch_start", "on_train_epoch_end"])
def test_sigterm_saves_what_is_done_and_exits_with_143(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    undisturbed = train(build())
    checkpoint = Checkpoint(tmp_path / "last.pt")
    original = getattr(module.ClassifierModule, where)
    calls = []

    def terminated(self: module.ClassifierModule, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(module.ClassifierModule, where, terminated)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as raised:
        train(build(), checkpoint=checkpoint)
    assert raised.value.code == 143
    assert capfd.readouterr().err.count("SIGTERM: the training saves its state and ends") == 1
    assert signal.getsignal(signal.SIGTERM) is before
    state = checkpoint.load()
    assert state is not None
    assert (state["epoch"], state["step"]) == {
        "_step": (0, 2), "on_train_batch_end": (1, 3), "on_validation_epoch_start": (1, 3), "on_train_epoch_end": (2, 0)
    }[where]  # fmt: skip
    monkeypatch.undo()
    assert are_equal(train(build(), checkpoint=checkpoint).weights, undisturbed.weights)


def test_sigterm_ends_a_hung_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless:
        def __del__(self) -> None:
            time.sleep(60)  # Python drops what is raised here

    def hang(self: module.ClassifierModule, step: int) -> None:
        signal.raise_signal(signal.SIGTERM)
        Endless()
        time.sleep(60)

    dropped: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)
    monkeypatch.setattr(termination, "SIGTERM_GRACE_S", 1.5)
    monkeypatch.setattr(module.ClassifierModule, "_step", hang)
    begun = time.monotonic()
    with pytest.raises(SystemExit) as raised:
        train(build())
    assert raised.value.code == 143
    assert [type(each.exc_value) for each in dropped] == [SystemExit]
    assert time.monotonic() - begun < 30
    dropped.clear()


def test_full_disk_costs_the_checkpoint_and_not_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way of the folder")
    trained = train(build(), checkpoint=Checkpoint(tmp_path / "file" / "last.pt"))
    assert len(trained.history) == 3
    assert "no checkpoint could be written" in capsys.readouterr().out
