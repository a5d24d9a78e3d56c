"""Resume: a training that was interrupted anywhere ends bit-identical to one that was not."""

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
from pytorch_lightning.callbacks import Callback, Checkpoint
from torch import Tensor

from convoy.training import termination
from convoy.training.trainer import TrainResult
from model_settings import every_network
from training_fixtures import CPU, are_equal, build, train

EVERYTHING = {
    "batch_size": 32,
    "augment": {"mixup": 0.2, "cutmix": 0.2, "random_erasing": 0.2},
    "ema_decay": 0.9,
    "class_balance": "sampler",
    "schedule": "one_cycle",
    "accumulate_grad_batches": 2,
    "grad_clip_norm": 1.0,
}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "lenet": ("lenet", {}),
    "alexnet, which drops out": ("alexnet", {}),
    "lenet with everything": ("lenet", EVERYTHING),
    "resnet with everything, adamw": ("resnet", EVERYTHING | {"optimizer": "adamw"}),
    "resnet, frozen": ("resnet", {"backbone_lr_scale": 0.0, "accumulate_grad_batches": 3}),
}
HOOKS = [
    "on_train_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
]


class Died(BaseException):
    """Ends a training at once, as SIGKILL would."""


def die() -> None:
    raise Died


def call_at(hook: str, count: int, action: Callable[[], None], kind: type[Callback] = Callback) -> Callback:
    """A callback that acts at the given call of a hook.

    Lightning calls a `Callback` before the checkpoint is written, and a `Checkpoint` after it.
    """
    calls = []

    def act(*_: Any, **__: Any) -> None:
        calls.append(1)
        if len(calls) == count:
            action()

    return type("CallAt", (kind,), {hook: act})()


def train_until_it_ends(file: Path, name: str, recipe: dict[str, Any], callback: Callable[[], Callback]) -> TrainResult:
    """Start a training again until it is not interrupted any more; it saves after every step."""
    for _ in range(30):
        try:
            return train(build(name=name, **recipe), checkpoint=file, checkpoint_minutes=1e-9, callbacks=[callback()])
        except (Died, SystemExit) as ended:
            assert isinstance(ended, Died) or ended.code == 143
    raise AssertionError("it never ends")


def assert_equal(one: TrainResult, other: TrainResult) -> None:
    assert are_equal(one.weights, other.weights)
    assert one.history == other.history
    assert one.best == other.best
    assert one.stopped == other.stopped


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, TrainResult]:
    return {label: train(build(name=name, **recipe)) for label, (name, recipe) in RECIPES.items()}


# Killed or terminated at any place


@pytest.mark.parametrize("kind", [Callback, Checkpoint], ids=["before it saves", "after it saved"])
@pytest.mark.parametrize("hook", HOOKS[1:])
def test_training_killed_at_any_hook_resumes_bit_identically(
    hook: str, kind: type[Callback], undisturbed: dict[str, TrainResult], tmp_path: Path
) -> None:
    label = "lenet with everything"
    name, recipe = RECIPES[label]
    ended = train_until_it_ends(tmp_path / "last.ckpt", name, recipe, lambda: call_at(hook, 5, die, kind))
    assert_equal(ended, undisturbed[label])


@pytest.mark.parametrize("hook", HOOKS)
def test_training_terminated_at_any_hook_resumes_bit_identically(
    hook: str, undisturbed: dict[str, TrainResult], tmp_path: Path
) -> None:
    label = "lenet with everything"
    name, recipe = RECIPES[label]
    count = 1 if hook == "on_train_start" else 2
    ends: list[None] = []

    def terminate() -> None:
        ends.append(None)
        if len(ends) <= 6:
            signal.raise_signal(signal.SIGTERM)

    ended = train_until_it_ends(tmp_path / "last.ckpt", name, recipe, lambda: call_at(hook, count, terminate))
    assert ends
    assert_equal(ended, undisturbed[label])


