"""A Ray cluster of two nodes of one CPU each, on this machine."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from small_project import ROOT

OBJECT_STORE_BYTES = 100_000_000
# no random changes to images, and sums of few images
LENET = ("model=[lenet]", "train.max_epochs=2", "model.lenet.recipe.batch_size=10")


@contextlib.contextmanager
def run_cluster(nodes: int = 2) -> Iterator[Any]:
    """Start a cluster; its nodes end with the context."""
    # By default, Ray gives its workers the lowest priority, and stores checkpoints every two seconds.
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    }
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        for _ in range(nodes - 1):
            add_node(cluster)
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES)


def start(root: Path, *command: str, **environment: str) -> subprocess.Popen:
    """A process whose standard output and error are one pipe."""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", *command],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def settings(cluster: Any, workers: int, *more: str) -> Sequence[str]:
    return [*LENET, "trainer=ray", f"trainer.address={cluster.address}", f"trainer.workers={workers}", *more]
