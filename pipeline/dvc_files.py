"""Files under DVC: compare an import's recorded version, its source, the workspace and the cache."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convoy.core.errors import ConvoyError, describe_error

# Relative path within a folder -> MD5. For a single file, the only path is "".
Checksums = Mapping[str, str]


@dataclass(frozen=True)
class Import:
    """A `.dvc` file with one dependency and one output, as `dvc import-url` writes it."""

    source: str  # as written in the file
    is_local: bool  # whether the source is a path on this machine
    is_frozen: bool  # whether `dvc repro` never replaces the output; DVC's default
    is_current: bool  # whether the file records the source it names, and its present content if that is local
    present: Checksums  # files in the workspace; empty if there are none
    recorded: Checksums | None  # files of the recorded version; None if no list of them is available
    offered: Checksums | None  # files of the source; None if it is remote or missing
    is_recorded: bool  # whether the workspace holds exactly the recorded version
    is_cached: bool  # whether the cache holds all files of the recorded version
    at_stake: list[str]  # paths in the workspace whose content would be lost: it is in neither cache nor source


def read_import(root: Path, name: str) -> Import | None:
    """Compare the output of an import with its recorded version and with its source.

    DVC does not read files again whose size and modification time are unchanged since it hashed them.

    Args:
        root: Project folder.
        name: Name of the `.dvc` file in it, such as `data.dvc`.

    Returns:
        The comparison, or None if the file does not describe an import, as after `dvc add`.

    Raises:
        ConvoyError: If DVC can't read the `.dvc` file or one of the compared files.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc_objects.errors import ObjectFormatError

    try:
        with Repo(str(root)) as repo:
            stage = repo.stage.load_one(str(root / name))
            if not stage.is_import:
                return None
            (dependency,), (output,) = stage.deps, stage.outs
            cache = output.cache
            is_local = dependency.fs.protocol == "local" and not stage.is_repo_import
            present, present_hash = _read(output, cache)
            offered, offered_hash = _read(dependency, cache) if is_local else (None, None)
            recorded, recorded_hash = _list(output.get_obj()), output.hash_info
            # The list of a folder's files is an object in the cache, which a fresh clone lacks.
            if recorded is None and recorded_hash == present_hash:
                recorded = present
            elif recorded is None and recorded_hash == offered_hash:
                recorded = offered
            elsewhere = {*(recorded or {}).values(), *(offered or {}).values()}
            unknown = {path: md5 for path, md5 in (present or {}).items() if md5 not in elsewhere}
            return Import(
                source=dependency.def_path,
                is_local=is_local,
                is_frozen=stage.frozen,
                is_current=not stage.changed_stage() and (offered is None or dependency.hash_info == offered_hash),
                present=present or {},
                recorded=recorded,
                offered=offered,
                is_recorded=bool(recorded_hash) and recorded_hash == present_hash,
                is_cached=recorded is not None and all(cache.exists(md5) for md5 in recorded.values()),
                at_stake=[path for path, md5 in unknown.items() if not cache.exists(md5)],
            )
    except (DvcException, ObjectFormatError, OSError) as error:
        raise ConvoyError(f"{name}: DVC can't compare it with what is there: {describe_error(error)}") from error


def uncached(root: Path, files: Sequence[Path]) -> list[Path]:
    """Return those of the files below `root` whose content is not in DVC's cache."""
    from dvc.repo import Repo
    from dvc_data.hashfile.hash import file_md5

    with Repo(str(root)) as repo:
        cache = repo.cache.local
        return [file for file in files if not (file.exists() and cache.exists(file_md5(str(file), repo.fs)))]


