"""The model that a command of the user predicts with."""

import os
from pathlib import Path


def choose_model(root: Path, model: str | None) -> tuple[str, Path]:
    """Return the URI or folder of a model, and the project folder.

    Args:
        root: The folder that the command runs in.
        model: models:/NAME@ALIAS, models:/NAME/VERSION or a folder; None for the champion.
    """
    # DVC may run an experiment in a temporary copy of the project.
    project = Path(os.environ.get("DVC_ROOT", root))
    if model:
        return model, project
    # Imported here, because the libraries that read the settings take a third of the time of predicting an image.
    from convoy.core import config

    return f"models:/{config.load(root / 'params.yaml')['register']['name']}@champion", project
