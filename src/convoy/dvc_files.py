"""Files under DVC: what an import records, what its source holds now, and which files are nowhere else."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convoy.errors import ConvoyError

Checksums = Mapping[str, str]  # path within a folder -> md5; of a single file, the one path is ""


@dataclass(frozen=True)
class Import:
    """A `.dvc` file with one dependency and one output, as `dvc import-url` writes it."""

    source: str  # as the file names it
    is_local: bool  # whether the source is a path of this machine
    is_frozen: bool  # DVC's default: `dvc repro` never replaces the output
    is_current: bool  # whether the file records the source that it names, and as it is now where that can be seen
    present: Checksums  # in the workspace; empty where there is no file
    recorded: Checksums | None  # of the recorded version; None where no list of its files is at hand
    offered: Checksums | None  # of the source; None where it is remote, or gone
    is_recorded: bool  # whether the workspace holds exactly the recorded version
    is_cached: bool  # whether the cache holds all of the recorded version
    at_stake: list[str]  # paths in the workspace whose content neither the cache nor the source has


def read_import(root: Path, name: str) -> Import | None:
    """Compare the output of the import `root/name`, such as data.dvc, with what is recorded and with its source.

    Files that DVC has seen before and that have kept size and time are not read again. Returns None where the file
    describes no import, as after `dvc add`. Raises ConvoyError where DVC can't read it or a file.
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
            # the list of a folder's files is an object in the cache, which a fresh clone lacks
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
        raise ConvoyError(f"{name}: DVC can't compare it with what is there: {' '.join(str(error).split())}") from error


def uncached(root: Path, files: Sequence[Path]) -> list[Path]:
    """Those of some files below `root` whose content is not in DVC's cache."""
    from dvc.repo import Repo
    from dvc_data.hashfile.hash import file_md5

    with Repo(str(root)) as repo:
        cache = repo.cache.local
        return [file for file in files if not (file.exists() and cache.exists(file_md5(str(file), repo.fs)))]


def _read(output: Any, cache: Any) -> tuple[Checksums | None, Any]:
    """The files of an output or a dependency, and the hash of all; None for both where there is nothing."""
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
