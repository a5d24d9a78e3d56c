"""The search space: what a range may be, and which errors name the setting."""

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from convoy.core.errors import ConvoyError
from convoy.search.space import change_settings, contains, list_bounds, parse_space, round_values

SETTINGS = {"hidden": 64, "recipe": {"lr": 0.05, "optimizer": "sgd", "augment": {"hflip": False}}}


def test_range_is_of_the_type_of_the_setting() -> None:
    ranges = {"hidden": "log:16:512", "recipe.lr": "log:1e-3:1", "recipe.augment.hflip": "choice:true,false"}
    assert parse_space(ranges, SETTINGS, "lenet") == {
        "hidden": IntDistribution(16, 512, log=True),
        "recipe.lr": FloatDistribution(0.001, 1.0, log=True),
        "recipe.augment.hflip": CategoricalDistribution([True, False]),
    }


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("recipe.lrr", "log:0.1:1", "model.lenet has no such setting; did you mean recipe.lr?"),
        ("recipe.lr", "0.1:1", "this is no range; write log:LOW:HIGH"),
        ("recipe.lr", "log:0:1", "must begin above 0"),
        ("recipe.lr", "uniform:1:0.1", "1 to 0.1 is no range"),
        ("recipe.lr", "uniform:nan:1", "is no range"),
        ("recipe.lr", "log:a:1", "needs two numbers"),
        ("hidden", "uniform:1.5:9", "needs two whole numbers"),
        ("recipe.optimizer", "uniform:0:1", "the setting is no number, but 'sgd'"),
        ("recipe.optimizer", "choice:sgd", "nothing to choose from"),
    ],
)
def test_wrong_range_is_refused_with_its_setting(name: str, text: str, problem: str) -> None:
    with pytest.raises(ConvoyError, match=f"^{name}={text}: ") as error:
        parse_space({name: text}, SETTINGS, "lenet")
    assert problem in str(error.value)


def test_bounds_hold_both_ends_and_every_choice() -> None:
    space = parse_space({"recipe.lr": "log:0.1:1", "hidden": "choice:1,2,3"}, SETTINGS, "lenet")
    assert list_bounds(space) == [
        {"recipe.lr": 0.1, "hidden": 1},
        {"recipe.lr": 1.0, "hidden": 2},
        {"recipe.lr": 1.0, "hidden": 3},
    ]
    assert not contains(space, SETTINGS)
    assert contains(parse_space({"recipe.lr": "log:0.01:1"}, SETTINGS, "lenet"), SETTINGS)


def test_tried_values_have_three_digits_and_change_a_copy() -> None:
    values = round_values({"recipe.lr": 0.043217, "hidden": 1234})
    assert values == {"recipe.lr": 0.0432, "hidden": 1234}
    assert change_settings(SETTINGS, values)["recipe"]["lr"] == 0.0432
    assert SETTINGS["recipe"]["lr"] == 0.05
