"""Checks of the promotion gate that compare challenger and champion: metric, recall of each class, log loss."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from convoy.core.config import SelectionMetric
from convoy.core.text import truncate_names
from convoy.promotion.checks import CheckResult, Outcome, label_metric, quote
from convoy.promotion.config import GateConfig
from convoy.promotion.evidence import AlignedPredictions
from convoy.promotion.paired_metric import PairedDifference, PredictionPairs, compare_metric
from convoy.promotion.statistics import bootstrap_mean, mcnemar_p_value

# Significance level of the tests that speak against a challenger. It is separate from `GateConfig.alpha`, because a
# stricter `alpha` must not weaken these tests.
REGRESSION_ALPHA = 0.05


def compare(
    new: AlignedPredictions,
    old: AlignedPredictions,
    best: AlignedPredictions | None,
    difference: PairedDifference,
    groups: np.ndarray | None,
    config: GateConfig,
    seed: int,
) -> Iterator[CheckResult]:
    """Run all checks that compare the challenger with a champion.

    Args:
        new: The challenger.
        old: The champion.
        best: The best champion so far, for mode `non_inferior`.
        difference: The difference between challenger and champion in the selection metric, with bounds of confidence
            1 - `config.alpha`.
        groups: (N,) group name of each test image, or `None` if every image is its own group.
        config: The criteria to apply.
        seed: The seed of the bootstrap.
    """
    if config.mode == "better":
        yield check_better(new, old, difference, config)
    else:
        yield check_non_inferior(new, old, difference, config)
        yield check_not_lower(new, old, difference)
    yield describe_difference(difference, config)
    if groups is not None:
        yield check_group_bootstrap(new, old, difference.metric, groups, config, seed)
    if config.mode == "non_inferior":
        yield check_best_champion(new, best, difference.metric, seed)
    yield from check_class_changes(new, old, difference.metric, config, seed)
    yield check_unpredicted_classes(new, old, config)
    yield from check_recall_drops(new, old, config)
    yield check_log_loss(new, old, groups, seed)


def check_better(
    new: AlignedPredictions, old: AlignedPredictions, difference: PairedDifference, config: GateConfig
) -> CheckResult:
    """Check that the challenger is significantly better than the champion, and not significantly worse."""
    limit, p_value = f"p below {config.alpha}", difference.p_better
    if result := _find_worse("better", new, old, difference, p_value, limit):
        return result
    is_shown = p_value < config.alpha
    verb = "is better than" if is_shown else "is not shown to be better than"
    message = f"{new.name} {verb} the champion {old.name}{_in_metric(difference)}: {difference.describe()}"
    message += f" (p = {p_value:.3g} by {difference.test}, limit {config.alpha})"
    return CheckResult("better", "pass" if is_shown else "hold", p_value, limit, message)


def check_non_inferior(
    new: AlignedPredictions, old: AlignedPredictions, difference: PairedDifference, config: GateConfig
) -> CheckResult:
    """Check that the challenger is at most `margin` worse than the champion, and not significantly worse."""
    limit = f"above {-config.margin}"
    if result := _find_worse("non-inferior", new, old, difference, difference.low, limit):
        return result
    is_shown = difference.low > -config.margin
    verb = "is non-inferior to" if is_shown else "is not shown to be non-inferior to"
    message = f"{new.name} {verb} the champion {old.name}{_in_metric(difference)}: {difference.describe()}"
    confidence = f"with confidence {1 - config.alpha:g} by {difference.interval}"
    message += f" (gain of {difference.low:+.4f} or more {confidence}, limit {-config.margin})"
    return CheckResult("non-inferior", "pass" if is_shown else "hold", difference.low, limit, message)


def check_not_lower(new: AlignedPredictions, old: AlignedPredictions, difference: PairedDifference) -> CheckResult:
    """Check that the metric is at least the champion's, so that it can't decline by a little each time."""
    label = label_metric(difference.metric)
    outcome: Outcome = "pass" if difference.gain >= 0 else "hold"
    verb = "is at least" if difference.gain >= 0 else "is below"
    message = f"the {label} of {new.name}, {difference.new:.4f}, {verb} that of the champion {old.name}, "
    message += f"{difference.old:.4f}"
    return CheckResult(f"{label} not lower", outcome, difference.gain, "at least 0", message)


def _find_worse(
    check: str,
    new: AlignedPredictions,
    old: AlignedPredictions,
    difference: PairedDifference,
    value: float,
    limit: str,
) -> CheckResult | None:
    """Return a rejection by a check if the challenger is significantly worse, else `None`."""
    if difference.p_worse >= REGRESSION_ALPHA:
        return None
    message = f"{new.name} is worse than the champion {old.name}{_in_metric(difference)}: {difference.describe()}"
    message += f" (p = {difference.p_worse:.3g} by {difference.test}, limit {REGRESSION_ALPHA})"
    return CheckResult(check, "reject", value, limit, message)


def _in_metric(difference: PairedDifference) -> str:
    return "" if difference.metric == "accuracy" else f" in {label_metric(difference.metric)}"


def describe_difference(difference: PairedDifference, config: GateConfig) -> CheckResult:
    """Report the difference in the metric with its confidence interval."""
    interval = f"{1 - 2 * config.alpha:.0%} interval {difference.low:+.4f} to {difference.high:+.4f}"
    message = f"{label_metric(difference.metric)} {difference.new:.4f} against {difference.old:.4f}: "
    message += f"{difference.gain:+.4f}, {interval}"
    return CheckResult("difference", "info", difference.gain, interval, message)


def check_group_bootstrap(
    new: AlignedPredictions,
    old: AlignedPredictions,
    metric: SelectionMetric,
    groups: np.ndarray,
    config: GateConfig,
    seed: int,
) -> CheckResult:
    """Check that the gain remains if complete groups of images are resampled."""
    minimum = 0.0 if config.mode == "better" else -config.margin
    pairs = PredictionPairs.count(new.actual, new.predicted, old.predicted)
    gains = pairs.gains_by_group(metric, groups, seed)
    low, high = (float(bound) for bound in np.quantile(gains, [config.alpha, 1 - config.alpha]))
    message = (
        f"if complete groups are resampled the gain is {low:+.4f} to {high:+.4f} ({len(set(groups))} groups), "
        f"limit {minimum}"
    )
    return CheckResult("group bootstrap", "pass" if low > minimum else "hold", low, f"above {minimum}", message)


def check_best_champion(
    new: AlignedPredictions, best: AlignedPredictions | None, metric: SelectionMetric, seed: int
) -> CheckResult:
    """Check that the challenger is not significantly worse than the best champion so far."""
    limit = f"p at least {REGRESSION_ALPHA}"
    if best is None:
        return CheckResult("best champion", "hold", None, limit, "the best champion so far is unknown")
    found = compare_metric(new.actual, new.predicted, best.predicted, metric, REGRESSION_ALPHA, seed)
    passed = found.p_worse >= REGRESSION_ALPHA
    verb = "is not significantly worse" if passed else "is worse"
    message = (
        f"{new.name} {verb} than the best champion so far, {best.name}{_in_metric(found)}: {found.describe()} "
        f"(p = {found.p_worse:.3g} by {found.test}, limit {REGRESSION_ALPHA})"
    )
    return CheckResult("best champion", "pass" if passed else "reject", found.p_worse, limit, message)


def check_class_changes(
    new: AlignedPredictions, old: AlignedPredictions, metric: SelectionMetric, config: GateConfig, seed: int
) -> Iterator[CheckResult]:
    """Check that added and removed classes are acknowledged, and that the others are not classified worse."""
    added, removed = sorted(set(new.classes) - set(old.classes)), sorted(set(old.classes) - set(new.classes))
    pending = [name for name in (*added, *removed) if name not in config.acknowledged_class_changes]
    message = f"the same classes as {old.name}"
    if added or removed:
        changes = [f"{quote(names)} {verb}" for names, verb in ((added, "added"), (removed, "removed")) if names]
        message = f"classes changed since {old.name}, {' and '.join(changes)}"
        # Not truncated: the user must copy every name into the setting.
        missing = ", ".join(map(repr, pending))
        if pending:
            message += f": if that is intended, add {missing} to register.gate.acknowledged_class_changes"
        else:
            message += ", acknowledged"
    outcome: Outcome = "hold" if pending else "pass"
    yield CheckResult("classes", outcome, len(added) + len(removed), "each acknowledged", message)
    known_changes = {*added, *removed, *_unpredicted_classes(new, old)}
    if unused := [name for name in config.acknowledged_class_changes if name not in known_changes]:
        message = (
            f"{quote(unused)} in register.gate.acknowledged_class_changes is neither added nor removed: remove it "
            "there, or it will hide a later change"
        )
        yield CheckResult("acknowledged class changes", "warn", len(unused), "0", message)
    if added or removed:
        yield check_shared_classes(new, old, metric, seed)


def check_shared_classes(
    new: AlignedPredictions, old: AlignedPredictions, metric: SelectionMetric, seed: int
) -> CheckResult:
    """Check that the challenger is not significantly worse on the images of the classes that both models know."""
    shared = np.isin(new.actual.astype(str), _shared_classes(new, old))
    predictions = (new.actual[shared], new.predicted[shared], old.predicted[shared])
    found = compare_metric(*predictions, metric, REGRESSION_ALPHA, seed)
    message = f"on the classes that both models know: {found.describe()}"
    message += f" (p = {found.p_worse:.3g} for worse by {found.test}, limit {REGRESSION_ALPHA})"
    outcome: Outcome = "pass" if found.p_worse >= REGRESSION_ALPHA else "reject"
    return CheckResult("shared classes", outcome, found.p_worse, f"p at least {REGRESSION_ALPHA}", message)


def check_unpredicted_classes(new: AlignedPredictions, old: AlignedPredictions, config: GateConfig) -> CheckResult:
    """Check that the challenger predicts every class that the champion predicts."""
    unpredicted = _unpredicted_classes(new, old)
    frequent = [name for name in unpredicted if (new.actual == name).sum() >= config.min_images_per_class]
    pending = frequent or [name for name in unpredicted if name not in config.acknowledged_class_changes]
    outcome: Outcome = "reject" if frequent else "hold" if pending else "pass"
    if not pending:
        message = f"{new.name} predicts every class that {old.name} predicts"
        message += ", or it is acknowledged" if unpredicted else ""
    else:
        message = f"{new.name} never predicts {quote(pending)}, and {old.name} does"
        # A class with few test images may be missing from the predictions by chance.
        if not frequent:
            message += ", perhaps by chance: add test images, or add it to register.gate.acknowledged_class_changes"
    return CheckResult("unpredicted classes", outcome, len(unpredicted), "0", message)


def check_recall_drops(new: AlignedPredictions, old: AlignedPredictions, config: GateConfig) -> Iterator[CheckResult]:
    """Check that the recall of no shared class drops significantly and by more than the limit."""
    counts = _count_wins_by_class(new, old)
    checked = counts[counts["images"] >= config.min_images_per_class]
    # Bonferroni correction for testing every class.
    alpha = REGRESSION_ALPHA / max(len(checked), 1)
    drop = (checked["losses"] - checked["wins"]) / checked["images"]
    p_worse = pd.Series(mcnemar_p_value(checked["losses"].to_numpy(), checked["wins"].to_numpy()), index=checked.index)
    failed = drop[(drop > config.max_recall_drop) & (p_worse < alpha)].sort_values(ascending=False, kind="stable")
    described = {
        name: f"{name!r} by {drop[name]:.4f} ({wins} won, {losses} lost, p = {p_worse[name]:.2g})"
        for name, wins, losses in zip(checked.index, checked["wins"], checked["losses"], strict=True)
        if drop[name] > 0
    }
    message = "the recall of no class drops"
    if len(failed):
        failures = truncate_names([described[name] for name in failed.index])
        message = f"the recall drops for {failures}, limits {config.max_recall_drop} and {alpha:.2g}"
    elif described:
        message = f"the recall of no class drops beyond the limit; the largest drop is {described[drop.idxmax()]}"
    outcome: Outcome = "reject" if len(failed) else "pass" if len(checked) else "info"
    limit = f"a drop of at most {config.max_recall_drop}, or p at least {alpha:.2g}"
    yield CheckResult("recall drop", outcome, float(drop.max()) if len(drop) else None, limit, message)

    if len(unchecked := counts.index.difference(checked.index)):
        minimum = config.min_images_per_class
        message = f"recall not checked, with fewer than {minimum} test images: {quote(list(unchecked))}"
        yield CheckResult("unchecked classes", "warn", len(unchecked), f"{minimum} images each", message)


def check_log_loss(
    new: AlignedPredictions, old: AlignedPredictions, groups: np.ndarray | None, seed: int
) -> CheckResult:
    """Check that the log loss on the shared classes does not rise significantly."""
    shared = np.isin(new.actual.astype(str), _shared_classes(new, old))
    new_loss, old_loss = new.log_loss(shared), old.log_loss(shared)
    rise = new_loss - old_loss
    low, high = bootstrap_mean(rise, None if groups is None else groups[shared], REGRESSION_ALPHA, seed)
    verb = "is worse" if low > 0 else "is not significantly worse"
    message = (
        f"the log loss of {new.name} {verb}: {new_loss.mean():.4f} against {old_loss.mean():.4f}, "
        f"{float(rise.mean()):+.4f}, {1 - 2 * REGRESSION_ALPHA:.0%} interval {low:+.4f} to {high:+.4f}"
    )
    return CheckResult("log loss", "reject" if low > 0 else "pass", low, "lower bound of the rise at most 0", message)


# Counts


def _count_wins_by_class(new: AlignedPredictions, old: AlignedPredictions) -> pd.DataFrame:
    """Return the numbers of images, wins and losses of each shared class."""
    shared = _shared_classes(new, old)
    selected = np.isin(new.actual.astype(str), shared)
    codes = np.searchsorted(shared, new.actual[selected].astype(str))
    wins = (new.is_correct & ~old.is_correct)[selected]
    losses = (old.is_correct & ~new.is_correct)[selected]
    return pd.DataFrame(
        {
            "images": np.bincount(codes, minlength=len(shared)),
            "wins": np.bincount(codes[wins], minlength=len(shared)),
            "losses": np.bincount(codes[losses], minlength=len(shared)),
        },
        index=shared,
    )


def _shared_classes(new: AlignedPredictions, old: AlignedPredictions) -> list[str]:
    return sorted(set(new.classes) & set(old.classes))


def _unpredicted_classes(new: AlignedPredictions, old: AlignedPredictions) -> list[str]:
    return sorted(set(_shared_classes(new, old)) & set(old.predicted) - set(new.predicted))
