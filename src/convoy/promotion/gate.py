"""The promotion gate, which decides whether a challenger may replace the champion.

Both models are evaluated on the same, current test images. `docs/promotion.md` explains the rule and reports its
measured error rates.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal

import pandas as pd

from convoy.core.config import SelectionMetric
from convoy.core.errors import ConvoyError
from convoy.promotion import checks, comparison
from convoy.promotion.checks import CheckResult
from convoy.promotion.config import GateConfig
from convoy.promotion.evidence import (
    ModelEvidence,
    TrainingScope,
    align,
    check_comparable,
    check_same_images,
    merge_groups,
)
from convoy.promotion.paired_metric import compare_metric

Decision = Literal["PROMOTE", "HOLD", "REJECT"]
# A promotion requires that one of these checks passed.
DECISIVE_CHECKS = ("better", "non-inferior", "first champion")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The decision of the gate and the results of all checks.

    The decision is PROMOTE, HOLD (there is not enough evidence) or REJECT (there is evidence against the challenger).
    """

    decision: Decision
    results: list[CheckResult]

    def table(self) -> pd.DataFrame:
        """Return the check results as a table with the text columns check, value, limit, outcome and message."""
        rows = [
            (each.check, checks.format_value(each.value), each.limit, each.outcome, each.message)
            for each in self.results
        ]
        return pd.DataFrame(rows, columns=["check", "value", "limit", "outcome", "message"])

    def summary(self) -> str:
        """Return one line with the decision, its reasons, the warnings and the smallest detectable gain."""
        outcomes = ("reject", "hold") if self.decision == "REJECT" else ("hold", "reject")
        blocking = [each.message for outcome in outcomes for each in self.results if each.outcome == outcome]
        decisive = [each.message for each in self.results if each.check in DECISIVE_CHECKS]
        warnings = [each.message for each in self.results if each.outcome == "warn"]
        gain = [each.message for each in self.results if each.check == "detectable gain"]
        return f"{self.decision}: " + "; ".join([*(blocking or decisive), *warnings, *gain])


def decide(
    challenger: ModelEvidence,
    champion: ModelEvidence | None,
    config: GateConfig,
    *,
    test_set_uses: int,
    metric: SelectionMetric = "accuracy",
    is_first: bool = False,
    best_champion: ModelEvidence | None = None,
    near_duplicates: pd.DataFrame | None = None,
    paths: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Verdict:
    """Decide whether the challenger may replace the champion.

    The result does not depend on the order of rows and columns in the predictions.

    Args:
        challenger: The model that is proposed for promotion.
        champion: The model that is currently in use, or `None` for the first promotion.
        config: The criteria to apply.
        test_set_uses: The number of models evaluated on these test images (see `fingerprint_test_images`), including
            this one.
        metric: The metric in which the challenger must be better.
        is_first: Whether there has never been a champion. Must be given explicitly together with `champion=None`, so
            that a champion that is missing by mistake is not skipped.
        best_champion: The best champion so far, which mode `non_inferior` also compares with. It may be the champion
            itself.
        near_duplicates: Pairs of near-duplicate images, with the columns `test` and `other` (both sha256). A test
            image is excluded if one of the models was trained on a near-duplicate of it.
        paths: The path of each image by its sha256, used in messages.
        seed: The seed of the permutations and of the bootstrap.

    Returns:
        The decision and the result of every check.

    Raises:
        ConvoyError: If the predictions are invalid or not comparable, or a model was trained on test images.
    """
    if is_first and champion is not None:
        raise ConvoyError(f"there is a champion, {champion.name}: pass is_first=False")
    if not is_first and champion is None:
        raise ConvoyError("the champion is missing or unreadable: restore it, or pass is_first=True if there never was")
    if champion is None and best_champion is not None:
        raise ConvoyError(f"there was a champion, {best_champion.name}: pass is_first=False")
    # Written as `not >=` to reject NaN as well.
    if not test_set_uses >= 1:
        raise ConvoyError(f"test_set_uses is {test_set_uses}, but this evaluation counts as well: pass 1 or more")
    models = [model for model in (challenger, champion, best_champion) if model is not None]
    paths = paths or {}
    new, *others = [align(model, paths) for model in models]
    for other in others:
        check_same_images(new, other, paths)
    scopes = [
        TrainingScope(model.name, aligned.classes, model.training_hashes)
        for model, aligned in zip(models, (new, *others), strict=True)
    ]
    excluded = check_comparable(new.sha256, new.actual, scopes, near_duplicates, paths)
    if excluded:
        new, *others = [aligned.without(excluded) for aligned in (new, *others)]
    old = others[0] if others else None
    best = others[-1] if best_champion else None
    groups = merge_groups([new, *others])

    # Without a champion this compares with perfect predictions, see `describe_detectable_gain`.
    predicted = old.predicted if old else new.actual
    difference = compare_metric(new.actual, new.predicted, predicted, metric, config.alpha, seed)
    results = [
        checks.check_test_images(new, config),
        checks.describe_detectable_gain(len(new.sha256), difference, config),
        checks.check_training_overlap(models, len(excluded)),
        checks.check_test_set_uses(test_set_uses, config),
        checks.check_score(new, metric, config),
        checks.check_majority_class(new, metric),
        *(
            comparison.compare(new, old, best, difference, groups, config, seed)
            if old
            else [checks.pass_first_champion(new, metric)]
        ),
        checks.describe_calibration([new, old] if old else [new], seed),
        checks.check_parameters(challenger, config),
        checks.check_latency(challenger, champion, config),
    ]
    return Verdict(_decide(results), results)


def _decide(results: Sequence[CheckResult]) -> Decision:
    outcomes = {result.outcome for result in results}
    if any(result.check == "test images" and result.outcome != "pass" for result in results):
        # With so few images there is no evidence in either direction.
        return "HOLD"
    if "reject" in outcomes:
        return "REJECT"
    is_shown = any(result.check in DECISIVE_CHECKS and result.outcome == "pass" for result in results)
    return "PROMOTE" if is_shown and "hold" not in outcomes else "HOLD"


def fingerprint_test_images(predictions: pd.DataFrame) -> str:
    """Return a hash that identifies a set of test images, used to count the evaluations on it.

    It is the SHA-256 of the images' sorted sha256, and so does not depend on the order of rows.
    """
    return hashlib.sha256("".join(sorted(predictions["sha256"])).encode()).hexdigest()
