"""The serve command: it answers requests over HTTP with a registered model."""

from pathlib import Path
from typing import Any

from convoy.serving import server
from convoy.serving.server import ServerConfig
from pipeline.model_choice import choose_model


def serve(root: Path, model: str | None, **config: Any) -> None:
    """Serve a model.

    Args:
        root: The project folder.
        model: models:/NAME@ALIAS, models:/NAME/VERSION or a folder; None for the champion.
        **config: The other fields of `ServerConfig`.

    Raises:
        ConvoyError: If there is no such model, or the settings are not safe.
    """
    uri, project = choose_model(root, model)
    server.serve(ServerConfig(model=uri, project=project, **config))
