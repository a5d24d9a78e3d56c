"""Training: bit-identical, also after any interruption, with the best epoch kept."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from convoy.core.errors import ConvoyError
from convoy.evaluation.calibration import per_image_log_loss
from convoy.models.base import predict
from convoy.recipe import AugmentConfig
from convoy.training import divergence, module, optimizers
from convoy.training.callbacks import SeedSteps
from convoy.training.history import COLUMNS
from convoy.training.optimizers import (
    compute_ema_decay,
    compute_lr_fraction,
    current_lr,
    make_optimizer,
    make_schedule,
)
from training_fixtures import CPU, are_equal, build, limit_memory_to_ten_images, make_bars, train

# What training leaves


def test_training_is_bit_identical_for_the_same_seed() -> None:
    first, again, other = train(build()), train(build()), train(build(), seed=1)
    assert are_equal(first.weights, again.weights)
    assert first.history == again.history
    assert not are_equal(first.weights, other.weights)


def test_history_has_every_epoch_and_the_best_is_kept() -> None:
    trained = train(build(), max_epochs=6)
    assert [epoch["epoch"] for epoch in trained.history] == [1, 2, 3, 4, 5, 6]
    assert list(trained.history[0]) == COLUMNS
    assert trained.best == max(trained.history, key=lambda epoch: (epoch["val_accuracy"], -epoch["val_loss"]))
    assert trained.stopped == "max_epochs"


@pytest.mark.parametrize("metric", ["balanced_accuracy", "macro_f1"])
def test_best_epoch_and_early_stop_follow_the_selection_metric(metric: str) -> None:
    """One class is rare, so that the epoch with the best accuracy ignores it."""
    scores = iter([0.5, 0.9, 0.8, 0.7])

    class Spoil(Callback):
        def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            # 90 and 10 images: accuracy and the metric disagree
            rare = 10 * next(scores)
            hits = torch.tensor([90 - 4 * rare, rare])
            module.val_totals = torch.tensor([1.0, float(hits.sum()), 100.0])
            module.val_counts = torch.stack([hits, torch.tensor([90.0, 10.0]), torch.tensor([90.0, 10.0])])

    trained = train(build(), max_epochs=9, patience=2, selection_metric=metric, callbacks=[Spoil()])
    assert trained.stopped == "patience"
    assert [row["epoch"] for row in trained.history] == [1, 2, 3, 4]
    assert trained.best["epoch"] == 2
    assert max(trained.history, key=lambda row: row["val_accuracy"])["epoch"] == 1
    assert trained.best[f"val_{metric}"] == max(row[f"val_{metric}"] for row in trained.history)


@pytest.mark.parametrize("recipe", [{}, {"ema_decay": 0.9}], ids=["as trained", "running mean"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_kept_weights_have_the_metrics_of_the_best_epoch(recipe: dict, precision: str) -> None:
    hardware = dataclasses.replace(CPU, precision=precision)
    trained = train(build(**recipe), max_epochs=6, hardware=hardware)
    classifier = build()
    classifier.load_state_dict(trained.weights)
    val = make_bars(40, 2)
    probabilities = predict(classifier, val.pixels, 16)
    assert (probabilities.argmax(axis=1) == val.labels).mean() == pytest.approx(trained.best["val_accuracy"])
    assert per_image_log_loss(val.labels, probabilities).mean() == pytest.approx(trained.best["val_loss"], rel=1e-4)


LEARNING = {
    "as it is": {},
    "adamw": {"optimizer": "adamw", "lr": 0.002},
    "one cycle": {"schedule": "one_cycle"},
    "smoothed and clipped": {"label_smoothing": 0.1, "grad_clip_norm": 1.0},
    "running mean": {"ema_decay": 0.95},
    "weights in the loss": {"class_balance": "weighted_loss"},
    "balanced sampler": {"class_balance": "sampler"},
    "in pieces": {"accumulate_grad_batches": 2},
    "mixed": {"augment": {"mixup": 0.2, "cutmix": 0.2}},
    "policy": {"augment": {"auto_augment": "trivial", "random_erasing": 0.2, "max_shift": 0}},
}


@pytest.mark.parametrize("recipe", LEARNING.values(), ids=LEARNING)
def test_every_recipe_learns_a_simple_dataset(recipe: dict[str, Any]) -> None:
    assert train(build(**recipe), max_epochs=15).best["val_accuracy"] > 0.9


def test_accumulated_gradients_equal_those_of_the_batch() -> None:
    still = {"augment": {"max_shift": 0}}  # the pieces would draw other changes
    whole, pieces = train(build(**still), max_epochs=1), train(build(accumulate_grad_batches=4, **still), max_epochs=1)
    for name, weights in whole.weights.items():
        assert pieces.weights[name] == pytest.approx(weights, abs=1e-5)


def test_frozen_backbone_is_unchanged_while_the_head_learns() -> None:
    classifier = build(name="resnet", backbone_lr_scale=0.0)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    after = train(classifier, max_epochs=1).weights
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_norms_and_biases_do_not_decay() -> None:
    classifier = build(name="resnet", backbone_lr_scale=0.1, weight_decay=0.5)
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    groups = optimizers.make_optimizer(classifier).param_groups
    assert sum(len(group["params"]) for group in groups) == len(names)
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.5 if parameter.ndim > 1 else 0)
            in_head = names[id(parameter)].startswith("classifier.")
            assert group["lr"] == pytest.approx(classifier.recipe.lr * (1 if in_head else 0.1))


@pytest.mark.parametrize(("lr_batch_size", "lr"), [(0, 0.1), (256, 0.025), (32, 0.2)])
def test_learning_rate_is_scaled_to_the_batch_size(lr_batch_size: int, lr: float) -> None:
    optimizer = make_optimizer(build(lr=0.1, batch_size=64, lr_batch_size=lr_batch_size))
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(lr)] * len(optimizer.param_groups)


def test_biases_have_a_learning_rate_of_their_own() -> None:
    classifier = build(name="resnet", lr=0.1, bias_lr_scale=64.0)
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    optimizer = make_optimizer(classifier)
    rates = {names[id(each)]: group["lr"] for group in optimizer.param_groups for each in group["params"]}
    assert rates == {name: pytest.approx(6.4 if name.endswith("bias") else 0.1) for name in names.values()}
    assert current_lr(optimizer) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_rises_linearly_and_then_falls_to_zero(schedule: str) -> None:
    rates = [compute_lr_fraction(step, 100, 0.1, schedule) for step in range(101)]
    assert rates[55] == pytest.approx(0.5)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)
    assert all(math.isfinite(rate) and 0 <= rate <= 1 for rate in rates)


def test_training_stops_after_patience_epochs() -> None:
    trained = train(build(lr=1e-9), max_epochs=50, patience=2)
    assert trained.stopped == "patience"
    best = max(row["val_accuracy"] for row in trained.history)
    first_best = next(row["epoch"] for row in trained.history if row["val_accuracy"] == best)
    assert len(trained.history) == first_best + 2 < 50


def test_training_ends_with_a_validation_when_its_time_is_up() -> None:
    for limit in ("00:00:00:00", "00:00:00:01"):
        trained = train(build(), max_epochs=500, hardware=dataclasses.replace(CPU, max_time=limit))
        assert trained.stopped == "max_time"
        assert 1 <= len(trained.history) < 500
        assert trained.weights


# A training that fails


def test_nan_loss_stops_with_step_rate_and_advice() -> None:
    trained = train(build(lr=1e30), max_epochs=3)
    assert trained.stopped == "failure"
    failure = trained.failure
    assert failure is not None
    assert failure.epoch == 1
    assert 1 <= failure.step <= 3  # 96 images in batches of 32
    said = failure.describe("lenet")
    assert f"lenet failed in epoch 1, step {failure.step}, at a learning rate of " in said
    assert "Lower model.lenet.recipe.lr" in said


class Explode(Callback):
    """Sets a learning rate with which the loss is NaN in the step after."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 1e30