@pytest.mark.parametrize("label", RECIPES)
def test_every_recipe_resumes_bit_identically(label: str, undisturbed: dict[str, TrainResult], tmp_path: Path) -> None:
    name, recipe = RECIPES[label]
    batches = iter([2, 2, 3, 1, 4, 100])
    ended = train_until_it_ends(
        tmp_path / "last.ckpt", name, recipe, lambda: call_at("on_train_batch_end", next(batches), die, Checkpoint)
    )
    assert_equal(ended, undisturbed[label])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_resumes_bit_identically(tmp_path: Path) -> None:
    hardware = dataclasses.replace(CPU, compile=True)
    undisturbed = train(build(name="alexnet"), hardware=hardware)
    with pytest.raises(Died):
        train(
            build(name="alexnet"),
            checkpoint=tmp_path / "last.ckpt",
            hardware=hardware,
            checkpoint_minutes=1e-9,
            callbacks=[call_at("on_train_batch_end", 5, die, Checkpoint)],
        )
    assert_equal(train(build(name="alexnet"), checkpoint=tmp_path / "last.ckpt", hardware=hardware), undisturbed)


def test_finished_training_resumes_without_a_step(tmp_path: Path) -> None:
    first = train(build(), checkpoint=tmp_path / "last.ckpt")
    assert_equal(train(build(1), checkpoint=tmp_path / "last.ckpt"), first)


