"""The worked examples in docs/promotion.md: they are what the gate prints."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from convoy.promotion.evidence import ModelEvidence
from convoy.promotion.gate import Verdict
from gate_fixtures import CLASSES, make_evidence, make_pair, make_predictions, make_rule, run_gate
from small_project import ROOT

RULE = make_rule(min_accuracy=0.9, min_images_per_class=30, max_test_set_uses=52, margin=0.01)
REFRESH = dataclasses.replace(RULE, mode="non_inferior")


def compare(wins: int, losses: int, rule: object = RULE, images: int = 2000) -> Verdict:
    new, old = make_pair(wins, losses, images, wrong=images // 20)
    old = dataclasses.replace(old, name="vgg (version 3)")
    return run_gate(new, old, rule, uses=4, best_champion=old if rule is REFRESH else None)  # type: ignore[arg-type]


def ruin_one_class() -> Verdict:
    """The challenger wins 80 images of two classes and loses 45 of the third."""
    actual = np.array(CLASSES, object)[np.arange(2000) % 3]
    other = np.array(CLASSES, object)[(np.arange(2000) + 1) % 3]
    is_cat = actual == "cat"
    lost = is_cat & (np.cumsum(is_cat) <= 45)
    won = ~is_cat & (np.cumsum(~is_cat) <= 80)
    challenger = make_predictions(np.where(lost, other, actual), actual)
    champion = make_predictions(np.where(won, other, actual), actual)
    return run_gate(make_evidence("resnet", challenger), make_evidence("vgg (version 3)", champion), RULE, uses=4)


def compare_imbalanced() -> Verdict:
    """On 1,800 cats and 100 images of each other class, the challenger wins 14 rare images and loses 12 cats."""
    actual = np.repeat(np.array(CLASSES, object), [100, 100, 1800])
    number = np.arange(2000)
    champion = np.where(number % 100 < np.where(number < 200, 10, 2), np.where(actual == "cat", "NA", "cat"), actual)
    challenger = np.where(number % 100 < np.where(number < 200, 3, 2), np.where(actual == "cat", "NA", "cat"), actual)
    challenger = np.where((number >= 500) & (number < 1700) & (number % 100 == 50), "NA", challenger)
    models = [make_evidence(name, make_predictions(values, actual)) for name, values in
              (("resnet", challenger), ("vgg (version 3)", champion))]  # fmt: skip
    new, old = models
    return run_gate(new, old, RULE, uses=4, metric="balanced_accuracy")


def start() -> Verdict:
    model: ModelEvidence = make_pair(0, 0, 2000, wrong=160)[0]
    return run_gate(model, None, RULE, is_first=True)


EXAMPLES: dict[str, Callable[[], Verdict]] = {
    "first champion": start,
    "promote": lambda: compare(62, 28),
    "hold": lambda: compare(45, 33),
    "hold non-inferior": lambda: compare(39, 41, REFRESH),
    "promote non-inferior": lambda: compare(41, 39, REFRESH),
    "few images": lambda: compare(30, 4, images=400),
    "reject": lambda: compare(28, 62),
    "reject class": ruin_one_class,
    "balanced accuracy": compare_imbalanced,
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_documented_verdict_is_what_the_gate_prints(example: str) -> None:
    """As `pipeline/promote.py` prints it, one reason on each line."""
    printed = "resnet, version 4: " + EXAMPLES[example]().summary().replace("; ", ";\n  ")
    assert printed in (ROOT / "docs/promotion.md").read_text()
