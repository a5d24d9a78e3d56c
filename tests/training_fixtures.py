"""Short trainings for tests: generated images, a small network, settings for one thread."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from convoy import models
from convoy.data.packed.arrays import Images
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models.base import Classifier
from convoy.recipe import TrainConfig
from convoy.training.datamodule import ImageDataModule
from convoy.training.record import ResolvedTrainer
from convoy.training.trainer import TrainResult, fit
from model_settings import load_model_settings

BARS_INFO = DatasetInfo("bars", ["column", "row"], 32, 1, [0.3], [0.2])

CPU = ResolvedTrainer("cpu", 1, 1, strategy="auto", precision="32-true", sync_batchnorm=False, compile=False, threads=1)


def make_bars(count: int, seed: int) -> Images:
    """Pictures of 32x32 pixels in two classes: a bright row or a bright column."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 100, (count, 32, 32, 1), dtype=np.uint8)
    labels = random.integers(0, 2, count)
    for image, label, at in zip(pixels, labels, random.integers(4, 28, count), strict=True):
        (image if label else image.transpose(1, 0, 2))[at - 2 : at + 2] = 250
    return Images(pixels, labels)


def build(seed: int = 0, name: str = "lenet", augment: dict[str, Any] | None = None, **recipe: Any) -> Classifier:
    settings = load_model_settings(name)
    settings["recipe"] |= recipe
    settings["recipe"]["augment"] |= augment or {}
    torch.manual_seed(seed)
    return models.build(name, settings, BARS_INFO)


def train(
    classifier: Classifier,
    seed: int = 0,
    checkpoint: Path | None = None,
    hardware: ResolvedTrainer = CPU,
    callbacks: Sequence[Callback] = (),
    **params: Any,
) -> TrainResult:
    data = ImageDataModule(make_bars(96, 1), make_bars(40, 2), classifier.recipe, seed)
    settings = {"seed": seed, "max_epochs": 3, "patience": 0, "checkpoint_minutes": 5.0} | params
    return fit(classifier, data, TrainConfig(**settings), hardware, checkpoint, callbacks)


def are_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def limit_memory_to_ten_images(classifier: Classifier, monkeypatch: pytest.MonkeyPatch) -> Classifier:
    """As on a GPU whose memory holds ten images."""
    heads = classifier.weighted_heads

    def limited(x: Tensor) -> list[tuple[float, Tensor]]:
        if len(x) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return heads(x)

    monkeypatch.setattr(classifier, "weighted_heads", limited)
    return classifier