@pytest.mark.parametrize("accumulate", [1, 2])
def test_epochs_before_a_failure_stay_in_the_history(accumulate: int) -> None:
    trained = train(build(accumulate_grad_batches=accumulate), max_epochs=5, callbacks=[Explode(7)])
    assert [row["epoch"] for row in trained.history] == [1, 2]
    assert trained.failure is not None
    assert (trained.failure.epoch, trained.failure.step) == (3, 9)  # the step after the one with that rate


@pytest.mark.parametrize("accumulate", [1, 4])
def test_loss_is_limited_alike_however_a_batch_is_divided(accumulate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Half of the loss of random guessing, which the first step exceeds.
    monkeypatch.setattr(divergence, "MAX_LOSS_RATIO", 0.5)
    trained = train(build(accumulate_grad_batches=accumulate), max_epochs=1)
    assert trained.failure is not None
    assert trained.failure.step == 1


def test_diverged_training_leaves_its_last_good_checkpoint(tmp_path: Path) -> None:
    train(build(), max_epochs=5, checkpoint=tmp_path / "last.ckpt", checkpoint_minutes=1e-9, callbacks=[Explode(7)])
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())


def test_too_large_batch_is_refused_with_two_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = limit_memory_to_ten_images(build(), monkeypatch)
    with pytest.raises(
        ConvoyError, match=r"double model\.lenet\.recipe\.accumulate_grad_batches, or halve .*batch_size"
    ):
        train(classifier)


