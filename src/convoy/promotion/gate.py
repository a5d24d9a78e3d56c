"""The promotion gate, which decides whether a challenger may replace the champion.

Both models are evaluated on the same, current test images. `docs/promotion.md` explains the rule and reports its
measured error rates.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import Field
from scipy import sparse

# `scipy.stats` would have the same functions, but takes a second to import.
from scipy.special import bdtrc, ndtri

from convoy.core.config import Count, Fraction, NotNegative, Share, Whole, schema
from convoy.core.errors import ConvoyError
from convoy.core.text import truncate_names
from convoy.evaluation.calibration import MIN_PROBABILITY
from convoy.evaluation.metrics import PREFIX, calibration, calibration_noise, resampled, resampling_units

# Significance level of the tests that speak against a challenger. It is separate from `GateConfig.alpha`, because a
# stricter `alpha` must not weaken these tests.
REGRESSION_ALPHA = 0.05
# Statistical power at which `visible_gain` reports the smallest detectable gain.
POWER = 0.8
# Largest allowed deviation from 1 of the sum of an image's probabilities.
SUM_TOLERANCE = 1e-3
DIGEST = re.compile("[0-9a-f]{64}")

Decision = Literal["PROMOTE", "HOLD", "REJECT"]
Outcome = Literal["pass", "shown", "warn", "hold", "reject"]


@schema
class GateConfig:
    """Criteria that a challenger must meet to be promoted."""

    mode: Literal["better", "non_inferior"]  # non_inferior: for newer data, or a smaller or faster network
    alpha: Annotated[float, Field(gt=0, lt=0.5)]  # (0, 0.5): risk per evaluation of promoting an equally good model
    margin: Fraction  # (0, 1): largest accuracy loss accepted in mode non_inferior, with confidence 1 - alpha
    min_test_images: Count  # >= 1: with fewer test images the decision is always HOLD
    floor: Share  # [0, 1]: minimum test accuracy
    class_drop: Share  # [0, 1]: largest accepted drop in the recall of a class; only a significant drop blocks
    min_class_images: Count  # >= 1: minimum number of test images of a class for its recall to be checked
    max_parameters: Whole  # maximum number of parameters of the network; 0: no limit
    max_latency_ratio: NotNegative  # maximum latency, as a multiple of the champion's; 0: no limit
    max_looks: Count  # >= 1: evaluations on one set of test images, after which the gate warns
    acknowledge: list[str]  # names of classes that were added, removed or are no longer predicted on purpose


@dataclasses.dataclass(frozen=True)
class ModelEvidence:
    """A trained model with its test set predictions and its measured properties."""

    name: str
    predictions: pd.DataFrame  # columns sha256, actual, predicted, probability_<class>, and optionally group
    trained_on: Collection[str] | None  # sha256 of the images used to train or select it; None: unknown
    parameters: int | None = None  # number of parameters; None: not counted
    latency: float | None = None  # for one image, as a multiple of the champion's (1.0); None: not measured


@dataclasses.dataclass(frozen=True)
class Origin:
    """The classes and training images of a model, which determine the test images it can be evaluated on."""

    name: str
    classes: Collection[str]
    trained_on: Collection[str] | None  # sha256 of the images used to train or select it; None: unknown


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """The result of one check: its outcome, its value, its limit and a message."""

    check: str
    outcome: Outcome  # shown and warn never block a promotion
    value: float | None  # None: unknown
    limit: str
    words: str  # message for the user

    @property
    def passed(self) -> bool | None:
        """Whether the check passed, or `None` if it is only informative."""
        return {"pass": True, "hold": False, "reject": False}.get(self.outcome)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The decision of the gate and the results of all checks.

    The decision is PROMOTE, HOLD (there is not enough evidence) or REJECT (there is evidence against the challenger).
    """

    decision: Decision
    reasons: list[CheckResult]

    def table(self) -> pd.DataFrame:
        """Return the check results as a table with the text columns check, value, limit, outcome and words."""
        rows = [(r.check, _text(r.value), r.limit, r.outcome, r.words) for r in self.reasons]
        return pd.DataFrame(rows, columns=["check", "value", "limit", "outcome", "words"])

    def summary(self) -> str:
        """Return one line with the decision, its reasons, the warnings and the smallest detectable gain."""
        kinds = ("reject", "hold") if self.decision == "REJECT" else ("hold", "reject")
        blocking = [r.words for kind in kinds for r in self.reasons if r.outcome == kind]
        decisive = [r.words for r in self.reasons if r.check in DECISIVE]
        warnings = [r.words for r in self.reasons if r.outcome == "warn"]
        gain = [r.words for r in self.reasons if r.check == "visible gain"]
        return f"{self.decision}: " + "; ".join([*(blocking or decisive), *warnings, *gain])


