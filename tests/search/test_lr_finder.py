"""The learning-rate finder: its suggestion trains, and the sweep stops early."""

import numpy as np
import pandas as pd
import pytest

from convoy.core.errors import ConvoyError
from convoy.search.lr_finder import suggest_learning_rate, sweep_learning_rates
from convoy.training.datamodule import ImageDataModule
from training_fixtures import CPU, build, limit_memory_to_ten_images, make_bars


def test_suggested_rate_trains_and_the_sweep_stops_early() -> None:
    classifier = build()
    table = sweep_learning_rates(
        classifier, ImageDataModule(make_bars(96, 1), make_bars(40, 2), classifier.recipe, 0), CPU
    )
    assert table["lr"].is_monotonic_increasing
    assert table["lr"].iloc[0] == 1e-5
    assert 1e-3 < suggest_learning_rate(table) < 1


def test_suggestion_is_where_the_loss_falls_fastest() -> None:
    rates = np.geomspace(1e-5, 10, 200)
    loss = 2 - np.tanh(3 * (np.log10(rates) + 2)) + np.where(rates > 1, (np.log10(rates) * 9) ** 2, 0)
    assert abs(np.log10(suggest_learning_rate(pd.DataFrame({"lr": rates, "loss": loss}))) + 2) < 0.1


def test_accumulated_batch_gives_a_similar_suggestion() -> None:
    rates = []
    for accumulate in (1, 4):
        classifier = build(augment={"max_shift": 0}, accumulate_grad_batches=accumulate)
        data = ImageDataModule(make_bars(96, 1), make_bars(40, 2), classifier.recipe, 0)
        rates.append(suggest_learning_rate(sweep_learning_rates(classifier, data, CPU)))
    assert 0.2 < rates[0] / rates[1] < 5


def test_too_large_batch_is_refused_with_two_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = limit_memory_to_ten_images(build(), monkeypatch)
    with pytest.raises(ConvoyError, match=r"double .*accumulate_grad_batches, or halve"):
        sweep_learning_rates(classifier, ImageDataModule(make_bars(96, 1), make_bars(40, 2), classifier.recipe, 0), CPU)


def test_no_suggestion_without_two_losses() -> None:
    with pytest.raises(ConvoyError, match="NaN even at a learning rate of 1e-05"):
        suggest_learning_rate(pd.DataFrame({"lr": [1e-5, 2e-5], "loss": [2.0, float("nan")]}))


def test_nan_loss_does_not_change_the_suggestion() -> None:
    table = pd.DataFrame({"lr": [1e-3, 1e-2, 1e-1, 1.0], "loss": [2.0, 1.0, 0.5, float("nan")]})
    assert suggest_learning_rate(table) in (1e-3, 1e-2, 1e-1)
