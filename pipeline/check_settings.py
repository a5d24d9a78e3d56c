"""The check of the composed settings before anything runs."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import convoy
from convoy.cluster import uses_cluster
from convoy.core import config
from convoy.core.config import validate
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.data.sources.base import DatasetConfig
from convoy.recipe import TrainConfig

# Checksum of the settings that passed the check last, and of the code that checked them.
CHECKED_FILE = Path("artifacts/.scratch/checked.sha256")


def check_settings(params: dict[str, Any]) -> None:
    """Check the composed settings before anything runs, unless the last ones that were checked are equal.

    Args:
        params: The sections of `params.yaml` of the project in the current folder.

    Raises:
        ConvoyError: If a key is unknown, missing, of the wrong type or out of range.
    """
    # The check imports torch, scipy and pandas, which takes three seconds.
    checksum = _checksum(params)
    if not CHECKED_FILE.exists() or CHECKED_FILE.read_text() != checksum:
        _check(params)
        CHECKED_FILE.parent.mkdir(parents=True, exist_ok=True)
        CHECKED_FILE.write_text(checksum)


def _check(params: dict[str, Any]) -> None:
    from convoy.data.ingest import FetchConfig
    from convoy.data.preprocessing import PreprocessConfig, SplitConfig
    from convoy.evaluation.metrics import EvaluateConfig
    from convoy.monitoring.config import RetrainConfig
    from convoy.promotion.config import RegisterConfig

    light = {
        "dataset": DatasetConfig,
        "fetch": FetchConfig,
        "split": SplitConfig,
        "preprocess": PreprocessConfig,
        "train": TrainConfig,
        "evaluate": EvaluateConfig,
        "register": RegisterConfig,
        "retrain": RetrainConfig,
    }
    config.check_sections(params, [*light, "trainer", "model"])
    for name, schema in light.items():
        validate(schema, params[name], name)
    check_model_list(params["model"])

    # These modules import torch, which takes seconds, so they are imported after the checks that need no torch.
    from convoy import models
    from convoy.cluster.config import ClusterConfig
    from convoy.training import init_weights
    from convoy.training.hardware import TrainerConfig

    validate(ClusterConfig if uses_cluster(params["trainer"]) else TrainerConfig, params["trainer"], "trainer")
    for name, values in params["model"].items():
        models.check_settings(name, values)
        init_weights.check_init(name, values)


def check_model_list(models: Mapping[str, Any]) -> None:
    """Check that only chosen models have settings.

    An experiment or an override may set keys of a model whose file in conf/model/ is not composed. That model then has
    these keys alone.

    Raises:
        ConvoyError: If a model without its file has settings.
    """
    for name, values in models.items():
        is_known = Path(f"conf/model/{name}.yaml").exists()
        if isinstance(values, Mapping) and "module" not in values and is_known:
            raise ConvoyError(
                f"model.{name} has settings, as from an experiment, but conf/model/{name}.yaml is not chosen: choose "
                f"it with the others, such as by 'model=[{','.join(models)}]', or leave its settings out by "
                f"'~model.{name}'"
            )


def _checksum(params: Mapping[str, Any]) -> str:
    """Return the checksum of all that the result of the check depends on."""
    code = [sha256(file) for file in sorted(Path(convoy.__file__).parent.rglob("*.py"))]
    # The file of initial weights that a setting names may be removed at any time.
    tables = params["model"].values() if isinstance(params.get("model"), Mapping) else []
    files = [Path(str(values.get("init"))).is_file() for values in tables if isinstance(values, Mapping)]
    parts = [params, files, code]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
