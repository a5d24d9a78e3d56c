"""The check of the composed settings before anything runs."""

from typing import Any

from convoy.core import config
from convoy.core.config import validate
from convoy.data.sources.base import DatasetConfig


def check_settings(params: dict[str, Any]) -> None:
    """Check the composed settings before anything runs.

    Args:
        params: The sections of `params.yaml`.

    Raises:
        ConvoyError: If a key is unknown, missing, of the wrong type or out of range.
    """
    from convoy.data.ingest import FetchConfig
    from convoy.data.preprocessing import PreprocessConfig, SplitConfig
    from convoy.evaluation.metrics import EvaluateConfig
    from convoy.promotion.config import RegisterConfig

    light = {
        "dataset": DatasetConfig,
        "fetch": FetchConfig,
        "split": SplitConfig,
        "preprocess": PreprocessConfig,
        "evaluate": EvaluateConfig,
        "register": RegisterConfig,
    }
    config.check_sections(params, [*light, "train", "trainer", "model"])
    for name, schema in light.items():
        validate(schema, params[name], name)

    # These modules import torch, which takes seconds, so they are imported after the checks that need no torch.
    from convoy import models
    from convoy.recipe import TrainConfig
    from convoy.training import init_weights
    from convoy.training.hardware import TrainerConfig

    validate(TrainConfig, params["train"], "train")
    validate(TrainerConfig, params["trainer"], "trainer")
    for name, values in params["model"].items():
        validate(models.schema(name), values, f"model.{name}")
        init_weights.check_init(name, values)
