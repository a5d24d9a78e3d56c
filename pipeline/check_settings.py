"""The check of the composed settings before anything runs."""

from collections.abc import Mapping
from typing import Any

from convoy.core import config
from convoy.core.config import validate
from convoy.core.errors import ConvoyError
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
    check_model_list(params["model"])

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


def check_model_list(models: Mapping[str, Any]) -> None:
    """Check that only chosen models have settings.

    An experiment or an override may set keys of a model whose file in conf/model/ is not composed. That model then has
    these keys alone.

    Raises:
        ConvoyError: If a model without its file has settings.
    """
    for name, values in models.items():
        recipe = values.get("recipe") if isinstance(values, Mapping) else None
        if isinstance(recipe, Mapping) and "batch_size" not in recipe:
            raise ConvoyError(
                f"model.{name} has settings, as from an experiment, but conf/model/{name}.yaml is not chosen: choose "
                f"it with the others, such as by 'model=[{','.join(models)}]', or remove its settings from the "
                "experiment"
            )
