"""The triggers of a retraining: what counts as changed, and when the champion's accuracy has fallen."""

import types

import numpy as np
import pandas as pd
import pytest

from pipeline.champion_images import Champion
from pipeline.triggers import judge_accuracy, list_changed


def make_champion(accuracy_low: float | None) -> Champion:
    """A champion that takes every image for a cat."""
    predictor = types.SimpleNamespace(
        info=types.SimpleNamespace(classes=["cat", "dog"]),
        probabilities=lambda pixels: np.tile([0.9, 0.1], (len(pixels), 1)),
    )
    return Champion("lenet (version 1)", predictor, frozenset(), accuracy_low)  # type: ignore[arg-type]


def judge(cats: int, dogs: int, accuracy_low: float | None = 0.8) -> tuple[bool, str]:
    labels = np.array(["cat"] * cats + ["dog"] * dogs, object)
    return judge_accuracy(make_champion(accuracy_low), list(np.zeros((len(labels), 4, 4, 1))), labels, alpha=0.01)


def test_new_relabelled_and_missing_images_count_as_changed() -> None:
    old = pd.DataFrame({"sha256": ["same", "relabelled", "gone"], "label": ["cat", "cat", "dog"]})
    now = pd.DataFrame({"sha256": ["new", "same", "relabelled"], "label": ["cat", "cat", "dog"]})
    assert list_changed(old, now) == {"new", "relabelled", "gone"}
    assert list_changed(old, old[::-1]) == set()


@pytest.mark.parametrize(("cats", "is_due"), [(300, False), (240, False), (225, False), (210, True)])
def test_accuracy_far_below_its_interval_is_a_reason(cats: int, is_due: bool) -> None:
    found, reason = judge(cats, 300 - cats)
    assert found == is_due
    assert f"is correct on {cats / 300:.1%} of 300 newly labelled images, its interval begins at 80.0%" in reason


def test_champion_without_an_interval_is_no_reason() -> None:
    assert judge(0, 300, None) == (False, "test of the champion's accuracy: its run in MLflow has no interval")
