"""Training records for tests."""

from typing import Any

from convoy.data.packed.dataset_info import DatasetInfo
from convoy.recipe import TrainConfig
from convoy.training.record import DatasetVersion, EpochMetrics, InitialWeights, ResolvedTrainer, TrainingRecord


def make_record(**changes: Any) -> TrainingRecord:
    """Return the record of a training of LeNet that ended normally."""
    fields: dict[str, Any] = {
        "architecture": "lenet",
        "settings": {},
        "train": TrainConfig(seed=1, max_epochs=3, patience=0, checkpoint_minutes=5.0),
        "trainer": ResolvedTrainer("cpu", 1, 1, "auto", "bf16-mixed", False, False, 2),
        "dataset_info": DatasetInfo("digits", ["0", "1"], 32, 1, [0.5], [0.25]),
        "data": DatasetVersion("digits", "a99769f9303d", "data.dvc", {"images": 1797}, split_seed=1),
        "fingerprint": "f" * 64,
        "initial_weights": InitialWeights("scratch"),
        "parameters": 61706,
        "macs": 416520,
        "environment": {
            "python": "3.11.7",
            "numpy": "2.4.6",
            "pytorch-lightning": "2.6.6",
            "torch": "2.15.0",
            "device": "cpu",
            "instructions": "AVX512",
            "threads": 2,
            "precision": "bf16-mixed",
            "processes": 1,
        },
        "best": EpochMetrics(3, 0.0, 0.9, 0.3, 0.9, 0.3),
        "stopped": "max_epochs",
    }
    return TrainingRecord(**(fields | changes))
