"""Full disks: recognised in the errors of every library that may meet one, and named."""

import errno
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
# what remains of the error number where a library keeps only the words: of Linux and macOS, and of SQLite
WORDS = ("no space left on device", "disk quota exceeded", "database or disk is full")
# SQLite says no more than this of some writes that found no room; a disk that fails says the same
UNCLEAR = "disk i/o error"
NO_ROOM = 2**20  # bytes; with fewer free, an unclear error is that of a full disk


def explain_full_disk(error: BaseException, root: Path, again: str = "run this again") -> str | None:
    """Return the message for an error that a full disk caused, and None for any other.

    Args:
        error: as it was caught; what it was raised from, and what it was raised in, is looked at, too.
        root: the project folder.
        again: what to do when there is room.
    """
    full = [each for each in _chain(error) if _is_full(each, root)]
    if not full:
        return None
    named = _find_folder(place for each in full for place in _places(each))
    # most errors of a write name no file: then every file system that we write to may be the one
    folders = [named] if named else _distinct([root, Path(tempfile.gettempdir())])
    free = ", ".join(f"{folder} has {_size(shutil.disk_usage(folder).free)} free" for folder in folders)
    hint = ""
    if any(_is_temporary(folder, root) for folder in folders):
        hint = f". {tempfile.gettempdir()} is for temporary files: set TMPDIR to a folder on a larger disk"
    return f"the disk is full: make room and {again}; what was there is untouched ({free}){hint}"


def is_disk_error(error: BaseException) -> bool:
    """Whether SQLite failed to read or write for a reason that lies in the disk and not in the database."""
    return any(UNCLEAR in str(each).lower() for each in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and all that it was raised from or in."""
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
    # shutil.Error holds a list of (source, target, message)
    text = str(error).lower()
    return any(words in text for words in WORDS) or (UNCLEAR in text and shutil.disk_usage(root).free < NO_ROOM)


def _places(error: BaseException) -> Iterator[Path]:
    """Yield the files that an error says it could not write."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        yield from (Path(str(target)) for _, target, *_ in error.args[0])
    elif isinstance(error, OSError):
        # of two, the second is the target
        name = error.filename2 or error.filename
        if isinstance(name, str | bytes):
            yield Path(name if isinstance(name, str) else name.decode(errors="surrogateescape"))


def _find_folder(places: Iterable[Path]) -> Path | None:
    """Return the folder of the first place; where that is gone, as temporary ones are, the one that it was in."""
    for place in places:
        for folder in place.absolute().parents:
            if folder.is_dir():
                return folder
    return None


def _is_temporary(folder: Path, root: Path) -> bool:
    """Whether a folder is on the file system of temporary files, and that is not the project's own."""
    device = Path(tempfile.gettempdir()).stat().st_dev
    return folder.stat().st_dev == device != root.stat().st_dev


def _distinct(folders: list[Path]) -> list[Path]:
    """Return one folder of each file system."""
    return list({folder.stat().st_dev: folder for folder in reversed(folders)}.values())[::-1]


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