def test_operation_that_is_not_deterministic_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = build()
    message = (
        "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set ... . You can"
    )

    def refuse(x: Tensor) -> list[tuple[float, Tensor]]:
        raise RuntimeError(message)

    monkeypatch.setattr(classifier, "weighted_heads", refuse)
    with pytest.raises(ConvoyError, match=r"lenet: adaptive_avg_pool2d_backward_cuda does not .*: train"):
        train(classifier)


def test_batches_too_small_for_batch_norm_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = build(batch_size=2, accumulate_grad_batches=2)
    monkeypatch.setattr(classifier, "weighted_heads", lambda x: [(1.0, torch.nn.BatchNorm1d(1)(x[:, :, 0, 0]))])
    with pytest.raises(ConvoyError, match=r"on one image at a time: raise model\.lenet\.recipe\.batch_size, or lower"):
        train(classifier)


def test_augmentation_runs_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    low: list[bool] = []

    def watched(pixels: Tensor, params: AugmentConfig) -> Tensor:
        low.append(torch.is_autocast_enabled("cpu"))
        return pixels

    monkeypatch.setattr(module, "augment", watched)
    train(build(), hardware=dataclasses.replace(CPU, precision="bf16-mixed"), max_epochs=1)
    assert low
    assert not any(low)


# Output


def test_log_gets_one_line_for_each_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    train(build(), max_epochs=3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for number, line in enumerate(lines, start=1):
        assert line.startswith(f"lenet  epoch {number}/3  loss ")
        for word in ("val_loss", "val_accuracy", "images/s", "left"):
            assert word in line
    assert lines[-1].endswith("0:00:00 left")


def test_terminal_gets_a_progress_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in ("stderr", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    train(build(), max_epochs=3)
    shown = capsys.readouterr()
    assert "lenet  epoch" not in shown.out
    assert "Epoch 2: 100%" in shown.out + shown.err
    assert "val_accuracy=" in shown.out + shown.err


def test_every_step_uses_deterministic_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    sure: list[bool] = []

    def watched(pixels: Tensor, params: AugmentConfig) -> Tensor:
        sure.append(torch.are_deterministic_algorithms_enabled())
        return pixels

    monkeypatch.setattr(module, "augment", watched)
    torch.use_deterministic_algorithms(False)
    train(build(), max_epochs=1)
    assert sure
    assert all(sure)


def test_random_state_differs_by_process_epoch_batch_and_seed() -> None:
    drawn = set()
    for seed, rank, epoch, batch in ((1, 0, 0, 0), (2, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1)):
        trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank)
        SeedSteps(seed).on_train_batch_start(trainer, module.ClassifierModule(build()), None, batch)  # type: ignore[arg-type]
        drawn.add(float(torch.rand(())))
    assert len(drawn) == 5


# The recipe


@pytest.mark.parametrize(("name", "smoothing"), [("lenet", 0.0), ("lenet", 0.2), ("googlenet", 0.0)])
def test_loss_is_the_weighted_sum_over_all_heads(name: str, smoothing: float) -> None:
    classifier = build(name=name, label_smoothing=smoothing)
    images = make_bars(8, 1)
    labels = torch.from_numpy(images.labels)
    heads = classifier.weighted_heads(classifier.normalise(torch.from_numpy(images.pixels)))
    found, _ = module.ClassifierModule(classifier).compute_loss(heads, labels)
    expected = sum(
        weight * torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        for weight, logits in heads
    )
    assert found.item() == pytest.approx(float(expected.detach()), rel=1e-5)
    assert name == "lenet" or {weight for weight, _ in heads} != {1.0}


def test_gradient_norm_is_clipped() -> None:
    norms: list[float] = []

    class Note(Callback):
        def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: torch.optim.Optimizer) -> None:
            gradients = [each.grad.flatten() for each in module.parameters() if each.grad is not None]
            norms.extend([float(torch.cat(gradients).norm())] if gradients else [])

    train(build(grad_clip_norm=1e-3), max_epochs=2, callbacks=[Note()])
    assert norms == [pytest.approx(1e-3, rel=1e-2)] * len(norms)
    assert len(norms) >= 4


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_momentum_of_one_cycle_falls_as_the_rate_rises(optimizer: str) -> None:
    classifier = build(schedule="one_cycle", momentum=0.9, warmup_fraction=0.5, optimizer=optimizer)
    made = make_optimizer(classifier)
    schedule = make_schedule(made, classifier.recipe, 24)
    rates, momenta = [], []
    for _ in range(24):
        group = made.param_groups[0]
        rates.append(group["lr"])
        momenta.append(group["momentum"] if optimizer == "sgd" else group["betas"][0])
        made.step()
        schedule.step()
    assert max(rates) == pytest.approx(classifier.recipe.lr)
    assert momenta[rates.index(max(rates))] == min(momenta) == pytest.approx(0.8)
    assert max(momenta) == pytest.approx(0.9)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
