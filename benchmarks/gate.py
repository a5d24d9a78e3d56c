"""How often the gate errs, beside the rule that most people use: `python benchmarks/gate.py`.

Models are simulated, none is trained: whether a model gets an image right follows from the model's skill, from how
hard the image is for all models, and from chance, in shares that make two equal models disagree on `DISAGREEMENT` of
the images. The rules are the functions that the gate itself calls. Its other checks are left out; they can only lower
the number of promotions.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import multivariate_normal, norm

from convoy.promotion.statistics import is_better, is_non_inferior

ACCURACY = 0.92  # of the champion at the start
DISAGREEMENT = 0.04  # share of images that one of two equal models alone gets right
IMAGES = (500, 2_000, 10_000)
GAINS = {"equal": 0.0, "1 point worse": -0.01, "2 points better": 0.02}
PAIRS = 100_000  # of models, for each gain
SEEN = 0.95
STEP = 50
DISAGREEMENTS = (0.04, 0.08, 0.16)  # between the champion and what is 2 points better
YEARS = 300
LOOKS = 52  # a year
SEED = 1

Rule = Callable[[np.ndarray, np.ndarray, int], np.ndarray]  # wins, losses, images -> promoted
RULES: dict[str, Rule] = {
    "new accuracy above old": lambda wins, losses, images: wins > losses,
    "better, alpha 0.05": lambda wins, losses, images: is_better(wins, losses, 0.05),
    "better, alpha 0.01": lambda wins, losses, images: is_better(wins, losses, 0.01),
    "non_inferior, alpha 0.05, margin 0.01": lambda wins, losses, images: is_non_inferior(
        wins, losses, images, 0.05, 0.01
    ),
}


class Year(NamedTuple):
    """What a year of retraining is like."""

    spread: float  # standard deviation of the true accuracy of what a retraining gives
    climbs: bool  # what a retraining gives is as good on average as the champion; else as the first champion
    fresh: bool  # other test images each week, on which the champion is as good as the first; else the same for a year


KINDS = {
    "plateau": Year(spread=0.01, climbs=False, fresh=False),
    "climb": Year(spread=0.01, climbs=True, fresh=False),
    "drift": Year(spread=0.01, climbs=True, fresh=True),
    "same again": Year(spread=0.0, climbs=True, fresh=False),
}


def main() -> None:
    start = time.perf_counter()
    common = brentq(lambda share: disagreement(ACCURACY, ACCURACY, share) - DISAGREEMENT, 0, 0.9999)
    looked, lived = [], []
    for images in IMAGES:
        looked += [{"test images": f"{images:,}", "rule": rule} | told for rule, told in look(images, common).items()]
        for kind, year in KINDS.items():
            for rule, told in live(images, common, year).items():
                lived.append({"test images": f"{images:,}", "rule": rule, "year": kind} | told)
    print(f"Promoted at one look, of {PAIRS:,} each:\n")
    print(pd.DataFrame(looked).to_markdown(index=False, disable_numparse=True))
    print(f"\nIn one of {YEARS} years of {LOOKS} looks:\n")
    print(pd.DataFrame(lived).sort_values(["year"], kind="stable").to_markdown(index=False, disable_numparse=True))
    print(f"\nTest images from which {SEEN:.0%} of 2-point gains are seen at one look, to the next {STEP}:\n")
    print(pd.DataFrame(map(enough, DISAGREEMENTS)).to_markdown(index=False))
    print(f"\n{time.perf_counter() - start:.0f} seconds")


def look(images: int, common: float) -> dict[str, dict[str, str]]:
    """The share of challengers that each rule promotes at one look, by their true gain."""
    told: dict[str, dict[str, str]] = {rule: {} for rule in RULES}
    for name, gain in GAINS.items():
        random = np.random.default_rng(SEED)
        right = both(ACCURACY + gain, ACCURACY, common)
        wins, losses = ACCURACY + gain - right, ACCURACY - right
        won, lost, _ = random.multinomial(images, [wins, losses, 1 - wins - losses], PAIRS).T
        for rule, promoted in RULES.items():
            told[rule][name] = f"{promoted(won, lost, images).mean():.2%}"
    return told


def both(one: float, other: float, common: float) -> float:
    """Share of images that two models of these accuracies both get right, whose skills on an image correlate so."""
    return float(multivariate_normal([0, 0], [[1, common], [common, 1]]).cdf(norm.ppf([one, other])))


def disagreement(one: float, other: float, common: float) -> float:
    return one + other - 2 * both(one, other, common)


def enough(disagree: float) -> dict[str, float]:
    """The test images that each rule needs, where one model alone is right on this share of all images."""
    told: dict[str, float] = {"disagreement": disagree}
    for rule, promoted in RULES.items():
        seen, images = 0.0, 0
        while seen < SEEN:
            images += STEP
            shares = [disagree / 2 + 0.01, disagree / 2 - 0.01, 1 - disagree]
            won, lost, _ = np.random.default_rng(SEED).multinomial(images, shares, PAIRS // 10).T
            seen = promoted(won, lost, images).mean()
        told[rule] = images
    return told


def live(images: int, common: float, year: Year) -> dict[str, dict[str, str]]:
    """What each rule does in `YEARS` such years."""
    random = np.random.default_rng(SEED)

    def draw(share: float) -> np.ndarray:
        return np.float32(np.sqrt(share)) * random.standard_normal((YEARS, images), np.float32)

    def answers(skill: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
        return skill > -norm.ppf(accuracy).astype(np.float32)[:, None]

    ease = draw(common)  # of the images, for all models
    champion = {rule: np.full(YEARS, ACCURACY) for rule in RULES}  # (years,) true accuracy
    right = dict.fromkeys(RULES, answers(ease + draw(1 - common), np.full(YEARS, ACCURACY)))  # (years, images)
    told = {rule: np.zeros((5, YEARS)) for rule in RULES}
    for _ in range(LOOKS):
        if year.fresh:
            ease = draw(common)
            champion = {rule: np.full(YEARS, ACCURACY) for rule in RULES}
            right = dict.fromkeys(RULES, answers(ease + draw(1 - common), np.full(YEARS, ACCURACY)))
        skill = ease + draw(1 - common)
        gained = year.spread * random.standard_normal(YEARS)
        for rule, promoted in RULES.items():
            new = np.minimum((champion[rule] if year.climbs else ACCURACY) + gained, 0.9999)
            correct = answers(skill, new)
            won, lost = (correct & ~right[rule]).sum(axis=1), (right[rule] & ~correct).sum(axis=1)
            moved, gain = promoted(won, lost, images), new - champion[rule]
            worse, much = moved & (gain < 0), gain >= 0.02
            told[rule] += [moved, worse, np.where(worse, -gain, 0), much, much & moved]
            champion[rule] = np.where(moved, new, champion[rule])
            right[rule] = np.where(moved[:, None], correct, right[rule])
    return {
        rule: {
            "promotions": f"{moved.mean():.2f}",
            "truly worse": f"{worse.mean():.3f} ± {worse.std() / np.sqrt(YEARS):.3f}",
            "points lost by each": f"{100 * lost.sum() / max(worse.sum(), 1):.2f}",
            "2-point gains seen": f"{seen.sum() / much.sum():.1%}" if much.sum() else "",
            "accuracy in the end": f"{champion[rule].mean():.4f}",
        }
        for rule, (moved, worse, lost, much, seen) in told.items()
    }


if __name__ == "__main__":
    main()