def list_changed_stages(root: Path, stages: Sequence[str]) -> list[str]:
    """Return those of the stages that are not up to date; none if DVC can't compare them, as `dvc repro` reports."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            return list(repo.status(targets=list(stages)))
    except DvcException:
        return []


def list_changed_inputs(root: Path) -> dict[str, list[str]]:
    """Return the stages whose data, settings or code differ from dvc.lock, each with the inputs that differ.

    Results that are missing, as in a fresh clone, are no difference.

    Raises:
        ConvoyError: If DVC can't compare them.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            found = repo.status()
            locked = {out.def_path: out.hash_info for stage in repo.index.stages for out in stage.outs}
            changed = {stage: inputs for stage, entries in found.items() if (inputs := _list_changed(entries))}
            # A stage before this one has run since.
            for stage in repo.index.stages:
                outdated = [
                    dep.def_path
                    for dep in stage.deps
                    if dep.def_path in locked and dep.hash_info != locked[dep.def_path]
                ]
                if outdated:
                    changed.setdefault(stage.addressing, []).extend(outdated)
    except DvcException as error:
        raise ConvoyError(f"DVC can't compare the stages with dvc.lock: {describe_error(error)}") from error
    return changed


def _list_changed(entries: Sequence[Any]) -> list[str]:
    """Return the changed inputs in DVC's status of a stage, which are neither outputs nor missing results."""
    names = []
    for entry in entries:
        if not isinstance(entry, dict):
            names += ["command"] if entry == "changed command" else []
            continue
        for name, state in entry.get("changed deps", {}).items():
            names += [name] if state != "deleted" or not name.startswith("artifacts/") else []
    return names


def read_locked_file(root: Path, stage: str, folder: str, name: str) -> bytes | None:
    """Return a file in a folder that a stage depends on, as it was when the stage ran last.

    Args:
        root: Project folder.
        stage: Name of the stage in dvc.lock.
        folder: The folder, a dependency of the stage.
        name: Name of the file in it.

    Returns:
        The content, or None if neither the cache nor the default remote has it.
    """
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        (dep,) = (each for each in repo.stage.load_one(name=stage).deps if each.def_path == folder)
    return read_folder_file(root, dep.hash_info.value, name) if dep.hash_info else None


def read_folder_file(root: Path, checksum: str, name: str) -> bytes | None:
    """Return a file in a folder that DVC tracks.

    Args:
        root: Project folder.
        checksum: The checksum of the folder, as in dvc.lock: MD5 and ".dir".
        name: Name of the file in it.

    Returns:
        The content, or None if neither the cache nor the default remote has it.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree
    from dvc_objects.errors import ObjectFormatError

    with Repo(str(root)) as repo:
        for find_storage in (lambda: repo.cache.local, lambda: repo.cloud.get_remote_odb(None, "pull")):
            with contextlib.suppress(DvcException, ObjectFormatError, OSError, KeyError):
                storage = find_storage()
                _, file = Tree.load(storage, HashInfo("md5", checksum)).get((name,)) or (None, None)
                if file:
                    return storage.fs.cat_file(storage.oid_to_path(file.value))
    return None


def share_cache(root: Path, checkout: Path) -> None:
    """Let another checkout of a project use the project's cache and remotes, by its `.dvc/config.local`."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo, Repo(str(checkout)) as other, other.config.edit("local") as settings:
        # Paths are absolute here, and relative to their file in the files.
        settings |= {name: repo.config[name] for name in ("core", "remote")}
        settings["cache"] = {**repo.config["cache"], "dir": repo.cache.local_cache_dir}


def _read(output: Any, cache: Any) -> tuple[Checksums | None, Any]:
    """Return the files of an output or a dependency and their common hash, or (None, None) if it is missing."""
    from dvc_data.hashfile.build import build

    if not os.path.lexists(output.fs_path):
        return None, None
    _, _, found = build(cache, output.fs_path, output.fs, output.hash_name, ignore=output.dvcignore, dry_run=True)
    return _list(found), found.hash_info


def _list(found: Any) -> Checksums | None:
    from dvc_data.hashfile.tree import Tree

    if isinstance(found, Tree):
        return {"/".join(parts): checksum.value for parts, _, checksum in found}
    return None if found is None else {"": found.hash_info.value}
