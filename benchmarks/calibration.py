"""When a fitted temperature helps: `python benchmarks/calibration.py`.

Networks are simulated: their logits are those of a perfectly calibrated network times a factor, the temperature that
would calibrate them. Each rule fits a temperature on a few validation images; what it saves or costs is measured on
20,000 other images.
"""

import time

import numpy as np
import pandas as pd

from convoy.evaluation.calibration import apply_temperature, fit_temperature, per_image_log_loss

CLASSES = 10
SPREADS = {"0.90": 20.0, "0.98": 100.0}  # spread of the logits, by the accuracy that it gives
FACTORS = (0.7, 1.0, 1.3, 2.0)
VALIDATION_IMAGES = (100, 300, 1_000, 5_000)
TEST_IMAGES = 20_000
NETWORKS = 100  # simulated for each row
# A network counts as worse if its log loss rises by more than this.
TOLERANCE = 1e-5


def main() -> None:
    start = time.perf_counter()
    rows = [
        {"accuracy": accuracy, "factor": factor, "validation images": f"{images:,}", **compare(spread, factor, images)}
        for accuracy, spread in SPREADS.items()
        for factor in FACTORS
        for images in VALIDATION_IMAGES
    ]
    print(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))
    print(f"\n{time.perf_counter() - start:.0f} seconds")


def compare(spread: float, factor: float, images: int) -> dict[str, str]:
    """Return the mean log loss without calibration, and for each rule what it saves and how often it costs."""
    before, saved = [], {"always": [], "if it helps": []}
    for seed in range(NETWORKS):
        random = np.random.default_rng(seed)
        labels, probabilities = draw_network(random, images, spread, factor)
        others, tested = draw_network(random, TEST_IMAGES, spread, factor)
        fit, loss = fit_temperature(labels, probabilities), per_image_log_loss(others, tested).mean()
        before.append(loss)
        for rule, temperature in (("always", fit.fitted), ("if it helps", fit.temperature)):
            after = per_image_log_loss(others, apply_temperature(tested, temperature)).mean()
            saved[rule].append(loss - after)
    columns = {"log loss": f"{np.mean(before):.4f}"}
    for rule, values in saved.items():
        columns[f"saved {rule}"] = f"{np.mean(values):+.4f}"
        columns[f"worse {rule}"] = f"{np.mean(np.array(values) < -TOLERANCE):.0%}"
    return columns


def draw_network(
    random: np.random.Generator, images: int, spread: float, factor: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return labels (N,) and the probabilities (N, K) of a network whose logits are too large by a factor."""
    logits = spread * random.gamma(2, 0.5, (images, 1)) * random.normal(size=(images, CLASSES))
    calibrated, given = (softmax(scale * logits) for scale in (1, factor))
    labels = (calibrated.cumsum(axis=1) < random.random((images, 1))).sum(axis=1)
    return np.minimum(labels, CLASSES - 1), given


def softmax(logits: np.ndarray) -> np.ndarray:
    scaled = np.exp(logits - logits.max(axis=1, keepdims=True))
    return scaled / scaled.sum(axis=1, keepdims=True)


if __name__ == "__main__":
    main()