def test_training_that_stopped_early_resumes_without_an_epoch(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_epochs": 50, "patience": 2, "checkpoint": tmp_path / "last.ckpt"}
    first = train(build(lr=1e-9), **settings)
    assert first.stopped == "patience"
    assert_equal(train(build(1, lr=1e-9), **settings), first)


@every_network
@pytest.mark.parametrize(
    "recipe", [{"momentum": 0.0}, {"optimizer": "adamw", "ema_decay": 0.5, "accumulate_grad_batches": 2}], ids=str
)
def test_every_architecture_resumes_from_its_checkpoint(
    name: str, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accumulate = recipe.get("accumulate_grad_batches", 1)
    for batches in (1, 3):
        with pytest.raises(Died):
            train(
                build(name=name, **recipe | {"batch_size": 32}),
                checkpoint=tmp_path / "last.ckpt",
                checkpoint_minutes=1e-9,
                callbacks=[call_at("on_train_batch_end", batches * accumulate, die, Checkpoint)],
            )
    train(build(name=name, **recipe | {"batch_size": 32}), checkpoint=tmp_path / "last.ckpt", max_epochs=2)
    said = capsys.readouterr().out
    assert "resuming after 0 epochs and 1 steps" in said
    assert "resuming after 1 epochs and 4 steps" in said
    assert "can't be used" not in said


# Checkpoints that can't be used


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


HISTORY = ("callbacks", "EpochHistory")
NO_STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda state: list(state.values()),
    "a tensor": lambda state: torch.zeros(3),
    "nothing": lambda state: {},
    "weights alone": lambda state: state["state_dict"],
    "keys that are numbers": lambda state: {1: state},
    "no loops": lambda state: {key: value for key, value in state.items() if key != "loops"},
    "no position in the data": lambda state: {key: value for key, value in state.items() if key != "ImageDataModule"},
    "epoch -1": replace_at("epoch", value=-1),
    "epoch 10**9": replace_at("epoch", value=10**9),
    "epoch as text": replace_at("epoch", value="1"),
    "weights of another network": replace_at("state_dict", value={"layer": torch.zeros(2)}),
    "weights of another shape": replace_at(*HISTORY, "weights", "c1.weight", value=torch.zeros(2)),
    "weights of another type": replace_at("state_dict", "classifier.c1.weight", value=Tensor.double),
    "a missing weight": replace_at(*HISTORY, "weights", value=lambda weights: dict(list(weights.items())[1:])),
    "NaN weights": replace_at("state_dict", value=fill_with_nan),
    "NaN weights of the best epoch": replace_at(*HISTORY, "weights", value=fill_with_nan),
    "no weights of the best epoch": replace_at(*HISTORY, "weights", value={}),
    "no optimizer": replace_at("optimizer_states", value=[]),
    "no totals": replace_at("train_totals", value=[1.0]),
    "NaN totals": replace_at("train_totals", value=torch.tensor([math.nan, 1.0, 64.0])),
    "a longer history": replace_at(*HISTORY, "rows", value=lambda rows: rows * 2),
    "history without a column": replace_at(*HISTORY, "rows", value=[{"epoch": 1}]),
    "another best epoch": replace_at(*HISTORY, "best", value=lambda row: row | {"val_accuracy": 2.0}),
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a training of 3 epochs of 3 steps, after 5 steps."""
    file = tmp_path_factory.mktemp("begun") / "last.ckpt"
    with pytest.raises(Died):
        last = call_at("on_train_batch_end", 5, die, Checkpoint)
        train(build(), checkpoint=file, checkpoint_minutes=1e-9, callbacks=[last])
    return file


@pytest.mark.parametrize("change", NO_STATES.values(), ids=NO_STATES.keys())
def test_invalid_checkpoint_is_named_and_not_used(
    change: Callable[[dict[str, Any]], Any], interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "last.ckpt"
    state = torch.load(interrupted, weights_only=True)
    assert (state["epoch"], state["global_step"]) == (1, 5)
    torch.save(change(state), file)
    trained = train(build(), checkpoint=file, max_epochs=3)
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{file} can't be used, so the training starts from the beginning: ")
    assert len(first) < len(str(file)) + 400
    assert not any("resuming" in line for line in others)
    assert [row["epoch"] for row in trained.history] == [1, 2, 3]
    # and it is replaced by a good one
    assert train(build(1), checkpoint=file).history == trained.history


# SIGTERM


@pytest.mark.parametrize(
    ("hook", "count", "saved"),
    [
        ("on_train_batch_start", 2, (0, 2)),
        ("on_train_batch_end", 2, (0, 2)),
        ("on_train_batch_end", 3, (1, 3)),
        ("on_validation_batch_end", 1, (1, 3)),
        ("on_train_epoch_end", 2, (2, 6)),
    ],
)
def test_sigterm_saves_what_is_done_and_exits_with_143(
    hook: str, count: int, saved: tuple[int, int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    terminate = call_at(hook, count, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as raised:
        train(build(), checkpoint=tmp_path / "last.ckpt", callbacks=[terminate])
    assert raised.value.code == 143
    assert capfd.readouterr().err.count("SIGTERM: the training saves its state and ends") == 1
    assert signal.getsignal(signal.SIGTERM) is before
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert (len(state["callbacks"]["EpochHistory"]["rows"]), state["global_step"]) == saved
    assert_equal(train(build(), checkpoint=tmp_path / "last.ckpt"), train(build()))


def test_sigterm_ends_a_hung_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless:
        def __del__(self) -> None:
            time.sleep(60)  # Python drops what is raised here

    def hang() -> None:
        signal.raise_signal(signal.SIGTERM)
        Endless()
        time.sleep(60)

    dropped: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)
    monkeypatch.setattr(termination, "SIGTERM_GRACE_S", 1.5)
    begun = time.monotonic()
    with pytest.raises(SystemExit) as raised:
        train(build(), callbacks=[call_at("on_train_batch_start", 1, hang)])
    assert raised.value.code == 143
    assert [type(each.exc_value) for each in dropped] == [SystemExit]
    assert time.monotonic() - begun < 30
    dropped.clear()


def test_full_disk_costs_the_checkpoint_and_not_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way of the folder")
    trained = train(build(), checkpoint=tmp_path / "file" / "last.ckpt")
    assert len(trained.history) == 3
    assert "no checkpoint could be written" in capsys.readouterr().out
