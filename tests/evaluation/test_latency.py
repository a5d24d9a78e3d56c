"""Latency: calls alternate, warm-up calls don't count, and more work takes longer."""

import time

import pytest

from convoy import models
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.evaluation import latency
from convoy.models.base import Classifier
from model_settings import load_model_settings
from small_project import ROOT

CONF = ROOT / "conf"


@pytest.fixture(autouse=True)
def short_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "MEASURING_TIME_S", 0.1)


def build(name: str) -> Classifier:
    return models.build(
        name, load_model_settings(name), DatasetInfo("digits", ["a", "b"], size=32, channels=1, mean=[0.5], std=[0.5])
    )


def test_latency_is_reported_as_median_and_95th_percentile() -> None:
    (image,), (batch,) = (latency.measure_latencies([build("lenet")], kind) for kind in ("image", "batch"))
    assert (list(image), list(batch)) == (["image_ms_median", "image_ms_p95"], ["batch_ms_median", "batch_ms_p95"])
    assert 0 < image["image_ms_median"] <= image["image_ms_p95"]
    assert image["image_ms_median"] < batch["batch_ms_median"] <= batch["batch_ms_p95"]


@pytest.mark.slow
def test_larger_network_takes_longer_and_repeats_its_time() -> None:
    small, large = build("lenet"), build("resnet")
    assert latency.measure_latency_ratio(large, small) > 1
    assert latency.measure_latency_ratio(small, large) < 1
    assert latency.measure_latency_ratio(small, small, count=8) == pytest.approx(1, abs=0.5)


def test_calls_alternate_and_warm_up_calls_do_not_count() -> None:
    made: list[str] = []
    times = latency.time_alternately([lambda: made.append("a"), lambda: made.append("b")], 1)
    assert times.shape == (2, latency.MAX_CALLS)
    rounds = ["".join(made[start : start + 2]) for start in range(2 * latency.WARMUP_CALLS, len(made), 2)]
    assert rounds == ["ab", "ba"] * (latency.MAX_CALLS // 2)


def test_slow_calls_are_made_ten_times_and_no_more() -> None:
    times = latency.time_alternately([lambda: time.sleep(0.02)], 0.1)
    assert times.shape == (1, latency.MIN_CALLS)
    assert (times >= 20).all()
