"""Calibration of a classifier's probabilities by temperature scaling (Guo et al. 2017)."""

import numpy as np

# Search range of the temperature.
TEMPERATURE_RANGE = (0.05, 20.0)
# Standard deviation of the prior of log T. Few networks need a temperature below 0.4 or above 2.7.
LOG_T_PRIOR_STD = 0.5
# Smallest probability in the fit, so that its logarithm is finite.
MIN_FIT_PROBABILITY = 1e-300
# Smallest probability in the log loss, the resolution of float32. With 0 a single image could outweigh all others.
MIN_PROBABILITY = 2.0**-23


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


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Fit the temperature that minimizes the log loss on validation images.

    Args:
        labels: (N,) class indices in [0, K).
        probabilities: (N, K) uncalibrated probabilities.

    Returns:
        The temperature, or 1 if no other temperature reduces the log loss.
    """
    from scipy.optimize import minimize_scalar

    logs = np.log(np.maximum(probabilities, MIN_FIT_PROBABILITY))
    logs -= logs.max(axis=1, keepdims=True)
    actual = logs[np.arange(len(labels)), labels].mean()

    def loss(log_t: float) -> float:
        scale = np.exp(-log_t)
        # If every image is classified correctly, the log loss alone keeps falling as T approaches 0, where every
        # prediction is certain. The prior prevents that.
        prior = (log_t / LOG_T_PRIOR_STD) ** 2 / 2 / len(labels)
        return float(np.log(np.exp(logs * scale).sum(axis=1)).mean() - actual * scale + prior)

    found = minimize_scalar(loss, bounds=np.log(TEMPERATURE_RANGE), method="bounded", options={"xatol": 1e-6})
    temperature = float(np.exp(found.x))
    better = (
        per_image_log_loss(labels, apply_temperature(probabilities, temperature)).mean()
        < per_image_log_loss(labels, probabilities).mean()
    )
    return temperature if better else 1.0


def per_image_log_loss(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the log loss of each image, (N,), from labels (N,) and probabilities (N, K)."""
    return -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], MIN_PROBABILITY))
