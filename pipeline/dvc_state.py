"""Repair of DVC's own files, which a killed run or a full disk leaves incomplete, so that DVC would not start again."""

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

from convoy.core.disk import remove_sqlite_database
from convoy.core.errors import ConvoyError, describe_error
from convoy.core.yaml_parser import parse_yaml


def repair(root: Path) -> None:
    """Repair the files that DVC reads and writes in every run: dvc.lock and the list of locked paths.

    Raises:
        ConvoyError: If dvc.lock can't be read, and it holds a merge conflict or there is no copy of its previous
            version.
    """
    restore_lock_file(root)
    remove_torn_path_locks(root)


def restore_lock_file(root: Path) -> None:
    """Restore dvc.lock if a run was stopped while DVC wrote it, or remove that of a first run; else keep a copy of it.

    Raises:
        ConvoyError: If dvc.lock can't be read, and it holds a merge conflict or there is no copy of its previous
            version.
    """
    lock, backup = root / "dvc.lock", root / "artifacts" / ".scratch" / "dvc.lock"
    backup.parent.mkdir(parents=True, exist_ok=True)
    if not lock.exists():
        # An empty copy says that there was none.
        backup.write_bytes(b"")
        return
    try:
        is_complete = _is_complete(read_yaml(lock))
    except ConvoyError:
        # The markers of a merge conflict are for the user to resolve.
        if "<<<<<<<" in lock.read_text(errors="replace") or not backup.exists():
            raise
        is_complete = False
    if is_complete:
        # Replacing the backup atomically ensures that it is never incomplete itself.
        temporary = backup.with_suffix(".new")
        shutil.copyfile(lock, temporary)
        temporary.replace(backup)
    elif backup.exists() and backup.stat().st_size == 0:
        lock.unlink()
        print("dvc.lock was truncated when the first run was stopped: removed, as there was none before that run")
    elif backup.exists():
        shutil.copyfile(backup, lock)
        print("dvc.lock was truncated when a run was stopped: restored as it was before that run")


def _is_complete(lock: dict[str, Any]) -> bool:
    """Return whether every stage in dvc.lock has the hashes of its dependencies and outputs."""
    try:
        stages = lock.get("stages", {}).values()
        entries = [entry for stage in stages for kind in ("deps", "outs") for entry in stage.get(kind, [])]
        return all(isinstance(entry.get("md5"), str) for entry in entries)
    except (AttributeError, TypeError):
        return False


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML file of DVC that holds a mapping.

    Raises:
        ConvoyError: If the file can't be read or holds no mapping.
    """
    try:
        content = parse_yaml(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        # The cause may be the markers of a merge conflict.
        raise ConvoyError(
            f"{file.name} can't be read: resolve the merge conflict, or restore it by `git checkout {file.name}`"
            f" ({describe_error(error)})"
        ) from None
    if not isinstance(content, dict):
        raise ConvoyError(f"{file.name} is not a YAML mapping: restore it by `git checkout {file.name}`")
    return content


# .dvc/tmp


def remove_torn_path_locks(root: Path) -> None:
    """Remove DVC's list of locked paths if it is incomplete or none of the processes in it is running."""
    folder = root / ".dvc" / "tmp"
    file = folder / "rwlock"
    if not file.exists() or not _is_stale(file):
        return
    with contextlib.ExitStack() as locks:
        # DVC holds the first lock while it works, and the second while it writes the file. If either is taken, DVC may
        # be writing the file now; if the file stays incomplete, the next run finds it.
        if not all(_acquire(locks, folder / name, root) for name in ("lock", "rwlock.lock")):
            return
        if file.exists() and _is_stale(file):
            file.unlink()
            print(".dvc/tmp/rwlock was left by a run that was stopped: removed")


def _is_stale(file: Path) -> bool:
    from dvc.rwlock import SCHEMA
    from voluptuous import Invalid

    try:
        locks, modified = SCHEMA(json.loads(file.read_text())), file.stat().st_mtime
    except (ValueError, Invalid):
        return True
    readers = [info for infos in locks["read"].values() for info in infos]
    pids = {info["pid"] for info in [*readers, *locks["write"].values()]}
    return bool(pids) and not any(_was_running(pid, modified) for pid in pids)


def _was_running(pid: int, moment: float) -> bool:
    """Return whether the process with a given id is running and began before `moment` (seconds since the epoch).

    A process that began later has reused the id, as after a restart of the machine.
    """
    try:
        return psutil.Process(pid).create_time() <= moment + 1
    except psutil.NoSuchProcess:
        return False


def _acquire(locks: contextlib.ExitStack, file: Path, root: Path) -> bool:
    from dvc.config import Config
    from dvc.lock import LockError, make_lock

    hardlink = Config(str(root / ".dvc"), validate=False)["core"].get("hardlink_lock", False)
    try:
        locks.enter_context(make_lock(str(file), tmp_dir=str(file.parent), hardlink_lock=hardlink))
        return True
    except LockError:
        return False


# DVC's databases, which are outside the project


def remove_damaged_databases(root: Path) -> bool:
    """Remove damaged databases of DVC for this project, and return whether there were any.

    The databases hold only hashes, which DVC computes again.
    """
    damaged = [file for file in _databases(root) if _is_damaged(file)]
    for file in damaged:
        remove_sqlite_database(file)
        print(f"{file}, DVC's database of hashes, was damaged: removed; DVC computes the hashes again")
    return bool(damaged)


def _databases(root: Path) -> Iterator[Path]:
    """Yield DVC's databases for a project."""
    from dvc import env
    from dvc.dirs import site_cache_dir
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    before = os.environ.get(env.DVC_SITE_CACHE_DIR)
    # DVC reveals their location only after it has opened them. It is therefore made to open new ones, under the same
    # name, in a temporary folder.
    with tempfile.TemporaryDirectory() as temporary:
        os.environ[env.DVC_SITE_CACHE_DIR] = temporary
        try:
            with Repo(str(root)) as repo:
                project, configured = Path(repo.site_cache_dir).name, repo.config["core"].get("site_cache_dir")
        # DVC has already reported what is wrong with the project.
        except DvcException:
            return
        finally:
            os.environ.pop(env.DVC_SITE_CACHE_DIR)
            if before is not None:
                os.environ[env.DVC_SITE_CACHE_DIR] = before
    yield from sorted(Path(site_cache_dir(configured), "repo", project).rglob("*.db"))


def _is_damaged(file: Path) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True)) as database:
            return database.execute("pragma quick_check(1)").fetchone() != ("ok",)
    # Another process is using the database, or this user has no access to it.
    except sqlite3.OperationalError:
        return False
    except sqlite3.DatabaseError:
        return True
