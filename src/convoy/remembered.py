"""What an earlier run made and a later one need not make again: a folder for each way to make it, the last one kept."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType


def fingerprint(modules: Sequence[ModuleType], packages: Sequence[str], *settings: int) -> str:
    """Of all that decides what comes out: code, libraries and settings."""
    code = [Path(module.__file__ or "").read_bytes() for module in modules]
    told = [*(f"{package} {version(package)}" for package in packages), *map(str, settings)]
    return hashlib.sha256(b"\n".join([*code, *(line.encode() for line in told)])).hexdigest()[:16]


def remember(folder: Path, made: Mapping[str, Path], describe: Callable[[Path], None]) -> None:
    """Leave the files `made`, by their names, in `folder`, and nothing beside it; `describe` adds how to find them.

    They are linked, which costs no disk. Where that can't be done, or another process does it too, nothing is found.
    """
    shutil.rmtree(folder.parent, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True)
        for name, file in made.items():
            os.link(file, folder / name)
        describe(folder)
