"""The copy of parts of this library that goes with a model which is used elsewhere."""

import shutil
from collections.abc import Sequence
from pathlib import Path


def copy_library(library: Path, parts: Sequence[str], target: Path) -> None:
    """Copy files and packages of this library.

    Args:
        library: The folder of this library.
        parts: Paths of files and packages in it.
        target: The folder to write into.
    """
    for part in parts:
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        if (library / part).is_dir():
            shutil.copytree(library / part, target / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(library / part, target / part)
