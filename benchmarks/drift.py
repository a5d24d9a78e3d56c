"""Error rates of the drift test on real images: `convoy run`, then `python benchmarks/drift.py lenet`.

The test images of the last run, which the network has not trained on, are split at random into a reference and new
images, which are left as they are, made darker, or robbed of a class. For comparison, the reference is also drawn from
the training images, as in `convoy monitor`.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from convoy import models
from convoy.core.artifact_names import RECORD, WEIGHTS
from convoy.data.packed.arrays import Images
from convoy.monitoring.drift import detect_drift
from convoy.monitoring.embedding import embed
from convoy.training.record import TrainingRecord

SPLITS, DRAWS = 200, 50
ALPHAS = (0.05, 0.01)
NEW_IMAGES = (50, 100, 150)
BRIGHTNESS = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture", nargs="?", default="lenet")
    name = parser.parse_args().architecture
    start, folder = time.perf_counter(), Path("artifacts/train", name)
    if not (folder / RECORD).exists():
        sys.exit(f"{folder} is missing: run `convoy run` first")
    record = TrainingRecord.load(folder / RECORD)
    classifier = models.restore(record.architecture, record.settings, record.dataset_info, folder / WEIGHTS)
    test, train = (Images.load(Path("artifacts/preprocess"), split) for split in ("test", "train"))
    pixels, labels = np.asarray(test.pixels), np.asarray(test.labels)
    dark = (pixels * BRIGHTNESS).astype(np.uint8)
    held_out, darker, seen = (embed(classifier, images)[0] for images in (pixels, dark, np.asarray(train.pixels)))
    rows = []
    for new in NEW_IMAGES:
        cases = {
            "nothing": [draw(held_out, held_out, new, seed) for seed in range(SPLITS)],
            "nothing, but the reference is of training images": [
                draw(held_out, held_out, new, seed, seen) for seed in range(SPLITS)
            ],
            "half the brightness": [draw(held_out, darker, new, seed) for seed in range(DRAWS)],
            "a class is missing": [
                draw(held_out, held_out, new, seed, without=labels == seed % len(set(labels))) for seed in range(DRAWS)
            ],
        }
        for change, results in cases.items():
            p_values, effects = (np.array(column) for column in zip(*results, strict=True))
            rows.append(
                {"new images": new, "what changes": change, "draws": len(results)}
                | {f"detected at {alpha}": describe_rate(p_values <= alpha) for alpha in ALPHAS}
                | {"median effect": f"{np.median(effects):.3f}"}
            )
    print(f"{name}, {len(pixels)} test images, of which those that are not new are the reference:\n")
    print(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))
    print(f"\n{time.perf_counter() - start:.0f} seconds")


def draw(
    held_out: np.ndarray,
    changed: np.ndarray,
    new: int,
    seed: int,
    training: np.ndarray | None = None,
    without: np.ndarray | None = None,
) -> tuple[float, float]:
    """Return the p-value and the effect of a random split.

    Args:
        held_out: (N, D) embeddings of test images.
        changed: (N, D) embeddings of the same images as new ones.
        new: Number of new images.
        seed: Seed of the split and of the test.
        training: Embeddings to draw a reference of the same size from instead.
        without: (N,) bool, images that are never new.
    """
    random = np.random.default_rng(seed)
    order = random.permutation(len(held_out))
    chosen = order[~without[order]][:new] if without is not None else order[:new]
    others = np.setdiff1d(order, chosen)
    reference = held_out[others] if training is None else random.permutation(training)[: len(others)]
    found = detect_drift(reference, changed[chosen], seed)
    return found.p_value, found.effect


def describe_rate(detected: np.ndarray) -> str:
    interval = binomtest(int(detected.sum()), len(detected)).proportion_ci()
    return f"{detected.mean():.1%} ({interval.low:.1%} to {interval.high:.1%})"


if __name__ == "__main__":
    main()