# A promotion requires that one of these checks passed.
DECISIVE = ("better", "non-inferior", "first")


def decide(
    challenger: ModelEvidence,
    champion: ModelEvidence | None,
    params: GateConfig,
    *,
    looks: int,
    first: bool = False,
    best: ModelEvidence | None = None,
    alike: pd.DataFrame | None = None,
    paths: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Verdict:
    """Decide whether the challenger may replace the champion.

    The result does not depend on the order of rows and columns in the predictions.

    Args:
        challenger: The model that is proposed for promotion.
        champion: The model that is currently in use, or `None` for the first promotion.
        params: The criteria to apply.
        looks: The number of models evaluated on these test images (see `fingerprint`), including this one.
        first: Whether there has never been a champion. Must be given explicitly together with `champion=None`, so
            that a champion that is missing by mistake is not skipped.
        best: The best champion so far, which mode `non_inferior` also compares with. It may be the champion itself.
        alike: Pairs of near-duplicate images, with the columns `test` and `other` (both sha256). A test image is
            excluded if one of the models was trained on a near-duplicate of it.
        paths: The path of each image by its sha256, used in messages.
        seed: The seed of the bootstrap.

    Returns:
        The decision and the result of every check.

    Raises:
        ConvoyError: If the predictions are invalid or not comparable, or a model was trained on test images.
    """
    if first and champion is not None:
        raise ConvoyError(f"{champion.name} is the champion: judge without first=True")
    if not first and champion is None:
        raise ConvoyError("the champion is missing or unreadable: mend it, or say that there never was one, first=True")
    if champion is None and best is not None:
        raise ConvoyError(f"{best.name} was the best champion: judge without first=True")
    # Written as `not >=` to reject NaN as well.
    if not looks >= 1:
        raise ConvoyError(f"{looks} looks at the test images: this one counts too")
    known = [contender for contender in (challenger, champion, best) if contender is not None]
    paths = paths or {}
    new, *others = [_read(contender, paths) for contender in known]
    for other in others:
        _check_same_images(new, other, paths)
    origins = [
        Origin(contender.name, scored.classes, contender.trained_on)
        for contender, scored in zip(known, (new, *others), strict=True)
    ]
    left_out = check_comparable(new.digests, new.actual, origins, alike, paths)
    if left_out:
        new, *others = [scored.without(left_out) for scored in (new, *others)]
    old = others[0] if others else None
    groups = _groups([new, *others])

    reasons = [
        *_evidence(new, old, known, len(left_out), looks, params),
        *_floors(new, params),
        *(_against(new, old, others[-1] if best else None, groups, params, seed) if old else _first(new)),
        _calibration([new, old] if old else [new], seed),
        _size(challenger, params),
        _latency(challenger, champion, params),
    ]
    return Verdict(_decide(reasons), reasons)


def _decide(reasons: Sequence[CheckResult]) -> Decision:
    outcomes = {reason.outcome for reason in reasons}
    if any(reason.check == "test images" and reason.outcome != "pass" for reason in reasons):
        # With so few images there is no evidence in either direction.
        return "HOLD"
    if "reject" in outcomes:
        return "REJECT"
    shown = any(reason.check in DECISIVE and reason.outcome == "pass" for reason in reasons)
    return "PROMOTE" if shown and "hold" not in outcomes else "HOLD"


def fingerprint(predictions: pd.DataFrame) -> str:
    """Return a hash that identifies a set of test images, used to count the evaluations on it.

    It is the SHA-256 of the images' sorted sha256, and so does not depend on the order of rows.
    """
    return hashlib.sha256("".join(sorted(predictions["sha256"])).encode()).hexdigest()


# Statistics. Wins and losses may be integers or arrays of any shape.


def p_better(wins: np.ndarray | int, losses: np.ndarray | int) -> np.ndarray:
    """Return the p-value of McNemar's exact one-sided test (1947) that the challenger is better.

    Args:
        wins: Number of images that only the challenger classifies correctly.
        losses: Number of images that only the champion classifies correctly.

    Returns:
        The probability of at least this many wins if both models were equally good.
    """
    return bdtrc(np.asarray(wins) - 1, np.asarray(wins) + losses, 0.5)


def lower_bound(wins: np.ndarray | int, losses: np.ndarray | int, images: np.ndarray | int, alpha: float) -> np.ndarray:
    """Return a lower confidence bound of the challenger's gain in accuracy, by Tango's score interval (1998).

    The interval is also valid for few discordant pairs, or none. The upper bound is
    `-lower_bound(losses, wins, images, alpha)`.

    Args:
        wins: Number of images that only the challenger classifies correctly.
        losses: Number of images that only the champion classifies correctly.
        images: Number of all test images.
        alpha: One minus the confidence of this one-sided bound.

    Returns:
        The bound, in [-1, 1].
    """
    wins, losses, images = np.broadcast_arrays(*(np.asarray(n, float) for n in (wins, losses, images)))
    limit = ndtri(1 - alpha)
    low, high = np.full(wins.shape, -1.0), (wins - losses) / images
    # If all images are wins or all are losses, the score is 0 / 0 = NaN. The comparison is then false, so `high` moves.
    with np.errstate(invalid="ignore", divide="ignore"):
        for _ in range(50):
            middle = (low + high) / 2
            b = (2 * images - wins + losses) * middle - wins - losses
            spread = middle * (1 - middle)
            # Maximum likelihood estimate of the fraction of losses, given a gain of `middle`.
            lost = (np.sqrt(b**2 + 8 * images * losses * spread) - b) / (4 * images)
            score = (wins - losses - images * middle) / np.sqrt(images * (2 * lost + spread))
            low, high = np.where(score > limit, middle, low), np.where(score > limit, high, middle)
    return low


def better(wins: np.ndarray | int, losses: np.ndarray | int, alpha: float) -> np.ndarray:
    """Return whether the challenger is significantly better."""
    return p_better(wins, losses) < alpha


def non_inferior(
    wins: np.ndarray | int, losses: np.ndarray | int, images: np.ndarray | int, alpha: float, margin: float
) -> np.ndarray:
    """Return whether the challenger is non-inferior.

    The lower bound of its gain in accuracy must be above `-margin`, and it must have at least as many wins as losses.
    """
    return (lower_bound(wins, losses, images, alpha) > -margin) & (np.asarray(wins) >= losses)


def visible_gain(disagreement: float, images: int, alpha: float) -> float:
    """Return the smallest gain in accuracy that the test would detect with a probability of `POWER`.

    At `alpha=0.05` it is about `2.5 * sqrt(disagreement / images)`.

    Args:
        disagreement: Fraction of images that only one of the two models classifies correctly, in [0, 1].
        images: Number of test images.
        alpha: Significance level of the test.
    """
    return float((ndtri(1 - alpha) + ndtri(POWER)) * math.sqrt(disagreement / images))


def bootstrap(differences: np.ndarray, groups: np.ndarray | None, alpha: float, seed: int) -> tuple[float, float]:
    """Return bootstrap bounds of a mean difference (percentile method, Efron and Tibshirani 1993).

    Args:
        differences: (N,) difference of each image.
        groups: (N,) group names of the images. If given, complete groups are resampled instead of single images.
        alpha: One minus the confidence of each of the two bounds.
        seed: Seed of the resampling.

    Returns:
        The lower and the upper bound.
    """
    columns = sparse.csr_array(np.stack([differences, np.ones(len(differences))], axis=1))
    sums, sizes = resampled(columns, resampling_units(groups, len(differences)), seed).T
    low, high = np.quantile(sums / sizes, [alpha, 1 - alpha])
    return float(low), float(high)


# Reading and validating predictions


@dataclasses.dataclass(frozen=True)
class _AlignedPredictions:
    """Validated predictions, with images sorted by sha256 and classes sorted by name."""

    name: str
    classes: list[str]  # K class names
    digests: np.ndarray  # (N,) sha256
    actual: np.ndarray  # (N,) class names
    predicted: np.ndarray  # (N,) class names
    probabilities: np.ndarray  # (N, K) float64
    groups: np.ndarray | None  # (N,) group names

    @property
    def right(self) -> np.ndarray:
        return self.actual == self.predicted

    def without(self, digests: Collection[str]) -> "_AlignedPredictions":
        """Return a copy without the given images."""
        kept = ~np.isin(self.digests.astype(str), list(digests))
        groups = None if self.groups is None else self.groups[kept]
        return dataclasses.replace(
            self,
            digests=self.digests[kept],
            actual=self.actual[kept],
            predicted=self.predicted[kept],
            probabilities=self.probabilities[kept],
            groups=groups,
        )

    def loss(self, of: np.ndarray) -> np.ndarray:
        """Return the log loss of each image selected by the mask `of`, (N,) booleans.

        The model must know the actual classes of the selected images.
        """
        column = np.searchsorted(self.classes, self.actual[of].astype(str))
        return -np.log(np.maximum(self.probabilities[of, column], MIN_PROBABILITY))


def _read(contender: ModelEvidence, paths: Mapping[str, str]) -> _AlignedPredictions:
    name, table = contender.name, contender.predictions

    def broken(what: str) -> ConvoyError:
        return ConvoyError(f"the predictions of {name} can't be judged: {what}; evaluate it anew")

    if not isinstance(table, pd.DataFrame):
        raise broken("they are no table")
    columns = list(table.columns)
    if doubled := sorted({str(column) for column in columns if columns.count(column) > 1}):
        raise broken(f"the column {doubled[0]} is there twice")
    if missing := [column for column in ("sha256", "actual", "predicted") if column not in columns]:
        raise broken(f"the column {missing[0]} is missing")
    classes = sorted(
        column[len(PREFIX) :] for column in columns if isinstance(column, str) and column.startswith(PREFIX)
    )
    if not classes:
        raise broken(f"there is no column {PREFIX}<class>")
    if not len(table):
        raise broken("there is no image")
    texts = {}
    for column in ("sha256", "actual", "predicted", *(["group"] if "group" in columns else [])):
        texts[column] = table[column].to_numpy(object)
        if not all(isinstance(value, str) for value in texts[column]):
            raise broken(f"the column {column} has values that are missing or no text")
    order = np.argsort(texts["sha256"], kind="stable")
    digests, actual, predicted = (texts[column][order] for column in ("sha256", "actual", "predicted"))
    if wrong := next((digest for digest in digests if not DIGEST.fullmatch(digest)), None):
        raise broken(f"{wrong!r} is no sha256")
    if (same := digests[1:] == digests[:-1]).any():
        raise broken(f"image {_named(digests[1:][same][0], paths)} is there twice")

    try:
        probabilities = table[[PREFIX + name for name in classes]].to_numpy(np.float64)[order]
    except (TypeError, ValueError) as error:
        raise broken("there are probabilities that are no numbers") from error
    for bad, what in (
        (~np.isfinite(probabilities).all(axis=1), "has a probability that is no finite number"),
        (~((probabilities >= 0) & (probabilities <= 1)).all(axis=1), "has a probability outside [0, 1]"),
        (~(np.abs(probabilities.sum(axis=1) - 1) <= SUM_TOLERANCE), "has probabilities that do not sum to 1"),
        (~np.isin(predicted.astype(str), classes), "is predicted to be of a class that has no probability"),
    ):
        if bad.any():
            raise broken(f"image {_named(digests[bad][0], paths)} {what}")
    given = probabilities[np.arange(len(order)), np.searchsorted(classes, predicted.astype(str))]
    if (bad := given != probabilities.max(axis=1)).any():
        raise broken(f"image {_named(digests[bad][0], paths)} is predicted to be of another class than the likeliest")

    for number, what in ((contender.parameters, "number of parameters"), (contender.latency, "latency")):
        if number is not None and not (math.isfinite(number) and number > 0):
            raise ConvoyError(f"the {what} of {name} is {number}: measure it anew")
    group = texts["group"][order] if "group" in texts else None
    return _AlignedPredictions(name, classes, digests, actual, predicted, probabilities, group)


def check_comparable(
    digests: np.ndarray,
    actual: np.ndarray,
    models: Sequence[Origin],
    alike: pd.DataFrame | None,
    paths: Mapping[str, str],
) -> set[str]:
    """Check that models can be compared, and return the test images that must be excluded.

    A test image is excluded if one of the models was trained on a near-duplicate of it. The check needs no
    predictions, so it can run before anything is trained.

    Args:
        digests: (N,) sha256 of the test images.
        actual: (N,) actual classes of the test images.
        models: The challenger, the champion if there is one, and any other models.
        alike: Pairs of near-duplicate images, as in `decide`.
        paths: The path of each image by its sha256, used in messages.

    Returns:
        The sha256 of the test images to exclude.

    Raises:
        ConvoyError: If a model was trained on test images, no test image remains, a test image has a class that
            neither the challenger nor the champion knows, or no test image has a class that both know.
    """
    for model in models:
        _check_unseen(model, digests, paths)
    left_out = _seen_in_other_files(models, alike).intersection(digests)
    left = ~np.isin(digests.astype(str), list(left_out))
    if not left.any():
        raise ConvoyError(
            "every test image nearly equals one that a model was trained on: add test images that none of them has seen"
        )
    _check_classes(actual[left], models[0], *models[1:2])
    return left_out


def _check_unseen(model: Origin, digests: np.ndarray, paths: Mapping[str, str]) -> None:
    trained = set() if model.trained_on is None else set(model.trained_on)
    if not all(isinstance(digest, str) and DIGEST.fullmatch(digest) for digest in trained):
        raise ConvoyError(f"the images that {model.name} was trained on are not given by their sha256")
    if seen := sorted(_named(digest, paths) for digest in trained.intersection(digests)):
        raise ConvoyError(
            f"{model.name} was trained on {len(seen)} of the {len(digests)} test images, {seen[0]} among them:"
            " its answers prove nothing. Put back the seed, the fractions, splits and groups that it was trained with,"
            " or begin without a champion under another register.name in conf/config.yaml"
        )


def _named(digest: str, paths: Mapping[str, str]) -> str:
    return paths.get(digest, digest)


def _seen_in_other_files(models: Sequence[Origin], alike: pd.DataFrame | None) -> set[str]:
    """Return the test images that have a near-duplicate among the training images of any of the models."""
    if alike is None:
        return set()
    trained = {digest for model in models for digest in model.trained_on or ()}
    return set(alike["test"][alike["other"].isin(trained)])


def _check_same_images(one: _AlignedPredictions, other: _AlignedPredictions, paths: Mapping[str, str]) -> None:
    if only := set(one.digests) ^ set(other.digests):
        raise ConvoyError(
            f"{one.name} and {other.name} were judged on different test images, such as"
            f" {_named(min(only), paths)}: evaluate both anew"
        )
    if (differ := one.actual != other.actual).any():
        raise ConvoyError(
            f"{one.name} and {other.name} have different actual classes for {differ.sum()} test images, such as"
            f" {_named(one.digests[differ][0], paths)}: evaluate both anew"
        )


def _check_classes(actual: np.ndarray, new: Origin, old: Origin | None = None) -> None:
    names = " and ".join(model.name for model in (new, old) if model)
    if strange := sorted(set(actual) - {*new.classes, *(old.classes if old else ())}):
        raise ConvoyError(f"there are test images of the class {strange[0]!r}, which is unknown to {names}: train anew")
    if old and not np.isin(actual.astype(str), sorted({*new.classes} & {*old.classes})).any():
        raise ConvoyError(
            f"there is no test image of a class that both {names} know: they do different tasks. Give another data set"
            " a name of its own (`name:` in conf/dataset/), or begin without a champion under another register.name in"
            " conf/config.yaml"
        )


def _groups(scored: Sequence[_AlignedPredictions]) -> np.ndarray | None:
    """Return the group name of each image, (N,), or `None` if every image is its own group.

    An image without a group becomes a group of its own.
    """
    given = [table.groups for table in scored if table.groups is not None]
    if not given:
        return None
    if not all((groups == given[0]).all() for groups in given):
        raise ConvoyError("the predictions put the same test images into different groups: evaluate all anew")
    groups = np.where(given[0] == "", "image " + scored[0].digests, given[0])
    return groups if len(set(groups)) < len(groups) else None


# Checks


def _evidence(
    new: _AlignedPredictions,
    old: _AlignedPredictions | None,
    known: Sequence[ModelEvidence],
    left_out: int,
    looks: int,
    params: GateConfig,
) -> Iterator[CheckResult]:
    """Check the number of test images, possible leakage into training, and the number of evaluations."""
    images = len(new.digests)
    enough = images >= params.min_test_images
    words = f"{images} test images, and {params.min_test_images} are needed"
    yield CheckResult("test images", "pass" if enough else "hold", images, f"at least {params.min_test_images}", words)

    # Without a champion the disagreement is unknown. Two models can hardly disagree more often than they err, so the
    # error rate of the new champion stands in for its disagreement with a later challenger.
    disagreement = (new.right != old.right).mean() if old else 1 - new.right.mean()
    gain = visible_gain(max(float(disagreement), 1 / images), images, params.alpha)
    words = f"{images} test images can show a gain of about {gain:.4f} in accuracy"
    yield CheckResult("visible gain", "shown", gain, "none", words)

    unknown = [contender.name for contender in known if contender.trained_on is None or not len(contender.trained_on)]
    words = (
        f"not known which images {truncate_names(unknown)} saw in training"
        if unknown
        else "no test image was trained on"
    )
    words += f"; {left_out} others are left out, as files that nearly equal them were" if left_out else ""
    yield CheckResult("seen images", "hold" if unknown else "pass", None if unknown else 0, "0", words)

    words = f"look {looks} at these test images"
    if looks > params.max_looks:
        words += f", and after {params.max_looks} they are used up: bring fresh ones"
    yield CheckResult(
        "looks", "warn" if looks > params.max_looks else "shown", looks, f"at most {params.max_looks}", words
    )


def _floors(new: _AlignedPredictions, params: GateConfig) -> Iterator[CheckResult]:
    accuracy = float(new.right.mean())
    words = f"{new.name} has test accuracy {accuracy:.4f}, floor {params.floor}"
    outcome: Outcome = "pass" if accuracy >= params.floor else "reject"
    yield CheckResult("accuracy", outcome, accuracy, f"at least {params.floor}", words)

    names, counts = np.unique(new.actual.astype(str), return_counts=True)
    share = float(counts.max() / counts.sum())
    always = str(names[counts.argmax()])
    words = f"{new.name} reaches {accuracy:.4f}, and to call every image {always!r} would reach {share:.4f}"
    yield CheckResult("majority class", "pass" if accuracy > share else "reject", accuracy, f"above {share:.4f}", words)


def _first(new: _AlignedPredictions) -> Iterator[CheckResult]:
    words = f"{new.name} may be the first champion, with test accuracy {new.right.mean():.4f}"
    yield CheckResult("first", "pass", 0, "no champion before", words)


def _against(
    new: _AlignedPredictions,
    old: _AlignedPredictions,
    best: _AlignedPredictions | None,
    groups: np.ndarray | None,
    params: GateConfig,
    seed: int,
) -> Iterator[CheckResult]:
    """Run all checks that compare the challenger with a champion."""
    yield from _accuracy(new, old, groups, params, seed)
    if params.mode == "non_inferior":
        yield _best_ever(new, best)
    yield from _class_changes(new, old, params)
    yield _silent(new, old, params)
    yield from _class_drops(new, old, params)
    yield _log_loss(new, old, groups, seed)


def _accuracy(
    new: _AlignedPredictions, old: _AlignedPredictions, groups: np.ndarray | None, params: GateConfig, seed: int
) -> Iterator[CheckResult]:
    wins, losses, images = *_pairs(new, old), len(new.digests)
    alpha, least = params.alpha, 0.0 if params.mode == "better" else -params.margin
    low, high = float(lower_bound(wins, losses, images, alpha)), -float(lower_bound(losses, wins, images, alpha))
    p, p_worse = float(p_better(wins, losses)), float(p_better(losses, wins))
    if params.mode == "better":
        passed, check, value, limit = bool(better(wins, losses, alpha)), "better", p, f"p below {alpha}"
        verb, shown = "better than", f"p = {p:.3g}, limit {alpha}"
    else:
        passed, check, value = bool(non_inferior(wins, losses, images, alpha, params.margin)), "non-inferior", low
        limit = f"above {least}, and as many won as lost"
        verb, shown = "non-inferior to", f"{low:+.4f} or more with confidence {1 - alpha:g}, limit {least}"
    verb = f"is {verb}" if passed else f"is not shown to be {verb}"
    outcome: Outcome = "pass" if passed else "hold"
    if p_worse < REGRESSION_ALPHA:
        outcome, verb, shown = "reject", "is worse than", f"p = {p_worse:.3g}, limit {REGRESSION_ALPHA}"
    counted = f"{wins} images won, {losses} lost ({shown})"
    yield CheckResult(check, outcome, value, limit, f"{new.name} {verb} the champion {old.name}: {counted}")

    sure, gain = f"{1 - 2 * alpha:.0%} interval {low:+.4f} to {high:+.4f}", (wins - losses) / images
    words = f"accuracy {new.right.mean():.4f} against {old.right.mean():.4f}: {gain:+.4f}, {sure}"
    yield CheckResult("difference", "shown", gain, sure, words)

    if groups is not None:
        low, high = bootstrap(new.right.astype(float) - old.right, groups, alpha, seed)
        words = f"with groups kept together the gain is {low:+.4f} to {high:+.4f} ({len(set(groups))} groups)"
        yield CheckResult(
            "by groups", "pass" if low > least else "hold", low, f"above {least}", f"{words}, limit {least}"
        )


def _best_ever(new: _AlignedPredictions, best: _AlignedPredictions | None) -> CheckResult:
    if best is None:
        return CheckResult(
            "best ever", "hold", None, f"p at least {REGRESSION_ALPHA}", "the best champion ever is not given"
        )
    wins, losses = _pairs(new, best)
    p = float(p_better(losses, wins))
    verb = "is not significantly worse" if p >= REGRESSION_ALPHA else "is worse"
    words = (
        f"{new.name} {verb} than the best champion ever, {best.name}: {wins} images won, {losses} lost (p = {p:.3g})"
    )
    return CheckResult(
        "best ever", "pass" if p >= REGRESSION_ALPHA else "reject", p, f"p at least {REGRESSION_ALPHA}", words
    )


def _class_changes(new: _AlignedPredictions, old: _AlignedPredictions, params: GateConfig) -> Iterator[CheckResult]:
    came, went = sorted(set(new.classes) - set(old.classes)), sorted(set(old.classes) - set(new.classes))
    open_ = [name for name in (*came, *went) if name not in params.acknowledge]
    words = f"the classes of {old.name} and no others"
    if came or went:
        told = [f"{_quoted(names)} {verb}" for names, verb in ((came, "came"), (went, "went")) if names]
        words = f"since {old.name} {' and '.join(told)}"
        # Not truncated: the user must copy every name into the setting.
        missing = ", ".join(map(repr, open_))
        words += f": if that is intended, add {missing} to acknowledge" if open_ else ", as acknowledged"
    limit = "each acknowledged"
    yield CheckResult("classes", "hold" if open_ else "pass", len(came) + len(went), limit, words)
    if unused := [name for name in params.acknowledge if name not in {*came, *went, *_silenced(new, old)}]:
        words = f"{_quoted(unused)} in acknowledge neither came nor went: remove it, or it will hide a later change"
        yield CheckResult("acknowledge", "warn", len(unused), "0", words)
    if came or went:
        both = np.isin(new.actual.astype(str), _shared(new, old))
        wins, losses = int((new.right & ~old.right)[both].sum()), int((old.right & ~new.right)[both].sum())
        p = float(p_better(losses, wins))
        words = f"on the classes that both know: {wins} images won, {losses} lost"
        words += f" (p = {p:.3g} for worse, limit {REGRESSION_ALPHA})"
        yield CheckResult(
            "old classes", "pass" if p >= REGRESSION_ALPHA else "reject", p, f"p at least {REGRESSION_ALPHA}", words
        )


def _silent(new: _AlignedPredictions, old: _AlignedPredictions, params: GateConfig) -> CheckResult:
    silent = _silenced(new, old)
    many = [name for name in silent if (new.actual == name).sum() >= params.min_class_images]
    open_ = many or [name for name in silent if name not in params.acknowledge]
    words = f"{new.name} never predicts {_quoted(open_)}, and {old.name} does"
    if not open_:
        words = f"{new.name} predicts every class that {old.name} predicts" + (", or it is acknowledged" * bool(silent))
    # A class with few test images may be missing from the predictions by chance.
    elif not many:
        words += ": too few test images to say more, bring some or acknowledge it"
    return CheckResult("silent classes", "reject" if many else "hold" if open_ else "pass", len(silent), "0", words)


def _silenced(new: _AlignedPredictions, old: _AlignedPredictions) -> list[str]:
    return sorted(set(_shared(new, old)) & set(old.predicted) - set(new.predicted))


def _class_drops(new: _AlignedPredictions, old: _AlignedPredictions, params: GateConfig) -> Iterator[CheckResult]:
    """Check that the recall of no shared class drops significantly and by more than the limit."""
    shared = _shared(new, old)
    rows = np.isin(new.actual.astype(str), shared)
    codes = np.searchsorted(shared, new.actual[rows].astype(str))
    won, lost = (new.right & ~old.right)[rows], (old.right & ~new.right)[rows]
    counts = pd.DataFrame(
        {
            "images": np.bincount(codes, minlength=len(shared)),
            "wins": np.bincount(codes[won], minlength=len(shared)),
            "losses": np.bincount(codes[lost], minlength=len(shared)),
        },
        index=shared,
    )
    guarded = counts[counts["images"] >= params.min_class_images]
    # Bonferroni correction for testing every class.
    level = REGRESSION_ALPHA / max(len(guarded), 1)
    drop = (guarded["losses"] - guarded["wins"]) / guarded["images"]
    p = pd.Series(p_better(guarded["losses"].to_numpy(), guarded["wins"].to_numpy()), index=guarded.index)
    hurt = drop[(drop > params.class_drop) & (p < level)].sort_values(ascending=False, kind="stable")
    limit = f"a drop of at most {params.class_drop}, or p at least {level:.2g}"
    told = {
        name: f"{name!r} by {drop[name]:.4f} ({wins} won, {losses} lost, p = {p[name]:.2g})"
        for name, wins, losses in zip(guarded.index, guarded["wins"], guarded["losses"], strict=True)
        if drop[name] > 0
    }
    words = "recall fell for no class"
    if len(hurt):
        fallen = truncate_names([told[name] for name in hurt.index])
        words = f"recall fell for {fallen}, limits {params.class_drop} and {level:.2g}"
    elif told:
        words = f"recall fell for no class beyond the limit, and most for {told[drop.idxmax()]}"
    outcome: Outcome = "reject" if len(hurt) else "pass" if len(guarded) else "shown"
    yield CheckResult("class drop", outcome, float(drop.max()) if len(drop) else None, limit, words)

    if len(few := counts.index.difference(guarded.index)):
        words = f"not guarded, with fewer than {params.min_class_images} test images: {_quoted(list(few))}"
        yield CheckResult("unguarded classes", "warn", len(few), f"{params.min_class_images} images each", words)


def _log_loss(new: _AlignedPredictions, old: _AlignedPredictions, groups: np.ndarray | None, seed: int) -> CheckResult:
    both = np.isin(new.actual.astype(str), _shared(new, old))
    one, other = new.loss(both), old.loss(both)
    low, high = bootstrap(one - other, None if groups is None else groups[both], REGRESSION_ALPHA, seed)
    change = float((one - other).mean())
    verb = "is worse" if low > 0 else "is not significantly worse"
    words = (
        f"the log loss of {new.name} {verb}: {one.mean():.4f} against {other.mean():.4f}, {change:+.4f},"
        f" {1 - 2 * REGRESSION_ALPHA:.0%} interval {low:+.4f} to {high:+.4f}"
    )
    return CheckResult("log loss", "reject" if low > 0 else "pass", low, "lower bound of the rise at most 0", words)


def _calibration(scored: Sequence[_AlignedPredictions], seed: int) -> CheckResult:
    told, errors, noises = [], [], []
    for table in scored:
        confidence = table.probabilities.max(axis=1)
        errors.append(float(calibration(confidence, table.right)))
        noises.append(calibration_noise(confidence, seed))
        told.append(f"{table.name} {errors[-1]:.4f} (perfect: {noises[-1]:.4f})")
    words = f"calibration error, and what perfect probabilities would show here: {', '.join(told)}"
    return CheckResult("calibration", "shown", errors[0], f"noise {noises[0]:.4f}", words)


def _size(challenger: ModelEvidence, params: GateConfig) -> CheckResult:
    size, budget = challenger.parameters, params.max_parameters
    words = f"{challenger.name} has {size} parameters" if size is not None else "the parameters were not counted"
    if not budget:
        return CheckResult("parameters", "shown", size, "no budget", words)
    outcome: Outcome = "hold" if size is None else "pass" if size <= budget else "reject"
    return CheckResult("parameters", outcome, size, f"at most {budget}", f"{words}, budget {budget}")


def _latency(challenger: ModelEvidence, champion: ModelEvidence | None, params: GateConfig) -> CheckResult:
    budget = params.max_latency_ratio
    if champion is None:
        return CheckResult("latency", "shown", None, "no champion before", "no champion to compare the latency with")
    ratio = None
    if challenger.latency is not None and champion.latency is not None:
        ratio = challenger.latency / champion.latency
    words = f"the latency of {challenger.name} is {_text(ratio)} times that of {champion.name}"
    if ratio is None:
        words = "the latency was not measured on both sides"
    if not budget:
        return CheckResult("latency", "shown", ratio, "no budget", words)
    outcome: Outcome = "hold" if ratio is None else "pass" if ratio <= budget else "reject"
    return CheckResult("latency", outcome, ratio, f"at most {budget} times", f"{words}, budget {budget} times")


def _pairs(new: _AlignedPredictions, old: _AlignedPredictions) -> tuple[int, int]:
    """Return the number of wins and losses: images that only `new`, or only `old`, classifies correctly."""
    return int((new.right & ~old.right).sum()), int((old.right & ~new.right).sum())


def _shared(one: _AlignedPredictions, other: _AlignedPredictions) -> list[str]:
    return sorted(set(one.classes) & set(other.classes))


def _quoted(names: Sequence[str]) -> str:
    return truncate_names([repr(name) for name in names])


def _text(value: float | None) -> str:
    if value is None:
        return "not known"
    if float(value).is_integer():
        return str(int(value))
    return f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.2g}"
