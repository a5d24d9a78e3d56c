"""Timing: how long a classifier takes for an image and for a batch, on the hardware at hand and as it is now.

No cached output holds such figures: they would make equal results look changed.
"""

import platform
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from convoy.models.base import Classifier, predict

BATCH = 64  # images
WARM = 5  # calls before the first that counts: caches fill, clocks rise, and kernels are chosen
LEAST, MOST = 10, 100  # calls that count
PATIENCE = 1.5  # seconds, after which no more calls than `LEAST` are made


def measure_latency(classifier: Classifier) -> dict[str, float]:
    """Milliseconds from uint8 pixels to probabilities: `image_ms` and `batch_ms`, each `_median` and `_p95`.

    On the device where the classifier is.
    """
    figures = {}
    for name, count in (("image", 1), ("batch", BATCH)):
        (times,) = alternately([_call(classifier, count)])
        figures[f"{name}_ms_median"] = float(np.median(times))
        figures[f"{name}_ms_p95"] = float(np.quantile(times, 0.95))
    return figures


def hardware(device: torch.device) -> str:
    """What the figures are of: the GPU, or the processor, its instructions and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, " + (
        f"{torch.get_num_threads()} threads"
    )


def latency_ratio(classifier: Classifier, other: Classifier, count: int = 1) -> float:
    """How many times as long as `other` this one takes for `count` images, by the medians of calls in turn.

    What else the machine does while they are measured meets both alike.
    """
    times, others = alternately([_call(classifier, count), _call(other, count)])
    return float(np.median(times) / np.median(others))


def alternately(calls: Sequence[Callable[[], object]]) -> np.ndarray:
    """(calls, repeats): milliseconds of each call, when they are made in turn, each round in the other direction."""
    for _ in range(WARM):
        for call in calls:
            call()
    times: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    start = time.perf_counter()
    while len(times[0]) < LEAST or (len(times[0]) < MOST and time.perf_counter() - start < PATIENCE * len(calls)):
        for turn in order:
            before = time.perf_counter()
            calls[turn]()
            times[turn].append(1e3 * (time.perf_counter() - before))
        order.reverse()
    return np.array(times)


def _call(classifier: Classifier, count: int) -> Callable[[], object]:
    task = classifier.task
    shape = (count, task.size, task.size, task.channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return lambda: predict(classifier, pixels, count)  # waits for a GPU, as it gives an array
