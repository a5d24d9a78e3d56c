"""Synchronization of the folder data/ with data.dvc, unless that would lose files that exist nowhere else."""

import shlex
from pathlib import Path

from convoy.core.errors import ConvoyError
from convoy.core.text import truncate_names
from convoy.data.sources.file_listing import is_junk
from convoy.data.sources.folder import reject_links
from pipeline.dvc_files import Import, read_import
from pipeline.source_choice import USE

MAX_MOVED_NAMES = 8  # names in a suggested command


def sync_commands(root: Path, *, update: bool) -> list[list[str]]:
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
        raise ConvoyError(_link_message(data))
    reject_links(data)
    imported = read_import(root, "data.dvc")
    # After `dvc add data`, data/ itself is the source, and DVC tracks what is in it.
    if imported is None:
        return [] if data.exists() else [["checkout", "data.dvc"]]
    source = root / imported.source
    if imported.is_local and source.is_dir():
        reject_links(source)
    if imported.at_stake:
        raise ConvoyError(_loss_message(imported, root))
    is_gone = imported.is_local and imported.offered is None
    if is_gone and (update or not imported.is_frozen or not (imported.present or imported.is_cached)):
        raise ConvoyError(
            f"{imported.source}, the source of the images in data.dvc, does not exist: correct the path, or continue"
            " with data/ as it is (`dvc pull data.dvc` fetches it) by "
            + ("`convoy run`" if imported.is_frozen else "`dvc freeze data.dvc` and `convoy run`")
        )
    if imported.offered is not None and imported.is_current:
        _refuse_mixture(imported)
    fetch = [["update", "data.dvc"]]
    if update:
        return fetch
    if is_gone:
        if imported.present:
            print(f"{imported.source}, the source of the images in data.dvc, does not exist: data/ is used as it is")
            return []
        return [["checkout", "data.dvc"]]
    if imported.is_current and imported.is_recorded:
        return []
    if imported.is_local or not imported.is_current:
        return fetch
    # For a remote source the recorded version is sufficient.
    if imported.is_cached:
        return [["checkout", "--force", "data.dvc"]]
    return [] if imported.present else fetch


def check_replaceable(root: Path) -> None:
    """Check that data/ may be replaced by the content of another source.

    Raises:
        ConvoyError: If data/ is a link, is itself the source, or has files that DVC did not put there.
    """
    data = root / "data"
    if data.is_symlink():
        raise ConvoyError(_link_message(data))
    if not data.exists():
        return
    imported = read_import(root, "data.dvc") if (root / "data.dvc").exists() else None
    if imported is None:
        raise ConvoyError(
            "data/ itself is the source of the images, and another source would replace it: move it first:\n"
            + _lines(f"mv data {_unused_name(root)}")
        )
    if imported.at_stake:
        raise ConvoyError(_loss_message(imported, root))


def _loss_message(imported: Import, root: Path) -> str:
    """Return the message about files that would be lost, with the commands to train on them or to move them away."""
    files = [f"data/{path}" if path else "data" for path in sorted(imported.at_stake)]
    count, are, them = (f"{len(files)} files", "are", "them") if len(files) > 1 else ("a file", "is", "it")
    name = _unused_name(root)
    train = _lines(*_move(imported, name), f"{USE} {name}", "convoy run")
    leave = _lines(*_move(imported, f"../{name}"), "convoy run")
    return (
        f"data/ holds {count} that DVC did not put there and that {are} nowhere else: {truncate_names(files)}. A run"
        f" would replace {them} or mix {them} with {imported.source}, the source in data.dvc; no file was changed.\n"
        f"To train on {them}, make {them} the source:\n{train}\nTo exclude {them}, move {them} away:\n{leave}"
    )


def _link_message(data: Path) -> str:
    target = str(data.readlink())
    return (
        f"data is a link to {target}, and DVC would replace it: remove it, and make the folder itself the source of"
        f" the images:\n{_lines('rm data', f'{USE} {shlex.quote(target)}', 'convoy run')}"
    )


def _refuse_mixture(imported: Import) -> None:
    """Raise ConvoyError if the recorded version differs from the content of its recorded source.

    When `dvc repro` finds another `path:` or other files in the source of a frozen import, DVC records the source again
    without importing it, and detects no difference afterwards.
    """
    recorded, offered = imported.recorded or {}, imported.offered or {}
    paths = sorted({*recorded, *offered})
    others = [path for path in paths if not is_junk(path) and recorded.get(path) != offered.get(path)]
    if imported.recorded is None or not others:
        return
    again = f"dvc import-url --force {shlex.quote(imported.source)} data"
    raise ConvoyError(
        f"data.dvc names {imported.source} as the source of data/, but they differ in {truncate_names(others)}: a plain"
        " `dvc repro` recorded data/ as it was then. DVC's cache keeps those files.\n"
        f"To train on {imported.source}:\n{_lines('rm -r data', again, 'convoy run')}\n"
        f"To train on data/ as it is:\n{_lines('rm data.dvc', 'dvc add data', 'convoy run')}"
    )


def _move(imported: Import, target: str) -> list[str]:
    """Return commands that move the files at stake to `target` and keep what DVC put into data/."""
    ours = {path.partition("/")[0] for path in imported.present.keys() - set(imported.at_stake)}
    theirs = sorted({path.partition("/")[0] for path in imported.at_stake})
    if not ours:
        return [f"mv data {target}"]
    if ours.isdisjoint(theirs) and len(theirs) <= MAX_MOVED_NAMES:
        return [f"mkdir {target}", f"mv {shlex.join(f'data/{name}' for name in theirs)} {target}"]
    return [f"mv data {target}  # with what else is in data/"]


def _unused_name(root: Path) -> str:
    names = ("my-images", *(f"my-images-{number}" for number in range(2, 1000)))
    return next(
        name
        for name in names
        if not any((root / path).exists() for path in (name, f"../{name}", f"conf/dataset/{name}.yaml"))
    )


def _lines(*lines: str) -> str:
    return "\n".join(f"  {line}" for line in lines)
