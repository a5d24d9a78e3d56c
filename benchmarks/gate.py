"""The gate's error rates, next to the rule that most people use: `python benchmarks/gate.py`.

Models are simulated, none is trained. Whether a model classifies an image correctly follows from its skill, from how
difficult the image is for all models, and from chance, in proportions that make two equal models disagree on
`DISAGREEMENT` of the images. The rules are the functions that the gate calls. Its other checks are left out; they can
only lower the number of promotions.

Rules for accuracy see classes of equal size. Those for balanced accuracy and macro F1 see ten classes of which the
largest has 20 times as many images as the smallest.
"""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import multivariate_normal, norm

from convoy.core.config import SelectionMetric
from convoy.promotion import paired_metric
from convoy.promotion.paired_metric import PairedDifference, compare_metric
from convoy.promotion.statistics import is_better, is_non_inferior

ACCURACY = 0.92  # of the champion at the start, in every class
DISAGREEMENT = 0.04  # fraction of images that only one of two equal models classifies correctly
TEST_IMAGES = (500, 2_000, 10_000)
GAINS = {"equal": 0.0, "1 point worse": -0.01, "2 points better": 0.02}
# Challengers for each gain: of a rule for accuracy, and of one that permutes the predictions of each.
CHALLENGERS, PERMUTED_CHALLENGERS = 100_000, 1_000
# Simulated years, as above.
YEARS, PERMUTED_YEARS = 300, 50
# Rules that permute take most of the time, so fewer cases are simulated for them: up to this number of test images, and
# one rule for whole years.
MAX_PERMUTED_IMAGES = 2_000
YEARLY_PERMUTED_RULES = ("balanced_accuracy: better, alpha 0.05",)
EVALUATIONS = 52  # per year
CLASSES, IMBALANCE = 10, 20
# Points of accuracy that a challenger gains in the five larger classes and loses in the others.
TRADED = 0.03
POWER = 0.95
STEP = 50  # images
DISAGREEMENTS = (0.04, 0.08, 0.16)  # between the champion and a challenger that is 2 points better
SEED = 1

# Takes wins, losses and images, and returns which challengers are promoted.
CountRule = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
COUNT_RULES: dict[str, CountRule] = {
    "new accuracy above old": lambda wins, losses, images: wins > losses,
    "better, alpha 0.05": lambda wins, losses, images: is_better(wins, losses, 0.05),
    "better, alpha 0.01": lambda wins, losses, images: is_better(wins, losses, 0.01),
    "non_inferior, margin 0.01": lambda wins, losses, images: is_non_inferior(wins, losses, images, 0.05, 0.01),
}


class PermutedRule(NamedTuple):
    """A rule of the gate for a metric in which all classes have the same weight."""

    metric: SelectionMetric
    mode: str = "better"
    alpha: float = 0.05


PERMUTED_RULES = {
    "balanced_accuracy: better, alpha 0.05": PermutedRule("balanced_accuracy"),
    "balanced_accuracy: better, alpha 0.01": PermutedRule("balanced_accuracy", alpha=0.01),
    "balanced_accuracy: non_inferior, margin 0.01": PermutedRule("balanced_accuracy", "non_inferior"),
    "macro_f1: better, alpha 0.05": PermutedRule("macro_f1"),
}


class Scenario(NamedTuple):
    """What a year of retraining is like."""

    spread: float  # standard deviation of the true accuracy of the challengers
    climbs: bool  # challengers are on average as good as the current champion; otherwise as the first champion
    new_images: bool  # other test images each week, on which the champion is as good as the first one


SCENARIOS = {
    "plateau": Scenario(spread=0.01, climbs=False, new_images=False),
    "climb": Scenario(spread=0.01, climbs=True, new_images=False),
    "drift": Scenario(spread=0.01, climbs=True, new_images=True),
    "same again": Scenario(spread=0.0, climbs=True, new_images=False),
}


