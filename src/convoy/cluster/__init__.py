"""Training runs and searches on a Ray cluster."""

from collections.abc import Mapping
from typing import Any


def uses_cluster(trainer: Mapping[str, Any]) -> bool:
    """Return whether a `trainer` section of params.yaml is that of conf/trainer/ray.yaml."""
    return "address" in trainer
