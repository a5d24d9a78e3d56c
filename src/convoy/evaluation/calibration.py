"""Calibration of a classifier's probabilities by temperature scaling (Guo et al. 2017)."""

import dataclasses
import math

import numpy as np

# Search range of the temperature.
TEMPERATURE_RANGE = (0.05, 20.0)
# Standard deviation of the prior of log T, which is centred at T = 1. With 300 images or more it hardly matters; with
# 100 it gains more on average than 0.5 does, and its worst cases are less than half as bad (benchmarks/calibration.py).
LOG_T_PRIOR_STD = 0.25
# Folds of the cross-validation.
FOLDS = 10
# Significance level of the test for miscalibration.
ALPHA = 0.05
# Smallest probability in the fit, so that its logarithm is finite.
MIN_FIT_PROBABILITY = 1e-300
# Smallest probability in the log loss, the resolution of float32. With 0 a single image could outweigh all others.
MIN_PROBABILITY = 2.0**-23


@dataclasses.dataclass(frozen=True)
class TemperatureFit:
    """A fitted temperature, and whether it helps on images that it was not fitted on."""

    temperature: float  # to use: `fitted`, or 1 if that does not help
    fitted: float
    gain: float  # log loss per image that a fitted temperature saves in cross-validation; below 0: it adds
    gain_error: float  # standard error of `gain`
    p_value: float  # of the test that the uncalibrated probabilities are calibrated

    def describe(self) -> str:
        """Return one line on what was fitted, and whether it is used."""
        evidence = f"saves {self.gain:.4f} ± {self.gain_error:.4f} of log loss in cross-validation"
        evidence += f" (p = {self.p_value:.2g} that none is needed)"
        if self.temperature != 1:
            return f"temperature {self.temperature:.3f}, which {evidence}"
        return f"no temperature, as one of {self.fitted:.3f} {evidence}"


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Apply temperature scaling to probabilities, which does not change the predicted class.

    Args:
        probabilities: (N, K) probabilities, equal to `softmax(logits)`.
        temperature: The temperature, greater than 0; 1 leaves the probabilities unchanged.

    Returns:
        (N, K) probabilities, equal to `softmax(logits / temperature)`.
    """
    if temperature == 1:
        return probabilities
    scaled = (probabilities / probabilities.max(axis=1, keepdims=True)) ** (1 / temperature)
    return scaled / scaled.sum(axis=1, keepdims=True)


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> TemperatureFit:
    """Fit a temperature on validation images, and keep it only if there is evidence that it helps on other images.

    On a few hundred images the best temperature often fits their noise, and makes other images worse. It is therefore
    kept only if it saves more log loss in cross-validation than the standard error of that saving, and if the
    probabilities are significantly miscalibrated. The first criterion alone takes luck for certainty if there are
    hardly any errors. `benchmarks/calibration.py` measures how often a temperature helps.

    Args:
        labels: (N,) class indices in [0, K).
        probabilities: (N, K) uncalibrated probabilities.
    """
    logs = np.log(np.maximum(probabilities, MIN_FIT_PROBABILITY))
    logs -= logs.max(axis=1, keepdims=True)
    best = _minimize_log_loss(labels, logs)
    before = per_image_log_loss(labels, probabilities)
    # The folds hold random images, so that they do not depend on the order of the classes.
    folds = np.random.default_rng(0).permutation(len(labels)) % FOLDS
    saved = np.zeros(len(labels))
    for fold in range(min(FOLDS, len(labels))):
        held_out = folds == fold
        temperature = _minimize_log_loss(labels[~held_out], logs[~held_out])
        after = per_image_log_loss(labels[held_out], apply_temperature(probabilities[held_out], temperature))
        saved[held_out] = before[held_out] - after
    gain = float(saved.mean())
    error = float(saved.std(ddof=1) / np.sqrt(len(labels))) if len(labels) > 1 else 0.0
    p_value = _calibration_p_value(labels, logs, probabilities)
    is_lower = per_image_log_loss(labels, apply_temperature(probabilities, best)).mean() < before.mean()
    helps = is_lower and gain > error and p_value < ALPHA
    return TemperatureFit(best if helps else 1.0, best, gain, error, p_value)


def _calibration_p_value(labels: np.ndarray, logs: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the p-value of Rao's score test that a temperature of 1 is correct, from logits (N, K)."""
    expected = (probabilities * logs).sum(axis=1)
    variance = (probabilities * logs**2).sum(axis=1) - expected**2
    score = logs[np.arange(len(labels)), labels] - expected
    # Two-sided; a registered model has this file, and math.erfc spares it SciPy.
    return math.erfc(abs(score.sum()) / math.sqrt(2 * max(variance.sum(), MIN_FIT_PROBABILITY)))


def _minimize_log_loss(labels: np.ndarray, logs: np.ndarray) -> float:
    """Return the temperature with the highest posterior probability, from logits (N, K) whose maximum is 0."""
    from scipy.optimize import minimize_scalar

    actual = logs[np.arange(len(labels)), labels]

    def loss(log_t: float) -> float:
        scale = np.exp(-log_t)
        # If every image is classified correctly, the log loss alone keeps falling as T approaches 0, where every
        # prediction is certain. The prior prevents that.
        prior = (log_t / LOG_T_PRIOR_STD) ** 2 / 2
        return float(np.log(np.exp(logs * scale).sum(axis=1)).sum() - actual.sum() * scale + prior)

    found = minimize_scalar(loss, bounds=np.log(TEMPERATURE_RANGE), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def per_image_log_loss(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the log loss of each image, (N,), from labels (N,) and probabilities (N, K)."""
    return -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], MIN_PROBABILITY))
