"""What each stage costs as images, classes and nodes grow: `python benchmarks/scale.py`, for docs/cluster.md.

The costs of one image are measured: those of fetch and preprocess by growth.py, those of the others here, at two sizes
each, so that what does not grow in proportion shows. The rest is multiplication. What is not measured here is an
assumption, and is named as one.
"""

import resource
import subprocess
import sys
import time

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from convoy.evaluation.metrics import metrics_with_ci, per_class_metrics, prediction_table
from convoy.training.sampler import BatchSampler

# Measured: benchmarks/README.md, "Growth", 500x375 pixels to 224x224.
PREPARE_US = 4408  # processor time of an image in fetch and preprocess
NEW_US = 861  # of all images, when 1% of them are new
PIXELS_BYTES = 224 * 224 * 3  # of an image in the packed data
STORED_BYTES = 512 * 384 * 3  # of an image at `longest_side: 512`
# Assumptions: a server of 64 cores, its disk, a GPU, and the network of a cluster.
CORES = 64
DISK_BYTES_PER_S = 2e9
GPU_IMAGES_PER_S = 2500  # ResNet-50, bf16, an A100; NVIDIA's published figure
EFFICIENCY = 0.9  # of 64 GPUs
EPOCHS = 90
TEST_FRACTION = 0.2


def main() -> None:
    if len(sys.argv) > 1:
        measure(*map(int, sys.argv[1:]))
        return
    measured = [measure_apart(images, classes) for images, classes in ((10_000, 10), (50_000, 10), (10_000, 1000))]
    show("measured: evaluation without the network", measured)
    show("measured: drawing an epoch", [draw_epoch(images) for images in (1_000_000, 10_000_000)])
    show("calculated", [calculate(images, gpus) for images, gpus in ((1e6, 1), (1e7, 8), (1e8, 64))])


def measure_apart(images: int, classes: int) -> dict[str, float]:
    """Run `measure` in a process of its own, whose memory is then that of the evaluation."""
    command = [sys.executable, __file__, str(images), str(classes)]
    seconds, before, after = map(float, subprocess.check_output(command, text=True).split())
    return {
        "test images": images,
        "classes": classes,
        "us / image": 1e6 * seconds / images,
        "bytes / image": (after - before) * 1024 / images,
    }


def measure(images: int, classes: int) -> None:
    """Print the processor time, and the memory before and after (KB), of what evaluate does with the probabilities."""
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, images)
    probabilities = random.dirichlet(np.ones(classes), images).astype(np.float32)
    names = [f"class {number}" for number in range(classes)]
    hashes = [f"{number:064x}" for number in range(images)]
    table = pd.DataFrame({"sha256": hashes, "label": np.array(names)[labels]})
    groups = np.full(images, "")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    prediction_table(names, table, probabilities)
    per_class_metrics(names, labels, probabilities, groups)
    metrics_with_ci(labels, probabilities, probabilities, groups)
    print(time.process_time() - started, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def draw_epoch(images: int) -> dict[str, float]:
    """Measure the order of an epoch, which each process draws for all images."""
    sampler = BatchSampler(np.zeros(images, np.int64), 4096, seed=1, rank=0, world_size=64)
    started = time.process_time()
    sampler.draw_epoch(0)
    return {"images": images, "seconds": time.process_time() - started, "MB": 2 * 8 * images / 1e6}


def calculate(images: float, gpus: int) -> dict[str, str]:
    """Multiply."""
    hour, rate = 3600, GPU_IMAGES_PER_S * gpus * (EFFICIENCY if gpus > 1 else 1)
    stored, packed = images * STORED_BYTES, images * PIXELS_BYTES
    return {
        "images": f"{images:,.0f}",
        "GPUs": str(gpus),
        "TB in fetch": f"{stored / 1e12:.1f}",
        "TB in preprocess": f"{packed / 1e12:.2f}",
        "h to prepare": f"{images * PREPARE_US / 1e6 / CORES / hour:.1f}",
        "h to write": f"{(stored + packed) / DISK_BYTES_PER_S / hour:.1f}",
        "h with 1% new": f"{images * NEW_US / 1e6 / CORES / hour:.1f}",
        "min an epoch": f"{images / rate / 60:.0f}",
        f"h for {EPOCHS} epochs": f"{EPOCHS * images / rate / hour:.0f}",
        "GB/s read": f"{rate * PIXELS_BYTES / 1e9:.1f}",
        "GB of probabilities, 1000 classes": f"{TEST_FRACTION * images * 1000 * 4 / 1e9:,.0f}",
    }


def show(title: str, rows: list[dict]) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:,.2f}" for value in row.values()))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
