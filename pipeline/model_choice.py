"""The model that a command of the user predicts with."""

import contextlib
import os
from pathlib import Path

from yaml import YAMLError

from convoy.core.yaml_parser import parse_yaml


def choose_model(root: Path, model: str | None) -> tuple[str, Path]:
    """Return the URI or folder of a model, and the project folder.

    Args:
        root: The folder that the command runs in.
        model: models:/NAME@ALIAS, models:/NAME/VERSION or a folder; None for the champion.
    """
    # DVC may run an experiment in a temporary copy of the project.
    project = Path(os.environ.get("DVC_ROOT", root))
    return model or f"models:/{_read_name(root / 'params.yaml')}@champion", project


def _read_name(params: Path) -> str:
    """Return the name of the registered model.

    The libraries that validate the settings take half of the time of predicting an image, so they are imported only if
    the name is not found without them.
    """
    with contextlib.suppress(OSError, ValueError, YAMLError, KeyError, TypeError):
        return str(parse_yaml(params.read_text(encoding="utf-8"))["register"]["name"])
    from convoy.core import config

    return config.load(params)["register"]["name"]
