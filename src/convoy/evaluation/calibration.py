"""Temperature: one number that makes the probabilities of a trained classifier believable (Guo et al. 2017)."""

import numpy as np

RANGE = (0.05, 20.0)  # of temperatures that are looked at
SPREAD = 0.5  # of log T before any image is seen: few networks need less than 0.4 or more than 2.7
TINY = 1e-300  # probability, so that its logarithm is a number
MIN_PROBABILITY = 2.0**-23  # probability, in the log loss: of float32; 0 would make one image outweigh all others


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / temperature) of the probabilities (N, K) that are softmax(logits). The likeliest stays so."""
    if temperature == 1:
        return probabilities
    scaled = (probabilities / probabilities.max(axis=1, keepdims=True)) ** (1 / temperature)
    return scaled / scaled.sum(axis=1, keepdims=True)


def fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """That with the least log loss on validation images: labels (N,) of K classes, probabilities (N, K).

    1 where no other has less.
    """
    from scipy.optimize import minimize_scalar

    logs = np.log(np.maximum(probabilities, TINY))
    logs -= logs.max(axis=1, keepdims=True)
    actual = logs[np.arange(len(labels)), labels].mean()

    def loss(log_t: float) -> float:
        scale = np.exp(-log_t)
        # where every image is right the log loss alone falls for ever, to a T that is sure of everything
        prior = (log_t / SPREAD) ** 2 / 2 / len(labels)
        return float(np.log(np.exp(logs * scale).sum(axis=1)).mean() - actual * scale + prior)

    found = minimize_scalar(loss, bounds=np.log(RANGE), method="bounded", options={"xatol": 1e-6})
    temperature = float(np.exp(found.x))
    better = (
        per_image_log_loss(labels, apply_temperature(probabilities, temperature)).mean()
        < per_image_log_loss(labels, probabilities).mean()
    )
    return temperature if better else 1.0


def per_image_log_loss(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """(N,), of each image."""
    return -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], MIN_PROBABILITY))
