"""Checks of the output folders in artifacts/, which stages replace completely and which must hold no other files."""

import json
import shlex
import shutil
from pathlib import Path

from convoy.core.artifact_names import MANIFEST
from convoy.core.errors import ConvoyError
from convoy.core.text import truncate_names
from pipeline.dvc_files import uncached

SINGLE = ("fetch", "preprocess", "resize", "report", "register")
PER_MODEL = ("train", "evaluate")


def refuse_strays(root: Path, models: list[str]) -> None:
    """Check that no folder that DVC or a stage would replace holds files that exist nowhere else.

    Args:
        root: The project folder.
        models: The architectures in the settings.

    Raises:
        ConvoyError: If there are such files.
    """
    listed = [root / "artifacts" / stage / name for stage in PER_MODEL for name in models]
    folders = {*(root / "artifacts" / name for name in SINGLE), *listed, *_model_folders(root)}
    others: list[Path] = []
    for folder in folders:
        written = _manifest_files(folder)
        files = (file for file in folder.rglob("*") if not file.is_dir())
        others += (file for file in files if str(file.relative_to(folder)) not in written)
    # The remains of a killed checkout and results with a damaged manifest are in the cache.
    if strays := uncached(root, others) if others else []:
        paths = sorted(str(file.relative_to(root)) for file in strays)
        raise ConvoyError(
            f"{truncate_names(paths)}: no stage wrote this, and its folder is replaced completely when its stage runs;"
            f" nothing was changed. Move it out of artifacts/, for example by `mv {shlex.quote(paths[0])} .`"
        )


def remove_unlisted(root: Path, models: list[str]) -> None:
    """Remove the results of architectures that are not in `models`; they remain in DVC's cache."""
    for folder in _model_folders(root):
        if folder.name not in models:
            print(f"removing {folder.relative_to(root)}: {folder.name} is not among the models of the settings")
            shutil.rmtree(folder)


def _model_folders(root: Path) -> list[Path]:
    """Return the folders of architectures that a stage wrote.

    A folder without a manifest belongs to the user.
    """
    return [file.parent for stage in PER_MODEL for file in sorted((root / "artifacts" / stage).glob(f"*/{MANIFEST}"))]


def _manifest_files(folder: Path) -> set[str]:
    """Return the names of the files that a stage wrote, or just the manifest if it is missing or damaged."""
    try:
        return {MANIFEST, *json.loads((folder / MANIFEST).read_text())}
    except (OSError, ValueError, TypeError):
        return {MANIFEST}
