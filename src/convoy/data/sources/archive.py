"""Archives: files in a zip or tar archive, read one after the other without unpacking the archive to disk."""

import contextlib
import functools
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

from convoy.core.errors import ConvoyError, describe_error
from convoy.data.decode_worker import MAX_FILE_BYTES, TOO_LARGE
from convoy.data.image_io import InvalidImageError
from convoy.data.sources.base import FileContent
from convoy.data.sources.file_listing import NO_LIMIT, FileSet, ListingLimit, PackedPaths, is_junk, normalize_path

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
# An archive that unpacks to more than both of these limits is rejected as a decompression bomb.
MAX_UNPACKED_BYTES = 1 << 30
MAX_RATIO = 1000  # times the size of the archive; deflate reaches at most 1032
# The maximum size of a header, such as that of a long name, in a tar archive.
MAX_HEADER_BYTES = 1 << 20
# The flag of a zip entry that says that its name is in UTF-8.
UTF_8_FLAG = 0x800
# Small, because bzip2 and LZMA can expand this many bytes to up to 90 MB.
CHUNK_BYTES = 4096

# The errors that Python's archive modules raise for broken data.
ARCHIVE_ERRORS = (
    OSError, RuntimeError, EOFError, ValueError, OverflowError, struct.error, zlib.error, lzma.LZMAError,
    zipfile.BadZipFile, tarfile.TarError,
)  # fmt: skip


def open_archive(archive: Path, name: str, limit: ListingLimit = NO_LIMIT) -> FileSet:
    """List the files in an archive, in the order of the archive.

    Args:
        archive: The path of a zip or tar archive.
        name: The name of the archive in messages.
        limit: Of a tar archive, which has no list of its files, only the entries within this limit are read.

    Returns:
        The files, without junk. Their content is read only when requested.

    Raises:
        ConvoyError: If the archive is incomplete or broken, or possibly malicious: if it has paths that point out of
            it, links, or far more data than images would have.
    """
    with archive.open("rb") as file:
        is_zip = archive.suffix.lower() == ".zip" or file.read(4) in (b"PK\3\4", b"PK\5\6")
    kind = "zip" if is_zip else "tar"
    try:
        return _list_zip(archive, name) if is_zip else _list_tar(archive, name, limit)
    except ARCHIVE_ERRORS as error:
        raise ConvoyError(
            f"{name} is not a complete {kind} archive ({describe_error(error)}): replace it with an intact copy"
        ) from error


def _list_zip(archive: Path, name: str) -> FileSet:
    with zipfile.ZipFile(archive) as file:
        entries = file.infolist()
    _reject_bomb(archive, name, sum(entry.file_size for entry in entries))
    paths, rows, uncertain = [], array("L"), ""
    for row, entry in enumerate(entries):
        entry_name, is_certain = _decode_name(entry)
        # Some archives from Windows use backslashes as separators.
        entry_name = entry_name.replace("\\", "/")
        path = _normalize_entry(name, entry_name)
        if is_junk(path):
            continue
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _not_a_file_error(name, path)
        if path and not entry_name.endswith("/"):
            paths.append(path)
            rows.append(row)
            uncertain = uncertain or ("" if is_certain else path)
    note = f"{name} does not declare the encoding of {uncertain}: if this looks wrong, pack it again with UTF-8 names"
    return FileSet(
        f"{name}:", PackedPaths(paths), functools.partial(_open_zip, archive, rows), [note] if uncertain else []
    )


def _decode_name(entry: zipfile.ZipInfo) -> tuple[str, bool]:
    """Return the intended name of an entry, and whether its encoding is certain.

    Some tools, including those of macOS, write UTF-8 without setting the flag. Others use the encoding of their
    system, such as GBK, which `zipfile` decodes as code page 437.
    """
    if entry.flag_bits & UTF_8_FLAG or entry.filename.isascii():
        return entry.filename, True
    try:
        return entry.filename.encode("cp437").decode(), True
    except UnicodeError:
        return entry.filename, False


