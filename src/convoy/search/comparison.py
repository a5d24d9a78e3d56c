"""The comparison of two settings by training runs with the same seeds."""

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np
from scipy import stats

# Probability that an interval contains the true value.
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Scores of the present and of the tuned settings, one for each seed, and their difference."""

    present: Interval
    tuned: Interval
    difference: Interval  # tuned minus present

    @property
    def is_better(self) -> bool:
        """Whether the tuned settings are better by more than the seeds explain."""
        return self.difference.low > 0


def compare(present: Sequence[float], tuned: Sequence[float]) -> Comparison:
    """Compare the scores of two settings.

    The interval of a mean is that of Student, the one of the difference that of Welch (1947), whose variances may
    differ. They cover what the seed of a training changes, and neither the choice of the validation images nor that the
    settings were chosen on them.

    Args:
        present: Score of each training run with the present settings, at least two.
        tuned: Score of each training run with the tuned settings, at least two.
    """
    return Comparison(_mean_interval(present), _mean_interval(tuned), _difference_interval(present, tuned))


def _mean_interval(scores: Sequence[float]) -> Interval:
    mean, error = float(np.mean(scores)), float(stats.sem(scores))
    low, high = stats.t.interval(CONFIDENCE, len(scores) - 1, mean, error) if error else (mean, mean)
    return Interval(mean, float(low), float(high))


def _difference_interval(present: Sequence[float], tuned: Sequence[float]) -> Interval:
    difference = float(np.mean(tuned) - np.mean(present))
    # Without any variance there is no distribution of Student.
    if not (np.ptp(present) or np.ptp(tuned)):
        return Interval(difference, difference, difference)
    with warnings.catch_warnings():
        # The scores of one of the settings may be equal.
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
        bounds = stats.ttest_ind(tuned, present, equal_var=False).confidence_interval(CONFIDENCE)
    return Interval(difference, float(bounds.low), float(bounds.high))
