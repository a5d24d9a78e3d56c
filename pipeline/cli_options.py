"""Arguments and options that several commands of `convoy` share."""

import os
from pathlib import Path
from typing import Annotated

import typer

from convoy.launcher import CALLER_FOLDER

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="OVERRIDES", help="Settings as Hydra overrides, KEY=VALUE.")
]
Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="The ID of an MLflow run, its first digits, or an architecture, for its newest run."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def caller_folder() -> Path:
    """Return the folder in which the user typed the command."""
    return Path(os.environ.get(CALLER_FOLDER, Path.cwd()))


def resolve_typed(path: Path) -> Path:
    """Return a path that the user typed, relative to the project folder where that is possible."""
    return Path(os.path.relpath(caller_folder() / path)) if not path.is_absolute() else path


def resolve_model(model: str | None) -> str | None:
    """Return a model that the user typed, with the path of a folder relative to the project folder."""
    return model if model is None or model.startswith("models:") else str(resolve_typed(Path(model)))
