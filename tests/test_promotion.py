"""Promotion: the best by validation, and nothing below the floor."""

import math

import pytest

from convoy.config import ConvoyError
from convoy.promotion import Register, check_floor, rank


def scored(accuracy: float, loss: float = 0.5) -> dict[str, float]:
    return {"val_accuracy": accuracy, "val_loss": loss}


def test_the_highest_validation_accuracy_comes_first_then_the_lowest_loss_then_the_name() -> None:
    best = {"vgg": scored(0.9), "resnet": scored(0.9), "lenet": scored(0.9, loss=0.4), "alexnet": scored(0.95, loss=2)}
    assert rank(best) == ["alexnet", "lenet", "resnet", "vgg"]


def test_test_figures_take_no_part() -> None:
    best = {"vgg": scored(0.9) | {"test_accuracy": 0.1}, "lenet": scored(0.8) | {"test_accuracy": 1.0}}
    assert rank(best)[0] == "vgg"


@pytest.mark.parametrize("accuracy", [0.7999, math.nan])
def test_a_score_below_the_floor_or_none_at_all_is_refused(accuracy: float) -> None:
    with pytest.raises(ConvoyError, match=r"vgg scored .* in validation, below register\.floor=0\.8"):
        check_floor("vgg", scored(accuracy), Register(name="convoy", floor=0.8))


def test_a_score_at_the_floor_passes() -> None:
    check_floor("vgg", scored(0.8), Register(name="convoy", floor=0.8))
