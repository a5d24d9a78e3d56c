"""DVC's own files: a run that is killed or finds the disk full leaves them torn, and DVC would not start again."""

import contextlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from convoy.errors import ConvoyError

SIDECARS = ("", "-journal", "-wal", "-shm")  # a SQLite database, and what SQLite has beside it


def repair(root: Path) -> None:
    """Repair what DVC reads and writes at every run: dvc.lock and its list of locked paths.

    Raises ConvoyError where dvc.lock can't be read, and what it was before is not known.
    """
    restore_lock_file(root)
    remove_torn_path_locks(root)


def restore_lock_file(root: Path) -> None:
    """Restore dvc.lock as it was before a run that was stopped while DVC wrote it.

    Raises ConvoyError where that is not known.
    """
    lock, kept = root / "dvc.lock", root / "artifacts" / ".scratch" / "dvc.lock"
    if not lock.exists():
        return
    try:
        complete = _is_complete(read_yaml(lock))
    except ConvoyError:
        if "<<<<<<<" in lock.read_text(errors="replace") or not kept.exists():  # git's, for a person to decide
            raise
        complete = False
    if complete:
        kept.parent.mkdir(parents=True, exist_ok=True)
        # a copy that is cut short itself would be of no use
        beside = kept.with_suffix(".new")
        shutil.copyfile(lock, beside)
        beside.replace(kept)
    elif kept.exists():
        shutil.copyfile(kept, lock)
        print("dvc.lock was cut short when a run was stopped: it is again as it was before that run")


def _is_complete(lock: dict[str, Any]) -> bool:
    """Whether every stage in it has the hashes of what it read and wrote."""
    try:
        stages = lock.get("stages", {}).values()
        entries = [entry for stage in stages for side in ("deps", "outs") for entry in stage.get(side, [])]
        return all(isinstance(entry.get("md5"), str) for entry in entries)
    except (AttributeError, TypeError):
        return False


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a table that DVC keeps. Raises ConvoyError where it can't be read."""
    try:
        table = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())  # of a merge conflict, too
        raise ConvoyError(f"{file.name} can't be read: take one side of it, or git's last version ({said})") from None
    if not isinstance(table, dict):
        raise ConvoyError(f"{file.name} holds no table: `git checkout {file.name}` brings its last version")
    return table


# .dvc/tmp


def remove_torn_path_locks(root: Path) -> None:
    """Remove DVC's list of the paths that its processes work on, where it is torn or none of these is alive."""
    folder = root / ".dvc" / "tmp"
    file = folder / "rwlock"
    if not file.exists() or not _is_stale(file):
        return
    with contextlib.ExitStack() as locks:
        # DVC holds the first while it works, and the second while it writes the file
        if not all(_take(locks, folder / name, root) for name in ("lock", "rwlock.lock")):
            return  # a DVC at work may be writing it; if it stays torn, the next run finds it
        if file.exists() and _is_stale(file):
            file.unlink()
            print(".dvc/tmp/rwlock was left behind by a run that was stopped: removed")


def _is_stale(file: Path) -> bool:
    from dvc.rwlock import SCHEMA
    from voluptuous import Invalid

    try:
        held, written = SCHEMA(json.loads(file.read_text())), file.stat().st_mtime
    except (ValueError, Invalid):
        return True
    readers = [info for infos in held["read"].values() for info in infos]
    numbers = {info["pid"] for info in [*readers, *held["write"].values()]}
    return bool(numbers) and not any(_was_running(number, written) for number in numbers)


def _was_running(process: int, moment: float) -> bool:
    """Whether a process is alive and began before a moment. Later ones get its number, as after a restart."""
    try:
        return psutil.Process(process).create_time() <= moment + 1
    except psutil.NoSuchProcess:
        return False


def _take(locks: contextlib.ExitStack, file: Path, root: Path) -> bool:
    from dvc.config import Config
    from dvc.lock import LockError, make_lock

    hardlink = Config(str(root / ".dvc"), validate=False)["core"].get("hardlink_lock", False)
    try:
        locks.enter_context(make_lock(str(file), tmp_dir=str(file.parent), hardlink_lock=hardlink))
        return True
    except LockError:
        return False


# DVC's databases, which are outside of the project


def remove_damaged_databases(root: Path) -> bool:
    """Remove those of DVC's databases for this project that are damaged; returns whether there were any.

    They hold nothing but hashes that DVC computes again.
    """
    damaged = [file for file in _databases(root) if _is_damaged(file)]
    for file in damaged:
        for end in SIDECARS:
            file.with_name(file.name + end).unlink(missing_ok=True)
        print(f"{file}, where DVC remembers hashes, was damaged: removed, DVC computes them again")
    return bool(damaged)


def _databases(root: Path) -> Iterator[Path]:
    """Yield the databases of a project."""
    from dvc import env
    from dvc.dirs import site_cache_dir
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    before = os.environ.get(env.DVC_SITE_CACHE_DIR)
    # DVC says where they are only once it has opened them: it opens new ones, under the same name, in another folder
    with tempfile.TemporaryDirectory() as elsewhere:
        os.environ[env.DVC_SITE_CACHE_DIR] = elsewhere
        try:
            with Repo(str(root)) as repo:
                project, chosen = Path(repo.site_cache_dir).name, repo.config["core"].get("site_cache_dir")
        except DvcException:  # it has said itself what is wrong with the project
            return
        finally:
            os.environ.pop(env.DVC_SITE_CACHE_DIR)
            if before is not None:
                os.environ[env.DVC_SITE_CACHE_DIR] = before
    yield from sorted(Path(site_cache_dir(chosen), "repo", project).rglob("*.db"))


def _is_damaged(file: Path) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True)) as database:
            return database.execute("pragma quick_check(1)").fetchone() != ("ok",)
    except sqlite3.OperationalError:  # another process works with it, or it is not ours
        return False
    except sqlite3.DatabaseError:
        return True
