"""Evidence for the gate: inconsistent predictions and models that saw test images are errors."""

import dataclasses
import math
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoy.core.errors import ConvoyError
from gate_fixtures import IMAGES, QUICK, change_predictions, list_checks, make_hash, make_pair, run_gate


@QUICK
@given(st.randoms(use_true_random=False))
def test_order_of_rows_and_columns_does_not_matter(random: Any) -> None:
    new, old = make_pair(30, 5)
    rows, columns = list(range(IMAGES)), list(new.predictions)
    random.shuffle(rows)
    random.shuffle(columns)
    mixed = dataclasses.replace(new, predictions=new.predictions.iloc[rows][columns])
    assert run_gate(mixed, old) == run_gate(new, old)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("probability_NA", math.nan, "a probability that is not finite"),
        ("probability_NA", math.inf, "a probability that is not finite"),
        ("probability_NA", None, "a probability that is not finite"),
        ("probability_NA", -0.1, r"a probability outside \[0, 1\]"),
        ("probability_NA", 1.1, r"a probability outside \[0, 1\]"),
        ("probability_NA", 0.11, "probabilities that do not sum to 1"),
        ("probability_NA", "much", "probabilities are not numbers"),
        ("predicted", "NA", "a predicted class that is not the most probable one"),
        ("predicted", "dog", "a predicted class without a probability"),
        ("predicted", math.nan, "the column predicted has values that are missing or not text"),
        ("actual", None, "the column actual has values that are missing or not text"),
        ("actual", 7, "the column actual has values that are missing or not text"),
        ("sha256", make_hash(1), "occurs twice"),
        ("sha256", "1.png", "'1.png' is not a sha256"),
    ],
)
def test_table_with_one_invalid_value_is_an_error(side: int, column: str, value: Any, said: str) -> None:
    models = list(make_pair(30, 5))
    models[side] = change_predictions(models[side], column, 300, value)
    with pytest.raises(ConvoyError, match=said):
        run_gate(models[0], models[1])


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda table: table.drop(columns="actual"), "the column actual is missing"),
        (lambda table: table[["sha256", "actual", "predicted"]], "there is no column probability_<class>"),
        (lambda table: table.iloc[:0], "there are no images"),
        (lambda table: pd.concat([table, table["actual"]], axis=1), "there are two columns actual"),
        (lambda table: pd.concat([table, table.iloc[:1]]), "occurs twice"),
        (lambda table: table.iloc[1:], "different test images"),
        (lambda table: None, "they are not a table"),
    ],
)
def test_malformed_table_is_an_error(break_it: Any, said: str) -> None:
    new, old = make_pair(30, 5)
    with pytest.raises(ConvoyError, match=said):
        run_gate(new, dataclasses.replace(old, predictions=break_it(old.predictions)))


def test_other_images_or_other_actual_classes_are_an_error() -> None:
    new, old = make_pair(30, 5)
    fewer = dataclasses.replace(new, predictions=new.predictions.iloc[1:])
    for one, other in ((new, change_predictions(old, "sha256", 300, make_hash(-5))), (new, fewer), (fewer, new)):
        with pytest.raises(ConvoyError, match="different test images"):
            run_gate(one, other)
    with pytest.raises(ConvoyError, match="different actual classes for 1 test images"):
        run_gate(new, change_predictions(old, "actual", 300, "cat"))
    with pytest.raises(ConvoyError, match="class 'dog', which is unknown to resnet and vgg"):
        run_gate(change_predictions(new, "actual", 300, "dog"), change_predictions(old, "actual", 300, "dog"))
    with pytest.raises(ConvoyError, match="class 'dog', which is unknown to resnet"):
        run_gate(change_predictions(new, "actual", 300, "dog"), None, is_first=True)


@pytest.mark.parametrize("side", [0, 1])
def test_model_trained_on_a_test_image_is_an_error(side: int) -> None:
    models = list(make_pair(30, 5))
    for unknown in (None, frozenset[str]()):
        models[side] = dataclasses.replace(models[side], training_hashes=unknown)
        verdict = run_gate(models[0], models[1])
        assert verdict.decision == "HOLD"
        assert list_checks(verdict, "hold") == ["training overlap"]
    models[side] = dataclasses.replace(models[side], training_hashes=[make_hash(-1), make_hash(7)])
    with pytest.raises(ConvoyError, match="was trained on 1 of the 600 test images"):
        run_gate(models[0], models[1])
    models[side] = dataclasses.replace(models[side], training_hashes={"train/1.png"})
    with pytest.raises(ConvoyError, match="not given by their sha256"):
        run_gate(models[0], models[1])


@pytest.mark.parametrize("side", [0, 1])
def test_near_duplicates_of_training_images_are_excluded(side: int) -> None:
    models = list(make_pair(30, 5))
    models[side] = dataclasses.replace(
        models[side], training_hashes=[make_hash(-11), make_hash(-12)]
    )  # what only it saw
    seen, won = [make_hash(-11), make_hash(-12), make_hash(-13)], [make_hash(0), make_hash(1), make_hash(2)]
    verdict = run_gate(models[0], models[1], near_duplicates=pd.DataFrame({"test": won, "other": seen}))
    table = verdict.table().set_index("check")
    assert table.at["test images", "value"] == "598"
    assert table.at["training overlap", "message"].endswith(
        "; 2 other test images are excluded, as near-duplicates of training images"
    )
    assert (
        table.at["better", "message"] == run_gate(*make_pair(28, 5)).table().set_index("check").at["better", "message"]
    )
    everything = pd.DataFrame({"test": [make_hash(number) for number in range(600)], "other": make_hash(-11)})
    with pytest.raises(
        ConvoyError, match="every test image is a near-duplicate of an image that a model was trained on"
    ):
        run_gate(models[0], models[1], near_duplicates=everything)