def main() -> None:
    # The simulation would take five times as long with as many as the gate uses.
    paired_metric.PERMUTATIONS, paired_metric.RESAMPLES = 1_000, 500
    start = time.perf_counter()
    common = brentq(lambda fraction: disagreement(ACCURACY, ACCURACY, fraction) - DISAGREEMENT, 0, 0.9999)
    once, years = [], []
    for images in TEST_IMAGES:
        rates = evaluate_once(images, common)
        if images <= MAX_PERMUTED_IMAGES:
            rates |= evaluate_permuted(images, common)
        once += [{"test images": f"{images:,}", "rule": rule} | found for rule, found in rates.items()]
        for name, scenario in SCENARIOS.items():
            for rule, found in simulate_years(images, common, scenario).items():
                years.append({"test images": f"{images:,}", "rule": rule, "scenario": name} | found)
        print(f"{images:,} images: {time.perf_counter() - start:.0f} seconds", flush=True)
    print("Fraction that is promoted in one evaluation:\n")
    print(pd.DataFrame(once).to_markdown(index=False, disable_numparse=True))
    print(f"\nIn a year of {EVALUATIONS} evaluations:\n")
    print(pd.DataFrame(years).sort_values(["scenario"], kind="stable").to_markdown(index=False, disable_numparse=True))
    print(f"\nTest images from which {POWER:.0%} of 2-point gains are detected, rounded up to {STEP}:\n")
    print(pd.DataFrame(map(find_enough_images, DISAGREEMENTS)).to_markdown(index=False))
    print(f"\n{time.perf_counter() - start:.0f} seconds")


# Simulated models


def draw_part(random: np.random.Generator, fraction: float, shape: tuple[int, ...]) -> np.ndarray:
    """Return a part of the skill that explains this fraction of its variance."""
    return np.float32(np.sqrt(fraction)) * random.standard_normal(shape, np.float32)


def is_correct(skill: np.ndarray, accuracy: np.ndarray | float) -> np.ndarray:
    return skill > -norm.ppf(accuracy).astype(np.float32)


def probability_both_correct(one: float, other: float, common: float) -> float:
    """Return the fraction of images that two models of these accuracies both classify correctly.

    Args:
        one: Accuracy of a model.
        other: Accuracy of the other model.
        common: Correlation of their skills on an image.
    """
    return float(multivariate_normal([0, 0], [[1, common], [common, 1]]).cdf(norm.ppf([one, other])))


def disagreement(one: float, other: float, common: float) -> float:
    return one + other - 2 * probability_both_correct(one, other, common)


