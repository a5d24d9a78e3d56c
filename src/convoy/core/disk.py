"""Full disks: recognise them in the errors of different libraries, and name the folder concerned."""

import errno
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
# Messages of Linux and macOS, and of SQLite, for libraries that keep only the text of the original error.
WORDS = ("no space left on device", "disk quota exceeded", "database or disk is full")
# SQLite reports this for some writes to a full disk, but also for a failing disk.
UNCLEAR = "disk i/o error"
# With less free space than this, an unclear error is attributed to a full disk.
NO_ROOM = 2**20  # bytes


def explain_full_disk(error: BaseException, root: Path, again: str = "run this again") -> str | None:
    """Return a message for an error that a full disk caused.

    Args:
        error: Error as it was caught. Its causes and contexts are checked, too.
        root: Project folder.
        again: What the user should do once there is space, for the message.

    Returns:
        The message, or None if the disk is not full.
    """
    full = [each for each in _chain(error) if _is_full(each, root)]
    if not full:
        return None
    named = _find_folder(place for each in full for place in _places(each))
    # Most write errors name no file. Then it may be any of the file systems that we write to.
    folders = [named] if named else _distinct([root, Path(tempfile.gettempdir())])
    free = {folder: shutil.disk_usage(folder).free for folder in folders}
    hint = ""
    if _is_temporary(min(folders, key=free.__getitem__), root):
        hint = f". {tempfile.gettempdir()} is for temporary files: set TMPDIR to a folder on a larger disk"
    listed = ", ".join(f"{folder} has {_size(free[folder])} free" for folder in folders)
    return f"the disk is full: make room and {again}; what was there is untouched ({listed}){hint}"


def is_disk_error(error: BaseException) -> bool:
    """Return whether SQLite failed to read or write because of the disk, not because of the database."""
    return any(UNCLEAR in str(each).lower() for each in _chain(error))


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
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    # The text of a shutil.Error includes that of the errors in it.
    text = str(error).lower()
    return any(words in text for words in WORDS) or (UNCLEAR in text and shutil.disk_usage(root).free < NO_ROOM)


def _places(error: BaseException) -> Iterator[Path]:
    """Yield the files that could not be written according to an error."""
    # A shutil.Error holds a list of (source, target, message).
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        yield from (Path(str(target)) for _, target, *_ in error.args[0])
    elif isinstance(error, OSError):
        # If there are two file names, the second is the target.
        name = error.filename2 or error.filename
        if isinstance(name, str | bytes):
            yield Path(name if isinstance(name, str) else name.decode(errors="surrogateescape"))


def _find_folder(places: Iterable[Path]) -> Path | None:
    """Return the nearest existing parent folder of the first place.

    The folder that was written to may be gone, as temporary folders are.
    """
    for place in places:
        for folder in place.absolute().parents:
            if folder.is_dir():
                return folder
    return None


def _is_temporary(folder: Path, root: Path) -> bool:
    """Return whether a folder is on the file system for temporary files, and the project is on another one."""
    device = Path(tempfile.gettempdir()).stat().st_dev
    return folder.stat().st_dev == device != root.stat().st_dev


def _distinct(folders: list[Path]) -> list[Path]:
    """Return the first of the folders on each file system."""
    return list({folder.stat().st_dev: folder for folder in reversed(folders)}.values())[::-1]


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
