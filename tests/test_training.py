"""Training: the same bits, and the best epoch kept."""

import math

import numpy as np
import pytest
import torch
import yaml
from project import REAL
from torch import Tensor

from convoy import models
from convoy.classifier import predict, warm_cosine
from convoy.config import ConvoyError
from convoy.datamodule import ImageData, Images
from convoy.task import Task
from convoy.training import Train, Trained, fit


def bars(count: int, seed: int) -> Images:
    """Pictures of 32x32 pixels in two classes: a bright row or a bright column."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 100, (count, 32, 32, 1), dtype=np.uint8)
    labels = random.integers(0, 2, count)
    for image, label, at in zip(pixels, labels, random.integers(4, 28, count), strict=True):
        (image if label else image.transpose(1, 0, 2))[at - 2 : at + 2] = 250
    return Images(pixels, labels)


def train(seed: int = 0, max_epochs: int = 3, **recipe: float) -> Trained:
    settings = yaml.safe_load((REAL / "conf/model/lenet.yaml").read_text())["lenet"]
    settings["recipe"] |= recipe
    torch.manual_seed(seed)
    task = Task("bars", ["column", "row"], 32, 1, [0.3], [0.2])
    classifier = models.build("lenet", settings, task)
    data = ImageData(bars(96, 1), bars(40, 2), 32, classifier.recipe.augment, seed)
    return fit(classifier, data, Train(max_epochs=max_epochs, accelerator="cpu", threads=1))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    first, again, other = train(seed=0), train(seed=0), train(seed=1)
    assert same(first.weights, again.weights)
    assert first.history == again.history
    assert not same(first.weights, other.weights)


def test_every_epoch_is_in_the_history_and_the_best_by_validation_is_kept() -> None:
    trained = train(max_epochs=6, lr=0.05)
    assert [epoch["epoch"] for epoch in trained.history] == [1, 2, 3, 4, 5, 6]
    assert set(trained.history[0]) == {"epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"}
    assert trained.best == max(trained.history, key=lambda epoch: (epoch["val_accuracy"], -epoch["val_loss"]))


def test_the_kept_weights_score_what_the_history_says_of_the_best_epoch() -> None:
    trained = train(max_epochs=6, lr=0.05)
    settings = yaml.safe_load((REAL / "conf/model/lenet.yaml").read_text())["lenet"]
    classifier = models.build("lenet", settings, Task("bars", ["column", "row"], 32, 1, [0.3], [0.2]))
    classifier.load_state_dict(trained.weights)
    val = bars(40, 2)
    accuracy = (predict(classifier, val.pixels, 16).argmax(axis=1) == val.labels).mean()
    assert accuracy == pytest.approx(trained.best["val_accuracy"])


def test_a_network_learns_what_can_be_learnt() -> None:
    assert train(max_epochs=15, lr=0.05).best["val_accuracy"] > 0.9


def test_a_loss_that_is_no_number_stops_with_the_learning_rate_to_lower() -> None:
    with pytest.raises(ConvoyError, match=r"the loss of lenet is no longer a number .* lower model.lenet.recipe.lr"):
        train(lr=1e30, warmup=0.0)


def test_the_record_says_what_the_bits_depend_on() -> None:
    environment = train(max_epochs=1).environment
    assert environment["torch"] == torch.__version__.split("+")[0]
    assert environment["threads"] == 1
    assert environment["device"] == "cpu"


def test_the_learning_rate_rises_linearly_and_then_falls_to_zero() -> None:
    rates = [warm_cosine(step, 100, warmup=0.1) for step in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)
    assert all(math.isfinite(rate) and 0 <= rate <= 1 for rate in rates)
