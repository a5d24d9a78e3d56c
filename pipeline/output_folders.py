"""The folders below artifacts/ that stages own: each is replaced as a whole, so nothing else may be lost with it."""

import json
import shlex
import shutil
from pathlib import Path

from convoy.dvc_files import uncached
from convoy.errors import ConvoyError
from convoy.text import truncate_names
from pipeline.stage import MARK

SINGLE = ("fetch", "preprocess", "register")
PER_MODEL = ("train", "evaluate")


def refuse_strays(root: Path, models: list[str]) -> None:
    """Raise ConvoyError where a folder that DVC or a stage would replace holds files that are nowhere else."""
    listed = [root / "artifacts" / stage / name for stage in PER_MODEL for name in models]
    folders = {*(root / "artifacts" / name for name in SINGLE), *listed, *_marked(root)}
    others = [
        file
        for folder in folders
        for names in [_written(folder)]
        for file in folder.rglob("*")
        if not file.is_dir() and str(file.relative_to(folder)) not in names
    ]
    # what is left of a checkout that was killed, and results whose mark is damaged, are in the cache
    if strays := uncached(root, others) if others else []:
        paths = sorted(str(file.relative_to(root)) for file in strays)
        raise ConvoyError(
            f"{truncate_names(paths)}: no stage wrote this, and the folder around it is replaced as a whole when its"
            f" stage runs; nothing was changed. Move it out of artifacts/, such as by `mv {shlex.quote(paths[0])} .`"
        )


def remove_unlisted(root: Path, models: list[str]) -> None:
    """Remove the results of architectures that are no longer on the list; DVC's cache still has them."""
    for folder in _marked(root):
        if folder.name not in models:
            print(f"removing {folder.relative_to(root)}: {folder.name} is not among the models in conf/config.yaml")
            shutil.rmtree(folder)


def _marked(root: Path) -> list[Path]:
    """The folders of architectures that a stage wrote: a folder without the mark is the user's own."""
    return [mark.parent for stage in PER_MODEL for mark in sorted((root / "artifacts" / stage).glob(f"*/{MARK}"))]


def _written(folder: Path) -> set[str]:
    """The names of the files that a stage wrote, as far as its mark is there and sound."""
    try:
        return {MARK, *json.loads((folder / MARK).read_text())}
    except (OSError, ValueError, TypeError):
        return {MARK}