@contextlib.contextmanager
def _open_zip(archive: Path, rows: array) -> Iterator[Callable[[int, str], FileContent]]:
    with zipfile.ZipFile(archive) as file:
        entries = file.infolist()
        yield lambda index, _: _catch_errors(lambda: _read_zip_entry(file, entries[rows[index]]))


def _read_zip_entry(file: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    chunks, size = [], 0
    with file.open(entry) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_FILE_BYTES:
                raise InvalidImageError(TOO_LARGE)
    return b"".join(chunks)


class _Entry(tarfile.TarInfo):
    """An entry of a tar archive that raises an error if its header is broken or too large.

    `tarfile` by itself takes a broken header for the end of the archive and loses all entries after it, and it reads a
    long name of whatever size the header declares.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Entry":
        entry = super().frombuf(buf, encoding, errors)
        is_header = entry.type not in (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE)
        if entry.size < 0 or (is_header and entry.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of {entry.size} bytes")
        return entry

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Entry":
        try:
            return super().fromtarfile(archive)
        # This is the regular end of the archive.
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _list_tar(archive: Path, name: str, limit: ListingLimit) -> FileSet:
    paths, offsets, sizes, position = [], array("q"), array("q"), 0
    with tarfile.open(archive, tarinfo=_Entry) as file:
        for entry in limit.take(iter(file.next, None)):
            # Otherwise `members` would keep every entry in memory.
            file.members.clear()  # type: ignore[attr-defined]
            if file.offset <= position:
                raise tarfile.ReadError("an entry of negative size")
            position = file.offset
            _reject_bomb(archive, name, position)
            path = _normalize_entry(name, entry.name)
            if is_junk(path):
                continue
            if not (entry.isdir() or entry.isreg()) or entry.issparse():
                raise _not_a_file_error(name, path)
            if not entry.isdir():
                paths.append(path)
                offsets.append(entry.offset_data)
                sizes.append(entry.size)
        # Compressed data is read to its end, because the checksum is there.
        for _ in limit.take(iter(lambda: file.fileobj.read(1 << 16), b"")):  # type: ignore[union-attr]
            _reject_bomb(archive, name, file.fileobj.tell())  # type: ignore[union-attr]
    return FileSet(f"{name}:", PackedPaths(paths), functools.partial(_open_tar, archive, offsets, sizes))


@contextlib.contextmanager
def _open_tar(archive: Path, offsets: array, sizes: array) -> Iterator[Callable[[int, str], FileContent]]:
    with tarfile.open(archive, tarinfo=_Entry) as file:
        yield lambda index, _: _catch_errors(lambda: _read_tar_entry(file, offsets[index], sizes[index]))


def _read_tar_entry(file: tarfile.TarFile, offset: int, size: int) -> bytes:
    """Read the content of an entry by its offset; `file` keeps no entries, because there may be very many.

    Reading only moves forward: a step backward in a .gz file would decompress it again from the start.
    """
    if size > MAX_FILE_BYTES:
        raise InvalidImageError(TOO_LARGE)
    entry = tarfile.TarInfo()
    entry.offset_data, entry.size = offset, size
    content = file.extractfile(entry)
    assert content is not None
    with content:
        return content.read()


def _catch_errors(content: Callable[[], bytes]) -> bytes | InvalidImageError:
    try:
        return content()
    except InvalidImageError as fault:
        return fault
    except ARCHIVE_ERRORS as error:
        return InvalidImageError(f"can't be read: {describe_error(error)}")


def _normalize_entry(name: str, entry: str) -> str:
    path = normalize_path(entry)
    if path is None:
        raise ConvoyError(
            f"{name}:{entry} points out of the archive, which may be an attack: extract the images and pack them again"
        )
    return path


def _not_a_file_error(name: str, path: str) -> ConvoyError:
    return ConvoyError(f"{name}:{path} is not a regular file: put the file itself into the archive")


def _reject_bomb(archive: Path, name: str, unpacked: int) -> None:
    size = archive.stat().st_size
    if unpacked > max(MAX_UNPACKED_BYTES, MAX_RATIO * size):
        raise ConvoyError(
            f"{name} has {size} bytes and would unpack to {unpacked} or more, unlike an archive of"
            " images: pack only the images"
        )