@pytest.mark.parametrize("warmup", [0.0, 1 / 6, 0.5, 1.0])
def test_schedule_lasts_for_all_steps_of_a_training(schedule: str, warmup: float) -> None:
    trained = train(build(schedule=schedule, warmup_fraction=warmup, lr=0.01), max_epochs=2)
    assert [row["epoch"] for row in trained.history] == [1, 2]
    assert all(0 <= row["lr"] <= 0.01 for row in trained.history)


def test_ema_decay_warms_up() -> None:
    decays = [compute_ema_decay(0.3, updates) for updates in range(6)]
    assert decays == pytest.approx([0.1, 2 / 11, 0.25, 0.3, 0.3, 0.3])


def test_first_of_several_bad_steps_is_reported() -> None:
    failure = train(build(), max_epochs=3, callbacks=[Explode(3)]).failure
    assert failure is not None
    assert (failure.epoch, failure.step) == (2, 5)


def test_nan_validation_loss_stops_training(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spoil(Callback):
        def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            module.val_totals[0] = math.nan

    trained = train(build(), callbacks=[Spoil()])
    assert trained.failure is not None
    assert trained.failure.reason == "the validation loss is NaN or infinite"


def test_loss_far_above_chance_stops_training(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.ClassifierModule.compute_loss
    monkeypatch.setattr(
        module.ClassifierModule, "compute_loss", lambda self, *given: [1e4 * each for each in real(self, *given)]
    )
    trained = train(build(lr=1e-9))
    assert trained.failure is not None
    assert trained.failure.step == 1


def test_ema_changes_the_kept_weights_and_not_the_training() -> None:
    plain, averaged = (
        train(build(name="resnet", ema_decay=decay, batch_size=32), max_epochs=1) for decay in (0.0, 0.9)
    )
    changed = {name for name, tensor in plain.weights.items() if not torch.equal(tensor, averaged.weights[name])}
    assert "stem.0.weight" in changed
    # the running statistics of batch norms are copied
    assert all(name.endswith((".weight", ".bias")) for name in changed)
    assert plain.history[0]["train_loss"] == averaged.history[0]["train_loss"]


def test_gradients_are_clipped_in_mixed_precision() -> None:
    hardware = dataclasses.replace(CPU, precision="bf16-mixed")
    trained = train(build(optimizer="adamw", grad_clip_norm=1.0), hardware=hardware, max_epochs=1)
    assert trained.failure is None
