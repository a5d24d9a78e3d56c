"""Caches of a stage's results: the output of an earlier run, and a folder with the index to find results in it."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


class CacheDir(NamedTuple):
    """Location of an earlier run's results. Either may be missing, and the two may belong to different runs."""

    folder: Path  # index of the results in `output`
    output: Path  # output of the stage, which is kept until it is replaced by the next one


def fingerprint(modules: Sequence[ModuleType], packages: Sequence[str], *settings: int) -> str:
    """Hash everything that determines a result: code, libraries and settings.

    Args:
        modules: Modules whose source code determines the result.
        packages: Names of installed packages whose version determines the result.
        *settings: Settings that determine the result.

    Returns:
        16 hexadecimal digits.
    """
    code = [Path(module.__file__ or "").read_bytes() for module in modules]
    versions = [f"{package} {version(package)}" for package in packages]
    facts = [*code, *(fact.encode() for fact in [*versions, *map(str, settings)])]
    return hashlib.sha256(b"\n".join(facts)).hexdigest()[:16]


@contextlib.contextmanager
def snapshot(cache: CacheDir, folder: Path) -> Iterator[CacheDir]:
    """Keep a snapshot of the index in `folder` while the context is active.

    All processes that read it see the same version, whatever another run writes in the meantime.
    """
    # Not every file system supports hard links; then the snapshot is empty.
    with contextlib.suppress(OSError):
        shutil.copytree(cache.folder, folder, copy_function=os.link)
    try:
        yield CacheDir(folder, cache.output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_cache(folder: Path, write_index: Callable[[Path], None]) -> None:
    """Write a cache index into `folder`, removing all other folders beside it.

    The parent folder belongs to one kind of result, and `folder` to one fingerprint of it. If writing fails, or another
    process writes at the same time, the cache is left empty.

    Args:
        folder: Folder to create.
        write_index: Function that writes the index into the folder.
    """
    shutil.rmtree(folder.parent, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True)
        write_index(folder)
