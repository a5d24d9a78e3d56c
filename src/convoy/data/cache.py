"""What an earlier run made and a later one need not make again, kept as what the run published and how to find it."""

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
    """What an earlier run left. It may be gone, and `folder` and `output` may be of two runs."""

    folder: Path  # notes of what stands where in its output
    output: Path  # of the stage, which stays until there is another


def fingerprint(modules: Sequence[ModuleType], packages: Sequence[str], *settings: int) -> str:
    """Of all that decides what comes out: code, libraries and settings."""
    code = [Path(module.__file__ or "").read_bytes() for module in modules]
    told = [*(f"{package} {version(package)}" for package in packages), *map(str, settings)]
    return hashlib.sha256(b"\n".join([*code, *(line.encode() for line in told)])).hexdigest()[:16]


@contextlib.contextmanager
def snapshot(earlier: CacheDir, folder: Path) -> Iterator[CacheDir]:
    """With the notes as they are now, in `folder` for as long: whatever another run writes meanwhile, all processes
    that read them find one version."""
    with contextlib.suppress(OSError):  # not every file system can link
        shutil.copytree(earlier.folder, folder, copy_function=os.link)
    try:
        yield CacheDir(folder, earlier.output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_cache(folder: Path, describe: Callable[[Path], None]) -> None:
    """Have `describe` write into `folder`, beside which nothing is left: one folder for each way to make something.

    Where that can't be done, or another process does it too, nothing is found.
    """
    shutil.rmtree(folder.parent, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True)
        describe(folder)
