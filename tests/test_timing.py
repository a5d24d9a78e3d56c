"""Timing: calls are made in turn, those that warm up do not count, and more work takes longer."""

import time
from pathlib import Path

import pytest
import yaml

from convoy import models, timing
from convoy.classifier import Classifier
from convoy.task import Task

CONF = Path(__file__).parents[1] / "conf"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PATIENCE", 0.1)


def build(name: str) -> Classifier:
    values = yaml.safe_load((CONF / f"model/{name}.yaml").read_text())[name]
    return models.build(name, values, Task("digits", ["a", "b"], size=32, channels=1, mean=[0.5], std=[0.5]))


def test_an_image_and_a_batch_are_told_by_median_and_95th_percentile() -> None:
    found = timing.latency(build("lenet"))
    assert list(found) == ["image_ms_median", "image_ms_p95", "batch_ms_median", "batch_ms_p95"]
    for name in ("image", "batch"):
        assert 0 < found[f"{name}_ms_median"] <= found[f"{name}_ms_p95"]
    assert found["batch_ms_median"] > found["image_ms_median"]


def test_a_larger_network_takes_longer_than_a_small_one_and_as_long_as_itself() -> None:
    small, large = build("lenet"), build("resnet")
    assert timing.latency_ratio(large, small) > 1
    assert timing.latency_ratio(small, large) < 1
    assert timing.latency_ratio(small, small, count=8) == pytest.approx(1, abs=0.5)


def test_calls_are_made_in_turn_and_those_that_warm_up_do_not_count() -> None:
    made: list[str] = []
    times = timing.alternately([lambda: made.append("a"), lambda: made.append("b")])
    assert times.shape == (2, timing.MOST)
    rounds = ["".join(made[start : start + 2]) for start in range(2 * timing.WARM, len(made), 2)]
    assert rounds == ["ab", "ba"] * (timing.MOST // 2)


def test_slow_calls_are_made_ten_times_and_no_more() -> None:
    times = timing.alternately([lambda: time.sleep(0.02)])
    assert times.shape == (1, timing.LEAST)
    assert (times >= 20).all()