@functools.cache
def make_classes(images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the index and the name of each image's actual class, and the name of the class that it is mistaken for.

    Classes are sorted by their size, the largest first.
    """
    sizes = IMBALANCE ** -np.linspace(0, 1, CLASSES)
    actual = np.searchsorted(np.cumsum(sizes / sizes.sum()), (np.arange(images) + 0.5) / images)
    mistaken = (actual + np.random.default_rng(SEED).integers(1, CLASSES, images)) % CLASSES
    return actual, *(codes.astype(str).astype(object) for codes in (actual, mistaken))


def compare(metric: SelectionMetric, new_correct: np.ndarray, old_correct: np.ndarray) -> PairedDifference:
    """Compare a challenger with a champion, given which images (N,) each classifies correctly."""
    _, actual, mistaken = make_classes(len(new_correct))
    new, old = (np.where(correct, actual, mistaken) for correct in (new_correct, old_correct))
    return compare_metric(actual, new, old, metric, 0.05, SEED)


def is_promoted(rule: PermutedRule, found: PairedDifference) -> bool:
    if rule.mode == "better":
        return found.p_better < rule.alpha
    return found.low > -0.01 and found.gain >= 0


# A single evaluation


def evaluate_once(images: int, common: float) -> dict[str, dict[str, str]]:
    """Return the fraction of challengers that each rule for accuracy promotes, by their true gain."""
    found: dict[str, dict[str, str]] = {rule: {} for rule in COUNT_RULES}
    for name, gain in GAINS.items():
        random = np.random.default_rng(SEED)
        both = probability_both_correct(ACCURACY + gain, ACCURACY, common)
        wins, losses = ACCURACY + gain - both, ACCURACY - both
        won, lost, _ = random.multinomial(images, [wins, losses, 1 - wins - losses], CHALLENGERS).T
        for rule, promoted in COUNT_RULES.items():
            found[rule][name] = f"{promoted(won, lost, images).mean():.2%}"
    return found


def evaluate_permuted(images: int, common: float) -> dict[str, dict[str, str]]:
    """Return the fraction of challengers that each rule for imbalanced classes promotes, by their true gain.

    `traded` are challengers that are equal in balanced accuracy: better in the larger classes, and as much worse in the
    others. The rule for accuracy is applied to them, too.
    """
    actual, *_ = make_classes(images)
    trade = np.where(actual < CLASSES // 2, TRADED, -TRADED)
    found: dict[str, dict[str, str]] = {rule: {} for rule in (*PERMUTED_RULES, "better, alpha 0.05")}
    for name, gain in (*GAINS.items(), ("traded", trade)):
        random = np.random.default_rng(SEED)
        promoted: dict[str, list[bool]] = {rule: [] for rule in found}
        for _ in range(PERMUTED_CHALLENGERS):
            ease = draw_part(random, common, (images,))
            old = is_correct(ease + draw_part(random, 1 - common, (images,)), ACCURACY)
            new = is_correct(ease + draw_part(random, 1 - common, (images,)), ACCURACY + gain)
            differences = {metric: compare(metric, new, old) for metric in ("balanced_accuracy", "macro_f1")}
            for rule, settings in PERMUTED_RULES.items():
                promoted[rule].append(is_promoted(settings, differences[settings.metric]))
            promoted["better, alpha 0.05"].append(bool(is_better((new & ~old).sum(), (old & ~new).sum(), 0.05)))
        for rule, values in promoted.items():
            found[rule][name] = f"{np.mean(values):.2%}"
    found["better, alpha 0.05"] = {"traded": found["better, alpha 0.05"]["traded"]}
    return {f"{rule}, imbalanced" if rule in COUNT_RULES else rule: rates for rule, rates in found.items()}


def find_enough_images(disagree: float) -> dict[str, float]:
    """Return the number of test images that each rule needs at a disagreement of the two models."""
    found: dict[str, float] = {"disagreement": disagree}
    for rule, promoted in COUNT_RULES.items():
        detected, images = 0.0, 0
        while detected < POWER:
            images += STEP
            fractions = [disagree / 2 + 0.01, disagree / 2 - 0.01, 1 - disagree]
            won, lost, _ = np.random.default_rng(SEED).multinomial(images, fractions, CHALLENGERS // 10).T
            detected = promoted(won, lost, images).mean()
        found[rule] = images
    return found


# Years of evaluations


def simulate_years(images: int, common: float, scenario: Scenario) -> dict[str, dict[str, str]]:
    """Return what each rule does in such years."""
    random = np.random.default_rng(SEED)
    shape = (YEARS, images)
    rules = [*COUNT_RULES, *(YEARLY_PERMUTED_RULES if images <= MAX_PERMUTED_IMAGES else ())]

    def draw_champion(ease: np.ndarray) -> dict[str, np.ndarray]:
        return dict.fromkeys(rules, is_correct(ease + draw_part(random, 1 - common, shape), ACCURACY))

    ease = draw_part(random, common, shape)
    correct, accuracy = draw_champion(ease), {rule: np.full(YEARS, ACCURACY) for rule in rules}
    counts = {rule: np.zeros((5, YEARS)) for rule in rules}
    for _ in range(EVALUATIONS):
        if scenario.new_images:
            ease = draw_part(random, common, shape)
            correct, accuracy = draw_champion(ease), {rule: np.full(YEARS, ACCURACY) for rule in rules}
        skill = ease + draw_part(random, 1 - common, shape)
        gained = scenario.spread * random.standard_normal(YEARS)
        for rule in rules:
            new_accuracy = np.minimum((accuracy[rule] if scenario.climbs else ACCURACY) + gained, 0.9999)
            new = is_correct(skill, new_accuracy[:, None])
            if rule in COUNT_RULES:
                won, lost = (new & ~correct[rule]).sum(axis=1), (correct[rule] & ~new).sum(axis=1)
                moved = COUNT_RULES[rule](won, lost, images)
            else:
                moved = np.zeros(YEARS, bool)
                settings = PERMUTED_RULES[rule]
                pairs = zip(new[:PERMUTED_YEARS], correct[rule][:PERMUTED_YEARS], strict=True)
                moved[:PERMUTED_YEARS] = [is_promoted(settings, compare(settings.metric, *pair)) for pair in pairs]
            gain = new_accuracy - accuracy[rule]
            worse, large = moved & (gain < 0), gain >= 0.02
            counts[rule] += [moved, worse, np.where(worse, -gain, 0), large, large & moved]
            accuracy[rule] = np.where(moved, new_accuracy, accuracy[rule])
            correct[rule] = np.where(moved[:, None], new, correct[rule])
    found = {}
    for rule, table in counts.items():
        years = YEARS if rule in COUNT_RULES else PERMUTED_YEARS
        moved, worse, lost, large, detected = table[:, :years]
        found[rule] = {
            "promotions": f"{moved.mean():.2f}",
            "truly worse": f"{worse.mean():.3f} ± {worse.std() / np.sqrt(years):.3f}",
            "points lost by each": f"{100 * lost.sum() / max(worse.sum(), 1):.2f}",
            "2-point gains detected": f"{detected.sum() / large.sum():.1%}" if large.sum() else "",
            "accuracy in the end": f"{accuracy[rule][:years].mean():.4f}",
        }
    return found


if __name__ == "__main__":
    main()
