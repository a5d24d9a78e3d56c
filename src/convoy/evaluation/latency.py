"""Latency measurements of a classifier, for a single image and for a batch, on the current hardware.

Latencies are never part of a cached output, because their noise would make equal results look different.
"""

import platform
import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from convoy.models.base import Classifier, predict

BATCH_SIZE = 64  # images
# Number of warm-up calls, in which caches fill, clocks speed up and kernels are selected.
WARMUP_CALLS = 5
# Minimum and maximum number of measured calls.
MIN_CALLS, MAX_CALLS = 10, 100
# Time of a measurement; in that of a ratio, each of both functions has as much.
MEASURING_TIME_S = 1.5


def measure_latencies(classifiers: Sequence[Classifier], kind: Literal["image", "batch"]) -> list[dict[str, float]]:
    """Measure the time from uint8 pixels to probabilities of several classifiers, each on its own device.

    The calls alternate, so that other load on the machine affects all of them equally.

    Args:
        classifiers: The classifiers.
        kind: Whether a call predicts a single image or a batch of `BATCH_SIZE` images.

    Returns:
        For each classifier the metrics `<kind>_ms_median` and `<kind>_ms_p95`, in milliseconds per call.
    """
    count = 1 if kind == "image" else BATCH_SIZE
    times = time_alternately([_make_call(classifier, count) for classifier in classifiers], MEASURING_TIME_S)
    return [
        {f"{kind}_ms_median": float(np.median(each)), f"{kind}_ms_p95": float(np.quantile(each, 0.95))}
        for each in times
    ]


def describe_hardware(device: torch.device) -> str:
    """Describe the hardware of a device: the GPU, or the processor with its instruction set and number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, " + (
        f"{threads} thread{'s' * (threads > 1)}"
    )


def measure_latency_ratio(classifier: Classifier, other: Classifier, count: int = 1) -> float:
    """Measure the latency of a classifier as a multiple of another's.

    The calls of both alternate, so that other load on the machine affects both equally.

    Args:
        classifier: The classifier to measure.
        other: The classifier to compare with.
        count: Number of images per call.

    Returns:
        The ratio of the median latencies.
    """
    times, others = time_alternately([_make_call(classifier, count), _make_call(other, count)], 2 * MEASURING_TIME_S)
    return float(np.median(times) / np.median(others))


def time_alternately(calls: Sequence[Callable[[], object]], duration_s: float) -> np.ndarray:
    """Measure functions in turn, reversing the order in every round.

    Args:
        calls: The functions.
        duration_s: Seconds after which measuring stops once `MIN_CALLS` calls of each were made.

    Returns:
        Times in milliseconds, of shape (functions, rounds).
    """
    for _ in range(WARMUP_CALLS):
        for call in calls:
            call()
    times: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    start = time.perf_counter()
    while len(times[0]) < MIN_CALLS or (len(times[0]) < MAX_CALLS and time.perf_counter() - start < duration_s):
        for turn in order:
            before = time.perf_counter()
            calls[turn]()
            times[turn].append(1e3 * (time.perf_counter() - before))
        order.reverse()
    return np.array(times)


def _make_call(classifier: Classifier, count: int) -> Callable[[], object]:
    info = classifier.info
    shape = (count, info.size, info.size, info.channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    # `predict` returns a NumPy array and so waits for the GPU.
    return lambda: predict(classifier, pixels, count)
