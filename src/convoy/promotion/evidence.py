"""Predictions of the compared models for the same test images, aligned and checked for images seen in training."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd

from convoy.core.config import SelectionMetric
from convoy.core.errors import ConvoyError
from convoy.evaluation.calibration import MIN_PROBABILITY
from convoy.evaluation.metrics import PROBABILITY_PREFIX
from convoy.promotion.paired_metric import score_predictions

# Largest allowed deviation from 1 of the sum of an image's probabilities.
SUM_TOLERANCE = 1e-3
SHA256 = re.compile("[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class ModelEvidence:
    """A trained model with its test set predictions and its measured properties."""

    name: str
    predictions: pd.DataFrame  # columns sha256, actual, predicted, probability_<class>, and optionally group
    training_hashes: Collection[str] | None  # sha256 of the images used to train or select it; None: unknown
    parameters: int | None = None  # number of parameters; None: not counted
    latency: float | None = None  # for one image, as a multiple of the champion's (1.0); None: not measured


@dataclasses.dataclass(frozen=True)
class TrainingScope:
    """The classes and training images of a model, which determine the test images it can be evaluated on."""

    name: str
    classes: Collection[str]
    training_hashes: Collection[str] | None  # sha256 of the images used to train or select it; None: unknown


@dataclasses.dataclass(frozen=True)
class AlignedPredictions:
    """Validated predictions, with images sorted by sha256 and classes sorted by name."""

    name: str
    classes: list[str]  # K class names
    sha256: np.ndarray  # (N,) sha256 of the images
    actual: np.ndarray  # (N,) class names
    predicted: np.ndarray  # (N,) class names
    probabilities: np.ndarray  # (N, K) float64
    groups: np.ndarray | None  # (N,) group names

    @property
    def is_correct(self) -> np.ndarray:
        """Return whether each prediction is correct, (N,) bool."""
        return self.actual == self.predicted

    def score(self, metric: SelectionMetric) -> float:
        """Return a metric of the predictions."""
        return score_predictions(metric, self.actual, self.predicted)

    def without(self, excluded: Collection[str]) -> "AlignedPredictions":
        """Return a copy without the images of these sha256."""
        kept = ~np.isin(self.sha256.astype(str), list(excluded))
        groups = None if self.groups is None else self.groups[kept]
        return dataclasses.replace(
            self,
            sha256=self.sha256[kept],
            actual=self.actual[kept],
            predicted=self.predicted[kept],
            probabilities=self.probabilities[kept],
            groups=groups,
        )

    def log_loss(self, selected: np.ndarray) -> np.ndarray:
        """Return the log loss of each image selected by a mask, (N,) booleans.

        The model must know the actual classes of the selected images.
        """
        column = np.searchsorted(self.classes, self.actual[selected].astype(str))
        return -np.log(np.maximum(self.probabilities[selected, column], MIN_PROBABILITY))


def align(evidence: ModelEvidence, paths: Mapping[str, str]) -> AlignedPredictions:
    """Validate the evidence on a model and return its predictions in a canonical order.

    Args:
        evidence: The evidence.
        paths: The path of each image by its sha256, used in messages.

    Raises:
        ConvoyError: If the predictions or a measured property are invalid.
    """
    name, table = evidence.name, evidence.predictions

    def invalid(problem: str) -> ConvoyError:
        return ConvoyError(f"the predictions of {name} are invalid: {problem}; evaluate it again")

    if not isinstance(table, pd.DataFrame):
        raise invalid("they are not a table")
    columns = list(table.columns)
    if duplicated := sorted({str(column) for column in columns if columns.count(column) > 1}):
        raise invalid(f"there are two columns {duplicated[0]}")
    if missing := [column for column in ("sha256", "actual", "predicted") if column not in columns]:
        raise invalid(f"the column {missing[0]} is missing")
    prefixed = [column for column in columns if isinstance(column, str) and column.startswith(PROBABILITY_PREFIX)]
    classes = sorted(column.removeprefix(PROBABILITY_PREFIX) for column in prefixed)
    if not classes:
        raise invalid(f"there is no column {PROBABILITY_PREFIX}<class>")
    if not len(table):
        raise invalid("there are no images")
    texts = {}
    for column in ("sha256", "actual", "predicted", *(["group"] if "group" in columns else [])):
        texts[column] = table[column].to_numpy(object)
        if not all(isinstance(value, str) for value in texts[column]):
            raise invalid(f"the column {column} has values that are missing or not text")
    order = np.argsort(texts["sha256"], kind="stable")
    sha256, actual, predicted = (texts[column][order] for column in ("sha256", "actual", "predicted"))
    if malformed := next((value for value in sha256 if not SHA256.fullmatch(value)), None):
        raise invalid(f"{malformed!r} is not a sha256")
    if (repeated := sha256[1:] == sha256[:-1]).any():
        raise invalid(f"image {_image_name(sha256[1:][repeated][0], paths)} occurs twice")

    try:
        probabilities = table[[PROBABILITY_PREFIX + label for label in classes]].to_numpy(np.float64)[order]
    except (TypeError, ValueError) as error:
        raise invalid("some probabilities are not numbers") from error
    for is_invalid, problem in (
        (~np.isfinite(probabilities).all(axis=1), "has a probability that is not finite"),
        (~((probabilities >= 0) & (probabilities <= 1)).all(axis=1), "has a probability outside [0, 1]"),
        (~(np.abs(probabilities.sum(axis=1) - 1) <= SUM_TOLERANCE), "has probabilities that do not sum to 1"),
        (~np.isin(predicted.astype(str), classes), "has a predicted class without a probability"),
    ):
        if is_invalid.any():
            raise invalid(f"image {_image_name(sha256[is_invalid][0], paths)} {problem}")
    of_predicted = probabilities[np.arange(len(order)), np.searchsorted(classes, predicted.astype(str))]
    if (differs := of_predicted != probabilities.max(axis=1)).any():
        image = _image_name(sha256[differs][0], paths)
        raise invalid(f"image {image} has a predicted class that is not the most probable one")

    for value, measured in ((evidence.parameters, "number of parameters"), (evidence.latency, "latency")):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConvoyError(f"the {measured} of {name} is {value}: measure it again")
    groups = texts["group"][order] if "group" in texts else None
    return AlignedPredictions(name, classes, sha256, actual, predicted, probabilities, groups)


def check_same_images(first: AlignedPredictions, second: AlignedPredictions, paths: Mapping[str, str]) -> None:
    """Check that two models were evaluated on the same images with the same actual classes.

    Args:
        first: The predictions of one model.
        second: The predictions of the other model.
        paths: The path of each image by its sha256, used in messages.

    Raises:
        ConvoyError: If the images or their actual classes differ.
    """
    if unshared := set(first.sha256) ^ set(second.sha256):
        raise ConvoyError(
            f"{first.name} and {second.name} were evaluated on different test images, such as"
            f" {_image_name(min(unshared), paths)}: evaluate both again"
        )
    if (differs := first.actual != second.actual).any():
        raise ConvoyError(
            f"{first.name} and {second.name} have different actual classes for {differs.sum()} test images, such as"
            f" {_image_name(first.sha256[differs][0], paths)}: evaluate both again"
        )


def check_comparable(
    sha256: np.ndarray,
    actual: np.ndarray,
    models: Sequence[TrainingScope],
    near_duplicates: pd.DataFrame | None,
    paths: Mapping[str, str],
) -> set[str]:
    """Check that models can be compared, and return the test images that must be excluded.

    A test image is excluded if one of the models was trained on a near-duplicate of it. The check needs no
    predictions, so it can run before anything is trained.

    Args:
        sha256: (N,) sha256 of the test images.
        actual: (N,) actual classes of the test images.
        models: The challenger, the champion if there is one, and any other models.
        near_duplicates: Pairs of near-duplicate images, with the columns `test` and `other` (both sha256).
        paths: The path of each image by its sha256, used in messages.

    Returns:
        The sha256 of the test images to exclude.

    Raises:
        ConvoyError: If a model was trained on test images, no test image remains, a test image has a class that
            neither the challenger nor the champion knows, or no test image has a class that both know.
    """
    for model in models:
        _check_no_overlap(model, sha256, paths)
    excluded = _near_duplicates_of_training_images(models, near_duplicates).intersection(sha256)
    kept = ~np.isin(sha256.astype(str), list(excluded))
    if not kept.any():
        raise ConvoyError(
            "every test image is a near-duplicate of an image that a model was trained on: add test images that none "
            "of the models was trained on"
        )
    _check_classes(actual[kept], models[0], *models[1:2])
    return excluded


def _check_no_overlap(model: TrainingScope, sha256: np.ndarray, paths: Mapping[str, str]) -> None:
    training_hashes = set() if model.training_hashes is None else set(model.training_hashes)
    if not all(isinstance(value, str) and SHA256.fullmatch(value) for value in training_hashes):
        raise ConvoyError(f"the training images of {model.name} are not given by their sha256")
    if overlap := sorted(_image_name(value, paths) for value in training_hashes.intersection(sha256)):
        raise ConvoyError(
            f"{model.name} was trained on {len(overlap)} of the {len(sha256)} test images, such as {overlap[0]}, so it"
            " can't be evaluated on them. Restore split.seed and the fractions, splits and groups of its training, or"
            " start without a champion under another register.name in conf/config.yaml"
        )


def _near_duplicates_of_training_images(
    models: Sequence[TrainingScope], near_duplicates: pd.DataFrame | None
) -> set[str]:
    """Return the test images that have a near-duplicate among the training images of any of the models."""
    if near_duplicates is None:
        return set()
    training_hashes = {value for model in models for value in model.training_hashes or ()}
    return set(near_duplicates["test"][near_duplicates["other"].isin(training_hashes)])


def _check_classes(actual: np.ndarray, challenger: TrainingScope, champion: TrainingScope | None = None) -> None:
    names = " and ".join(model.name for model in (challenger, champion) if model)
    if unknown := sorted(set(actual) - {*challenger.classes, *(champion.classes if champion else ())}):
        raise ConvoyError(f"there are test images of class {unknown[0]!r}, which is unknown to {names}: train again")
    if champion and not np.isin(actual.astype(str), sorted({*challenger.classes} & {*champion.classes})).any():
        raise ConvoyError(
            f"there is no test image of a class that both {names} know: they are for different data sets. Give the new"
            " data set a name of its own (`name:` in conf/dataset/), or start without a champion under another"
            " register.name in conf/config.yaml"
        )


def merge_groups(models: Sequence[AlignedPredictions]) -> np.ndarray | None:
    """Return the group name of each image, (N,), or `None` if every image is its own group.

    An image without a group becomes a group of its own.

    Raises:
        ConvoyError: If the models have different groups for the same images.
    """
    columns = [model.groups for model in models if model.groups is not None]
    if not columns:
        return None
    if not all((groups == columns[0]).all() for groups in columns):
        raise ConvoyError("the same test images have different groups in the predictions: evaluate all models again")
    groups = np.where(columns[0] == "", "image " + models[0].sha256, columns[0])
    return groups if len(set(groups)) < len(groups) else None


def _image_name(sha256: str, paths: Mapping[str, str]) -> str:
    return paths.get(sha256, sha256)
