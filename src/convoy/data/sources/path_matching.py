"""Path matching: the files that the paths in a table or a list lead to."""

import collections
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from convoy.data.sources.file_listing import FileSet, is_image

File = tuple[int, str]  # index of the file set, path in it
Parts = tuple[str, ...]  # names of folders and of the file, outermost first
# What Windows writes before a path: C: or a server, which is a name like any other here.
DRIVE = re.compile(r"^[A-Za-z]:")


class PathMatcher:
    """A matcher from written paths to the files in a folder and its archives.

    The first of these rules that leads to a file decides:

    1. The path is that of the file, relative to the folder of the table, or in an archive in that folder.
    2. The path ends with that of the file: it begins with folders of another machine.
    3. The path of one file ends with it: it leaves out the first folders.
    4. The most names at their ends are the same, if they are so for one file only.

    Rules 3 and 4 hold only if rule 1 leads to no file at all, and rule 4 only if rules 2 and 3 don't either: otherwise
    the path of a missing file would lead to another one of the same name. In all rules the case of the ending does not
    count, nor does the ending itself if a path has none, unless several files could be meant.

    Args:
        file_sets: The file sets in which files are looked up.
        table_set: The index of the file set that contains the table.
        folder: The folder of the table in its file set, with a slash at the end: "" or pets/.
        paths: The written paths.
    """

    def __init__(self, file_sets: Sequence[FileSet], table_set: int, folder: str, paths: Iterable[str]) -> None:
        self.table_set, self.folder = table_set, folder
        prefix = f"{file_sets[table_set].name}{folder}"
        roots = [(table_set, folder)]
        roots += [(k, "") for k, files in enumerate(file_sets) if k != table_set and files.name.startswith(prefix)]
        everywhere = [(k, "") for k in range(len(file_sets))]
        self.found: dict[str, list[File]] = {}
        written = {path: parts for path in dict.fromkeys(paths) if (parts := self._split(path))}
        has_stems = not all(is_image(parts[-1]) for parts in written.values())
        for scope in (roots, everywhere) if folder or len(roots) < len(file_sets) else (roots,):
            index = _FileIndex(file_sets, scope, has_stems)
            self.found = _match(written, index)
            if self.found:
                break

    def find(self, path: str) -> list[File]:
        """Return the file that a path leads to, or several if it is ambiguous."""
        return self.found.get(path, [])

    def points_out(self, path: str) -> bool:
        """Check whether a path leads out of the data by `..`."""
        parts = path.replace("\\", "/").split("/")
        return ".." in parts and posixpath.normpath(self.folder + "/".join(parts)).startswith("..")

    def _split(self, path: str) -> Parts:
        """Split a path into its names; () if it leads out of the data or is empty."""
        path = path if "/" in path else path.replace("\\", "/")
        path = DRIVE.sub("", path.replace("\\", "/"))
        if ".." in path.split("/"):
            path = posixpath.normpath(self.folder + path)
            if path.startswith(".."):
                return ()
            path = path.removeprefix(self.folder)
        return tuple(name for name in path.split("/") if name not in ("", "."))


class _FileIndex:
    """The files in some folders, by their paths and by the ends of these."""

    def __init__(self, file_sets: Sequence[FileSet], scope: Sequence[tuple[int, str]], has_stems: bool) -> None:
        files = collections.defaultdict(list)
        for number, folder in scope:
            for path in file_sets[number].paths:
                if path.startswith(folder):
                    *folders, name = _compose(path[len(folder) :]).split("/")
                    for key in _name_keys(name, has_stems):
                        files[*folders, key].append((number, path))
        self.files: dict[Parts, list[File]] = dict(files)

    def with_end_of(self, length: int) -> dict[Parts, list[File]]:
        """Return the files by the last `length` names of their paths."""
        ends: collections.defaultdict[Parts, list[File]] = collections.defaultdict(list)
        for parts, files in self.files.items():
            if len(parts) >= length:
                ends[parts[-length:]] += files
        return dict(ends)


def _name_keys(name: str, has_stems: bool) -> Iterator[str]:
    yield _normalize(name)
    if has_stems and is_image(name):
        yield _normalize(name.rpartition(".")[0])


def _normalize(name: str) -> str:
    """Return a name with its ending in lower case, and its accents composed."""
    stem, dot, ending = name.rpartition(".")
    name = f"{stem}{dot}{ending.lower()}" if stem else name
    return _compose(name)


def _match(written: dict[str, Parts], index: _FileIndex) -> dict[str, list[File]]:
    keys = {path: (*map(_compose, parts[:-1]), _normalize(parts[-1])) for path, parts in written.items()}
    found = {path: files for path, key in keys.items() if (files := index.files.get(key))}
    is_exact = bool(found)
    for path in keys.keys() - found.keys():
        key = keys[path]
        for start in range(1, len(key)):
            if files := index.files.get(key[start:]):
                found[path] = files
                break
    if not is_exact:
        rest = keys.keys() - found.keys()
        for length in sorted({len(keys[path]) for path in rest}, reverse=True):
            ends = index.with_end_of(length)
            found |= {path: ends[keys[path]] for path in rest if len(keys[path]) == length and keys[path] in ends}
    if not found:
        for length in range(max(map(len, keys.values()), default=0) - 1, 0, -1):
            ends = index.with_end_of(length)
            found = {path: ends[key[-length:]] for path, key in keys.items() if key[-length:] in ends}
            if found:
                break
        found = _drop_shared(found)
    return {path: _prefer_same_case(written[path][-1], files) for path, files in found.items()}


def _compose(name: str) -> str:
    """Return a name with each accent as one character with its letter, which macOS writes as two."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _drop_shared(found: dict[str, list[File]]) -> dict[str, list[File]]:
    """Drop the paths that lead to a file to which another path leads as well: at most one of them can be correct."""
    counts = collections.Counter(file for files in found.values() for file in files)
    return {path: files for path, files in found.items() if all(counts[file] == 1 for file in files)}


def _prefer_same_case(name: str, files: list[File]) -> list[File]:
    exact = [file for file in files if file[1].rpartition("/")[2] == name]
    return exact or files
