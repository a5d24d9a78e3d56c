"""Models with given predictions for tests of the gate, and the gate with settings for few images."""

import dataclasses
import hashlib
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import settings
from hypothesis import strategies as st

from convoy.promotion.checks import CheckResult
from convoy.promotion.config import GateConfig
from convoy.promotion.evidence import ModelEvidence
from convoy.promotion.gate import Verdict, decide

CLASSES = ["007", "NA", "cat"]
IMAGES = 600
RULE = GateConfig(
    mode="better",
    alpha=0.05,
    margin=0.02,
    min_test_images=500,
    min_accuracy=0.5,
    max_recall_drop=0.05,
    min_images_per_class=50,
    max_parameters=0,
    max_latency_ratio=0,
    max_test_set_uses=20,
    acknowledged_class_changes=[],
)
QUICK = settings(max_examples=20)
counts = st.integers(0, 60)


def make_hash(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


ELSEWHERE = {make_hash(-1), make_hash(-2)}  # images that nobody is tested on


def make_predictions(predicted: Any, actual: Any, classes: list[str] = CLASSES, sure: float = 0.8) -> pd.DataFrame:
    """The predictions of a model that gives what it predicts the probability `sure`."""
    table = pd.DataFrame({"actual": actual, "predicted": predicted})
    table.insert(0, "sha256", [make_hash(number) for number in range(len(table))])
    for name in classes:
        table[f"probability_{name}"] = np.where(table["predicted"] == name, sure, (1 - sure) / (len(classes) - 1))
    return table


def make_evidence(name: str, predictions: pd.DataFrame, **known: Any) -> ModelEvidence:
    return ModelEvidence(name, predictions, **{"training_hashes": ELSEWHERE} | known)


def make_pair(wins: int, losses: int, images: int = IMAGES, wrong: int = 30) -> tuple[ModelEvidence, ModelEvidence]:
    """Challenger and champion that alone are right so often, and both wrong on other images."""
    actual = np.array(CLASSES, object)[np.arange(images) % 3]
    other = np.array(CLASSES, object)[(np.arange(images) + 1) % 3]
    number = np.arange(images)
    lost = (number >= wins) & (number < wins + losses)
    neither = (number >= wins + losses) & (number < wins + losses + wrong)
    challenger = make_predictions(np.where(lost | neither, other, actual), actual)
    champion = make_predictions(np.where((number < wins) | neither, other, actual), actual)
    return make_evidence("resnet", challenger), make_evidence("vgg", champion)


def run_gate(
    new: ModelEvidence, old: ModelEvidence | None, params: GateConfig = RULE, uses: int = 1, **how: Any
) -> Verdict:
    return decide(new, old, params, test_set_uses=uses, **how)


def make_rule(**changes: Any) -> GateConfig:
    return dataclasses.replace(RULE, **changes)


def find_result(verdict: Verdict, check: str) -> CheckResult:
    (found,) = [each for each in verdict.results if each.check == check]
    return found


def list_checks(verdict: Verdict, *kinds: str) -> list[str]:
    return [each.check for each in verdict.results if each.outcome in kinds]


def change_predictions(model: ModelEvidence, column: str, row: int, value: Any) -> ModelEvidence:
    predictions = model.predictions.copy()
    values = predictions[column].astype(object)
    values.iloc[row] = value
    return dataclasses.replace(model, predictions=predictions.assign(**{column: values}))


def rename_classes(model: ModelEvidence, classes: list[str]) -> ModelEvidence:
    return dataclasses.replace(
        model, predictions=make_predictions(model.predictions["predicted"], model.predictions["actual"], classes)
    )


def group_images(model: ModelEvidence, films: np.ndarray) -> ModelEvidence:
    return dataclasses.replace(model, predictions=model.predictions.assign(group=films))
