"""Synchronization of the folder data/ with data.dvc, unless that would lose files that exist nowhere else."""

import re
import shlex
from pathlib import Path

from convoy.core.errors import ConvoyError
from convoy.core.text import truncate_names
from convoy.data.sources.file_listing import is_junk
from convoy.data.sources.folder import reject_links
from pipeline.dvc_files import Import, read_import

MAX_MOVED = 8  # names in a suggested command


def commands(root: Path, *, update: bool) -> list[list[str]]:
    """Return the DVC commands after which data/ holds what data.dvc names.

    This function changes nothing itself.

    Args:
        root: The project folder.
        update: Whether to check a remote source for new data, too.

    Returns:
        The arguments of each command, in order.

    Raises:
        ConvoyError: If files in data/ would be lost or mixed with others, the source is missing, or data/ or the source
            contains links.
    """
    data = root / "data"
    if data.is_symlink():
        raise ConvoyError(_refuse_link(data))
    reject_links(data)
    found = read_import(root, "data.dvc")
    # After `dvc add data`, data/ itself is the source, and DVC tracks what is in it.
    if found is None:
        return [] if data.exists() else [["checkout", "data.dvc"]]
    source = root / found.source
    if found.is_local and source.is_dir():
        reject_links(source)
    if found.at_stake:
        raise ConvoyError(_refuse_loss(found, root))
    is_gone = found.is_local and found.offered is None
    if is_gone and (update or not found.is_frozen or not (found.present or found.is_cached)):
        raise ConvoyError(
            f"{found.source} is not there, where data.dvc says that the images come from: correct the path; or go"
            " on with data/ as it is (`dvc pull data.dvc` fetches it) by "
            + ("`make repro`" if found.is_frozen else "`dvc freeze data.dvc` and `make repro`")
        )
    if found.offered is not None and found.is_current:
        _refuse_mixture(found)
    bring = [["update", "data.dvc"]]
    if update:
        return bring
    if is_gone:
        if found.present:
            print(f"{found.source} is not there, where data.dvc says that the images come from: data/ stays as it is")
            return []
        return [["checkout", "data.dvc"]]
    if found.is_current and found.is_recorded:
        return []
    if found.is_local or not found.is_current:
        return bring
    # For a remote source the recorded version is sufficient.
    if found.is_cached:
        return [["checkout", "--force", "data.dvc"]]
    return [] if found.present else bring


def _refuse_loss(found: Import, root: Path) -> str:
    """Return the message about files that would be lost, with the commands to train on them or to move them away."""
    files = [f"data/{path}" if path else "data" for path in sorted(found.at_stake)]
    count, are, them = (f"{len(files)} files", "are", "them") if len(files) > 1 else ("a file", "is", "it")
    name = _unused_name(root)
    train = _lines(*_move(found, name), *_point_to(found, name), "make repro")
    leave = _lines(*_move(found, f"../{name}"), "make repro")
    return (
        f"data/ holds {count} that DVC did not put there and that {are} nowhere else: {truncate_names(files)}. A run"
        f" would replace {them} or mix {them} with {found.source}, which data.dvc names as the source; no file was"
        f" touched.\n"
        f"To train on {them}, make {them} the source:\n{train}\nTo do without {them}, move {them} away:\n{leave}"
    )


def _refuse_link(data: Path) -> str:
    target = str(data.readlink())
    return (
        f"data is a link to {target}, and DVC would replace it: remove it, and name the folder itself as the source of"
        f" the images:\n{_lines('rm data', _import(target), 'make repro')}"
    )


def _refuse_mixture(found: Import) -> None:
    """Raise ConvoyError if the recorded version differs from the content of its recorded source.

    When `dvc repro` finds another `path:` or other files in the source of a frozen import, DVC records the source again
    without importing it, and detects no difference afterwards.
    """
    recorded, offered = found.recorded or {}, found.offered or {}
    paths = sorted({*recorded, *offered})
    others = [path for path in paths if not is_junk(path) and recorded.get(path) != offered.get(path)]
    if found.recorded is None or not others:
        return
    raise ConvoyError(
        f"data.dvc names {found.source} as the source of data/, but they differ in {truncate_names(others)}: a plain"
        " `dvc repro` recorded data/ as it was then. DVC's cache keeps those files.\n"
        f"To train on {found.source}:\n{_lines('rm -r data', _import(found.source), 'make repro')}\n"
        f"To train on data/ as it is:\n{_lines('rm data.dvc', 'dvc add data', 'make repro')}"
    )


def _move(found: Import, target: str) -> list[str]:
    """Return commands that move the files at stake to `target` and keep what DVC put into data/."""
    ours = {path.partition("/")[0] for path in found.present.keys() - set(found.at_stake)}
    theirs = sorted({path.partition("/")[0] for path in found.at_stake})
    if not ours:
        return [f"mv data {target}"]
    if ours.isdisjoint(theirs) and len(theirs) <= MAX_MOVED:
        return [f"mkdir {target}", f"mv {shlex.join(f'data/{name}' for name in theirs)} {target}"]
    return [f"mv data {target}  # with what else is in data/"]


def _point_to(found: Import, name: str) -> list[str]:
    """Return commands that make the folder `name` the source, under a data set name of its own for the classes."""
    rename = f"sed -i 's/^name: .*/name: {name}/' conf/dataset/folder.yaml"
    # DVC itself must replace a name that YAML may quote, and a remote source, which needs other keys.
    if found.is_local and re.fullmatch(r"[\w./-]+", found.source):
        pattern = found.source.replace(".", r"\.")
        return [f"sed -i 's#path: {pattern}$#path: {name}#' data.dvc", rename]
    return ["rm -rf data", _import(name), rename]


def _import(source: str) -> str:
    return f"dvc import-url --force {shlex.quote(source)} data"


def _unused_name(root: Path) -> str:
    names = ("my-images", *(f"my-images-{number}" for number in range(2, 1000)))
    return next(name for name in names if not (root / name).exists() and not (root.parent / name).exists())


def _lines(*lines: str) -> str:
    return "\n".join(f"  {line}" for line in lines)
