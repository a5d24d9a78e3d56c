"""Training: bit-identical, also after any interruption, with the best epoch kept."""

import dataclasses
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from convoy.core.errors import ConvoyError
from convoy.evaluation.calibration import per_image_log_loss
from convoy.models.base import predict
from convoy.recipe import AugmentConfig, TrainConfig
from convoy.training import batch_size_errors, module, optimizers
from convoy.training.datamodule import ImageData, split_batch
from convoy.training.optimizers import compute_lr_fraction
from convoy.training.record import ResolvedTrainer
from convoy.training.result import COLUMNS
from convoy.training.seeding import seed_step
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


@pytest.mark.parametrize("recipe", [{}, {"ema_decay": 0.9}], ids=["as trained", "running mean"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_kept_weights_have_the_metrics_of_the_best_epoch(recipe: dict, precision: str) -> None:
    hardware = ResolvedTrainer("cpu", 1, 1, precision, False, 1)
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
            assert group["lr_scale"] == (1 if names[id(parameter)].startswith("classifier.") else 0.1)


def test_learning_rate_rises_linearly_and_then_falls_to_zero() -> None:
    rates = [compute_lr_fraction(step, 100, warmup_fraction=0.1) for step in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)
    assert all(math.isfinite(rate) and 0 <= rate <= 1 for rate in rates)


def test_training_stops_after_patience_epochs() -> None:
    trained = train(build(lr=1e-9), max_epochs=50, patience=2)
    assert trained.stopped == "patience"
    assert len(trained.history) == trained.best["epoch"] + 2 < 50


def test_no_epoch_starts_that_would_exceed_max_minutes() -> None:
    trained = train(build(), max_epochs=500, max_minutes=1e-6)
    assert trained.stopped == "max_minutes"
    assert len(trained.history) == 1


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


def test_epochs_before_a_failure_stay_in_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode_later(self: module.ClassifierModule, number: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 if number < 7 else 1e30

    monkeypatch.setattr(module.ClassifierModule, "_set_lr", explode_later)
    trained = train(build(), max_epochs=5)
    assert [row["epoch"] for row in trained.history] == [1, 2]
    assert trained.failure is not None
    assert (trained.failure.epoch, trained.failure.step) == (3, 9)  # the step after the one with that rate


def test_too_large_batch_is_refused_with_one_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = limit_memory_to_ten_images(build(), monkeypatch)
    with pytest.raises(
        ConvoyError, match=r"32 images does not fit .* but 8 do: .*batch_size=8, or .*accumulate_grad_batches=4 "
    ):
        train(classifier)


def test_micro_batches_are_of_similar_size() -> None:
    rows = torch.arange(7)
    assert [labels.tolist() for _, labels in split_batch(rows, rows, 3)] == [[0, 1, 2], [3, 4], [5, 6]]


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
    train(build(), hardware=dataclasses.replace(CPU, precision="bfloat16"), max_epochs=1)
    assert low
    assert not any(low)


def test_memory_is_freed_before_smaller_batches_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = build()
    heads, held = classifier.weighted_heads, []

    def limited(x: Tensor) -> list[tuple[float, Tensor]]:
        assert all(kept() is None for kept in held)
        if len(x) > 10:
            filling = torch.zeros(9)
            held.append(weakref.ref(filling))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return heads(x)

    monkeypatch.setattr(classifier, "weighted_heads", limited)
    with pytest.raises(ConvoyError, match="but 8 do"):
        train(classifier)
    assert len(held) == 2  # of the training, and of 16 images that were tried


def test_advised_batch_size_counts_processes_and_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = build(batch_size=50, accumulate_grad_batches=2)
    monkeypatch.setattr(batch_size_errors, "fits_in_memory", lambda *_: _[-1] <= 6)
    data = ImageData(make_bars(96, 1), make_bars(40, 2), classifier.recipe, 0)
    said = batch_size_errors.describe_too_large(classifier, data, dataclasses.replace(CPU, devices=2))
    assert "a batch of 13 images does not fit" in said
    assert "but 6 do: set model.lenet.recipe.batch_size=12, or model.lenet.recipe.accumulate_grad_batches=5 " in said


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


def test_terminal_gets_one_progress_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in ("stderr", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    train(build(), max_epochs=3)
    shown = capsys.readouterr()
    assert shown.out == ""
    last = shown.err.rstrip().rpartition("\r")[2]
    assert last.startswith("lenet 3/3: 100%")
    assert "loss=" in last
    assert "val_accuracy=" in last
    assert " images/s" in last
    assert shown.err.count("\r") < 20


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


def test_random_state_differs_by_process_step_and_seed() -> None:
    once = TrainConfig(seed=0, max_epochs=1, patience=0, max_minutes=0.0, checkpoint_minutes=5.0)
    drawn = set()
    for seed, rank, step in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)):
        classifier = build()
        data = ImageData(make_bars(14, 1), make_bars(8, 2), classifier.recipe, seed)
        begun = module.ClassifierModule(classifier, data, once, CPU, None)
        data.rank = rank
        seed_step(data.seed, step, data.rank, begun.device)
        drawn.add(float(torch.rand(())))
    assert len(drawn) == 4


# The recipe


def make_module(name: str = "lenet", augment: dict[str, Any] | None = None, **recipe: Any) -> module.ClassifierModule:
    """A training before its first step."""
    classifier = build(name=name, augment={"max_shift": 0, **(augment or {})}, **recipe)
    data = ImageData(make_bars(96, 1), make_bars(40, 2), classifier.recipe, 0)
    params = TrainConfig(seed=0, max_epochs=8, patience=0, max_minutes=10.0, checkpoint_minutes=5.0)
    made = module.ClassifierModule(classifier, data, params, CPU, None)
    made.configure_optimizers()
    return made


@pytest.mark.parametrize(("name", "smoothing"), [("lenet", 0.0), ("lenet", 0.2), ("googlenet", 0.0)])
def test_loss_is_the_weighted_sum_over_all_heads(name: str, smoothing: float) -> None:
    made = make_module(name, label_smoothing=smoothing)
    pixels, labels = made.data.batch(0)
    seed_step(0, 0, 0, made.device)
    found = made.compute_loss(pixels, labels)
    seed_step(0, 0, 0, made.device)
    heads = made.classifier.weighted_heads(made.classifier.normalise(pixels))
    expected = sum(
        weight * torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
        for weight, logits in heads
    )
    assert found.item() == pytest.approx(float(expected.detach()), rel=1e-5)
    assert name == "lenet" or {weight for weight, _ in heads} != {1.0}


def test_gradient_norm_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.SGD.step

    def noted(self: torch.optim.SGD, *given: Any) -> Any:
        gradients = [parameter.grad.flatten() for group in self.param_groups for parameter in group["params"]]
        norms.append(float(torch.cat(gradients).norm()))
        return step(self, *given)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    train(build(grad_clip_norm=1e-3), max_epochs=1)
    assert norms == [pytest.approx(1e-3, rel=1e-2)] * 3


def test_momentum_of_one_cycle_falls_as_the_rate_rises() -> None:
    made = make_module(schedule="one_cycle", momentum=0.9, warmup_fraction=0.5)
    momenta = []
    for number in range(made.total_steps):
        made._set_lr(number)
        momenta.append(made.optimizer.param_groups[0]["momentum"])
    assert min(momenta) == pytest.approx(0.8, abs=0.01)
    assert max(momenta) == pytest.approx(0.9, abs=0.01)


def test_ema_decay_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    decays: list[float] = []
    monkeypatch.setattr(module, "update_ema", lambda average, classifier, decay: decays.append(decay))
    train(build(ema_decay=0.3), max_epochs=2)
    assert decays == pytest.approx([0.1, 2 / 11, 0.25, 0.3, 0.3, 0.3])


def test_first_of_several_bad_steps_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(self: module.ClassifierModule, number: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 if number < 3 else 1e30

    monkeypatch.setattr(module.ClassifierModule, "_set_lr", explode)
    failure = train(build(), max_epochs=3).failure
    assert failure is not None
    assert (failure.epoch, failure.step) == (2, 5)


def test_nan_validation_loss_stops_training(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.batch_metrics

    def spoiled(logits: Tensor, labels: Tensor, *loss: Any) -> Tensor:
        found = real(logits, labels, *loss)
        return found if loss else found * torch.tensor([math.nan, 1, 1])

    monkeypatch.setattr(module, "batch_metrics", spoiled)
    trained = train(build())
    assert trained.failure is not None
    assert trained.failure.reason == "the validation loss is NaN or infinite"


def test_max_minutes_counts_time_before_a_resume() -> None:
    made = make_module()
    made._restore(made.capture_state() | {"minutes": 7.0, "epoch": 4}, rank=0)
    assert made._elapsed_minutes() >= 7
    assert [made._find_reason_to_stop(minutes) for minutes in (7.9, 8.1)] == ["", "max_minutes"]  # of 10, 4 epochs done


def test_loss_far_above_chance_stops_training(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.ClassifierModule.compute_loss
    monkeypatch.setattr(module.ClassifierModule, "compute_loss", lambda self, *given: 1e4 * real(self, *given))
    trained = train(build(lr=1e-9))
    assert trained.failure is not None
    assert trained.failure.step == 1


def test_ema_copies_the_batch_norm_statistics() -> None:
    average, classifier = build(0, "resnet"), build(1, "resnet")
    classifier.weighted_heads(torch.rand(8, 1, 32, 32))
    optimizers.update_ema(average, classifier, 0.9)
    assert all(map(torch.equal, average.buffers(), classifier.buffers()))
    assert not any(
        torch.equal(*pair)
        for pair in zip(average.parameters(), classifier.parameters(), strict=True)
        if pair[0].ndim > 1
    )
