"""Full disks: recognise them in the errors of different libraries, and name the folder concerned."""

import errno
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
# Messages of Linux and macOS, and of SQLite, for libraries that keep only the text of the original error.
DISK_FULL_MESSAGES = ("no space left on device", "disk quota exceeded", "database or disk is full")
# SQLite reports this for some writes to a full disk, but also for a failing disk.
SQLITE_IO_MESSAGE = "disk i/o error"
# With less free space than this, an unclear error is attributed to a full disk.
MIN_FREE_BYTES = 2**20  # bytes


def explain_full_disk(error: BaseException, root: Path, fix: str = "run this again") -> str | None:
    """Return a message for an error that a full disk caused.

    Args:
        error: Error as it was caught. Its causes and contexts are checked, too.
        root: Project folder.
        fix: What the user should do once there is space, for the message.

    Returns:
        The message, or None if the disk is not full.
    """
    full = [each for each in _chain(error) if _is_full(each, root)]
    if not full:
        return None
    found = _find_folder(path for each in full for path in _find_paths(each))
    # Most write errors name no file. Then it may be any of the file systems that we write to.
    folders = [found] if found else _select_one_per_disk([root, Path(tempfile.gettempdir())])
    free = {folder: shutil.disk_usage(folder).free for folder in folders}
    hint = ""
    if _is_on_temporary_disk(min(folders, key=free.__getitem__), root):
        hint = f". {tempfile.gettempdir()} is for temporary files: set TMPDIR to a folder on a larger disk"
    listed = ", ".join(f"{folder} has {format_size(free[folder])} free" for folder in folders)
    return f"the disk is full: make room and {fix}; what was there is untouched ({listed}){hint}"


def is_disk_error(error: BaseException) -> bool:
    """Return whether SQLite failed to read or write because of the disk, not because of the database."""
    return any(SQLITE_IO_MESSAGE in str(each).lower() for each in _chain(error))


def remove_sqlite_database(file: Path) -> None:
    """Remove a SQLite database and the files that SQLite keeps beside it, if they exist."""
    for suffix in ("", "-journal", "-wal", "-shm"):
        file.with_name(file.name + suffix).unlink(missing_ok=True)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all its causes and contexts."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            waiting += [each.__cause__, each.__context__]
            yield each


def _is_full(error: BaseException, root: Path) -> bool:
    if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
        return True
    # The text of a shutil.Error includes that of the errors in it.
    text = str(error).lower()
    return any(message in text for message in DISK_FULL_MESSAGES) or (
        SQLITE_IO_MESSAGE in text and shutil.disk_usage(root).free < MIN_FREE_BYTES
    )


def _find_paths(error: BaseException) -> Iterator[Path]:
    """Yield the files that could not be written according to an error."""
    # A shutil.Error holds a list of (source, target, message).
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        yield from (Path(str(target)) for _, target, *_ in error.args[0])
    elif isinstance(error, OSError):
        # If there are two file names, the second is the target.
        name = error.filename2 or error.filename
        if isinstance(name, str | bytes):
            yield Path(name if isinstance(name, str) else name.decode(errors="surrogateescape"))


def _find_folder(paths: Iterable[Path]) -> Path | None:
    """Return the nearest existing parent folder of the first path.

    The folder that was written to may be gone, as temporary folders are.
    """
    for path in paths:
        for folder in path.absolute().parents:
            if folder.is_dir():
                return folder
    return None


def _is_on_temporary_disk(folder: Path, root: Path) -> bool:
    """Return whether a folder is on the file system for temporary files, and the project is on another one."""
    device = Path(tempfile.gettempdir()).stat().st_dev
    return folder.stat().st_dev == device != root.stat().st_dev


def _select_one_per_disk(folders: list[Path]) -> list[Path]:
    """Return the first of the folders on each file system."""
    return list({folder.stat().st_dev: folder for folder in reversed(folders)}.values())[::-1]


def format_size(count: int) -> str:
    """Return a number of bytes with its unit, such as 1.5 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
