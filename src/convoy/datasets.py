"""Data sets: labelled images from folders, archives or torchvision, and the packed form that all of them take."""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import lzma
import shutil
import socket
import tarfile
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import Field
from tqdm import tqdm

from convoy.config import ConvoyError, Count, schema
from convoy.images import BadImage, decode, plain

# as written -> as meant
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # what must lie in a class folder
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
# what systems leave in folders; so do names that begin with a dot
JUNK = ("__MACOSX", "Thumbs.db", "desktop.ini")


@schema
class TorchvisionSet:
    """A data set that torchvision knows."""

    name: str  # of the class in torchvision.datasets
    # split -> the arguments that select it; "all" for a set without splits
    splits: Annotated[dict[Literal["train", "val", "test", "all"], dict[str, Any]], Field(min_length=1)]


@schema
class Dataset:
    """Where labelled images come from."""

    name: str  # what reports call it
    longest_side: Count  # pixels; a larger image is reduced when it is decoded, which bounds the disk
    torchvision: TorchvisionSet | None = None  # None: the folders and archives in data/


@dataclasses.dataclass(frozen=True)
class Example:
    """One labelled image, or why it can't be used."""

    path: str  # where it came from, for messages and reports
    label: str  # the name of its class
    split: str  # train, val or test where the source says so, else ""
    pixels: np.ndarray | BadImage  # (H, W, 1 or 3) uint8


@dataclasses.dataclass(frozen=True)
class Source:
    """Labelled images that are about to be read, once."""

    classes: list[str]  # in the order of their labels
    count: int
    examples: Iterator[Example]


@dataclasses.dataclass(frozen=True)
class Packed:
    """A data set in two large files: the pixels of all images end to end, and a table with a row for each image."""

    name: str
    classes: list[str]
    table: pd.DataFrame  # path, label, split, sha256 (of shape and pixels), height, width, channels, offset
    pixels: np.ndarray  # one long memory-mapped row of uint8

    def images(self) -> Iterator[np.ndarray]:
        """Each row's image, (H, W, 1 or 3) uint8."""
        shapes = self.table[["height", "width", "channels", "offset"]]
        for height, width, channels, offset in shapes.itertuples(index=False):
            yield self.pixels[offset : offset + height * width * channels].reshape(height, width, channels)

    @classmethod
    def load(cls, folder: Path) -> "Packed":
        described = json.loads((folder / "dataset.json").read_text())
        table = pd.read_parquet(folder / "images.parquet")
        return cls(pixels=np.memmap(folder / "pixels.bin", np.uint8, mode="r"), table=table, **described)


def read(params: Dataset, data: Path, downloads: Path) -> Source:
    """The images of a data set that torchvision knows, fetched into `downloads`, or else those in `data`."""
    if params.torchvision is not None:
        return read_torchvision(params.torchvision, params.longest_side, downloads / params.name)
    return read_folder(data, params.longest_side)


def pack(source: Source, name: str, folder: Path) -> Packed:
    """Write a source into `folder` in the packed form.

    Raises ConvoyError that lists every image that can't be used; or if there are fewer than two classes.
    """
    if len(source.classes) < 2:
        raise ConvoyError(
            f"{name} has one class, {source.classes[0]!r}, and a classifier needs two or more: "
            "give each class a folder of its own"
        )
    rows, faults, offset = [], [], 0
    with (folder / "pixels.bin").open("wb") as file:
        for example in tqdm(source.examples, name, source.count, unit=" images", mininterval=1):
            if isinstance(example.pixels, BadImage):
                faults.append(f"{example.path} {example.pixels}")
                continue
            height, width, channels = example.pixels.shape
            data = example.pixels.tobytes()
            digest = hashlib.sha256(f"{height}x{width}x{channels}:".encode() + data).hexdigest()
            rows.append((example.path, example.label, example.split, digest, height, width, channels, offset))
            offset += file.write(data)
    if faults:
        listed = "\n  ".join(["", *faults]) if len(faults) > 1 else faults[0]
        raise ConvoyError(f"{len(faults)} of {source.count} images can't be used; mend or remove: {listed}")
    columns = ["path", "label", "split", "sha256", "height", "width", "channels", "offset"]
    pd.DataFrame(rows, columns=columns).to_parquet(folder / "images.parquet", index=False)
    (folder / "dataset.json").write_text(json.dumps({"name": name, "classes": source.classes}, indent=2) + "\n")
    return Packed.load(folder)


def read_folder(data: Path, longest_side: int) -> Source:
    """The images in `data`: `<class>/...` or `<train|val|test>/<class>/...`, in folders or in archives.

    Folders around all of it are looked through, so an archive may hold `digits/<class>/...`.
    Raises ConvoyError where there is no image, or one in no class folder, and for links and broken archives.
    """
    below = [data] if data.is_file() else sorted(data.rglob("*"))  # `data` itself may be one archive
    found = [file for file in below if not _is_junk(file.relative_to(data))]
    for link in (file for file in found if file.is_symlink()):
        raise ConvoyError(
            f"{_name(link, data)} is a link, which would bring in what is not in the data: put the file itself there"
        )
    files = [file for file in found if not file.is_dir()]
    archives = [file for file in files if file == data or file.name.lower().endswith(ARCHIVES)]
    loose = [file for file in files if file not in set(archives)]

    members = [Member(_name(file, data), file.relative_to(data), file.read_bytes) for file in loose]
    placed = _placed(members)
    with contextlib.ExitStack() as stack:
        for archive in archives:
            is_zip = archive.suffix.lower() == ".zip" or (archive == data and zipfile.is_zipfile(data))
            open_archive = _zip_members if is_zip else _tar_members
            placed += _placed(open_archive(archive, _name(archive, data), stack))
        if not placed:
            raise ConvoyError(
                f"{data.name}/ holds no images: put them there in one folder for each class, or in zip or tar archives"
                " of such folders"
            )
        for _, _, member in placed:
            if member.name.encode(errors="replace").decode() != member.name:
                raise ConvoyError(f"{member.name!a} has a name that is not UTF-8: rename it")
        return Source(
            classes=sorted({label for _, label, _ in placed}),
            count=len(placed),
            examples=_examples(placed, longest_side, stack.pop_all()),  # which closes the archives
        )


@dataclasses.dataclass(frozen=True)
class Member:
    """A file in a folder or an archive."""

    name: str  # for messages
    path: PurePath  # below the folder or archive
    read: Callable[[], bytes]


def _name(file: Path, data: Path) -> str:
    """As `data/...`, wherever the project stands."""
    return str(file.relative_to(data.parent))


def _is_junk(path: PurePath) -> bool:
    return any(part.startswith(".") or part in JUNK for part in path.parts)


def _zip_members(archive: Path, name: str, opened: contextlib.ExitStack) -> list[Member]:
    try:
        file = opened.enter_context(zipfile.ZipFile(archive))
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise ConvoyError(f"{name} is not a whole zip archive ({error}): put a sound copy there") from error
    return [
        Member(f"{name}:{entry.filename}", PurePosixPath(entry.filename), functools.partial(file.read, entry))
        for entry in file.infolist()
        if not entry.filename.endswith("/") and not _is_junk(PurePosixPath(entry.filename))
    ]


class _Entry(tarfile.TarInfo):
    """An entry of a tar archive. `tarfile` alone takes a broken one for the end, and loses all that come after it."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Entry":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the mark at the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _tar_members(archive: Path, name: str, opened: contextlib.ExitStack) -> list[Member]:
    try:
        file = opened.enter_context(tarfile.open(archive, tarinfo=_Entry))  # noqa: SIM115 - it is closed by `opened`
        entries = [entry for entry in file.getmembers() if not _is_junk(PurePosixPath(entry.name))]
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        said = " ".join(str(error).split())  # tarfile's word may have several lines
        raise ConvoyError(f"{name} is not a whole tar archive ({said}): put a sound copy there") from error
    for entry in entries:
        if not entry.isdir() and not entry.isfile():
            raise ConvoyError(f"{name}:{entry.name} is no plain file: put the file itself into the archive")
    return [
        Member(
            f"{name}:{entry.name}",
            PurePosixPath(entry.name),
            functools.partial(_extract, file, entry),
        )
        for entry in entries
        if entry.isfile()
    ]


def _extract(file: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    opened = file.extractfile(entry)
    return opened.read() if opened else b""


def _placed(members: list[Member], depth: int = 0) -> list[tuple[str, str, Member]]:
    """The split ("" where none is given), the class and the member, for the files of one folder or archive.

    `depth` counts the folders around all of them, which have been looked through.
    """
    members = _in_folders(members, depth)
    folders = {member.path.parts[depth] for member in members}
    if folders and {folder.lower() for folder in folders} <= SPLITS.keys():
        return [
            (SPLITS[member.path.parts[depth].lower()], member.path.parts[depth + 1], member)
            for member in _in_folders(members, depth + 1)
        ]
    within = [member for member in members if len(member.path.parts) == depth + 2]
    if len(folders) == 1 and len(within) < len(members) and not any(map(_is_image, within)):
        return _placed(members, depth + 1)
    return [("", member.path.parts[depth], member) for member in members]


def _in_folders(members: list[Member], depth: int) -> list[Member]:
    """Those that lie in a folder; what lies beside the folders (a licence, a script) must not be an image."""
    for member in members:
        if len(member.path.parts) < depth + 2 and _is_image(member):
            raise ConvoyError(f"{member.name} is in no class folder: move it into the folder of its class")
    return [member for member in members if len(member.path.parts) >= depth + 2]


def _is_image(member: Member) -> bool:
    return member.path.suffix.lower() in IMAGES


def _examples(
    placed: list[tuple[str, str, Member]], longest_side: int, opened: contextlib.ExitStack
) -> Iterator[Example]:
    with opened:
        for split, label, member in placed:
            yield Example(member.name, label, split, _decoded(member, longest_side))


def _decoded(member: Member, longest_side: int) -> np.ndarray | BadImage:
    try:
        return decode(member.read(), longest_side)
    except BadImage as fault:
        return fault
    except (OSError, RuntimeError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError) as error:
        return BadImage(f"can't be read: {error}")


def read_torchvision(params: TorchvisionSet, longest_side: int, folder: Path) -> Source:
    """A data set that torchvision knows, from `folder`, into which torchvision fetches it where it is not there yet.

    Raises ConvoyError for a name that torchvision does not know, and for a download that fails.
    """
    import torchvision

    known = [name for name in torchvision.datasets.__all__ if inspect.isclass(getattr(torchvision.datasets, name))]
    if params.name not in known:
        close = difflib.get_close_matches(params.name, known)
        raise ConvoyError(
            f"dataset.torchvision.name={params.name!r}: torchvision has no such set; it has {close or known}"
        )
    make = getattr(torchvision.datasets, params.name)
    try:
        parts = _parts(make, params, folder)
    except (TypeError, ValueError) as error:
        raise ConvoyError(f"dataset.torchvision.splits={params.splits} is not for {params.name}: {error}") from error
    except (OSError, RuntimeError):  # torchvision's words for a set that is not there, or not whole
        parts = _downloaded(make, params, folder)
    first = next(iter(parts.values()))
    classes = [str(name) for name in getattr(first, "classes", None) or _labels(parts.values())]
    return Source(
        classes=classes,
        count=sum(len(part) for part in parts.values()),
        examples=(
            Example(
                f"{params.name}/{split}/{row}",
                classes[int(label)],
                SPLITS.get(split, ""),
                _plain(image, longest_side),
            )
            for split, part in parts.items()
            for row, (image, label) in enumerate(part)
        ),
    )


def _plain(image: Image.Image, longest_side: int) -> np.ndarray | BadImage:
    try:
        return plain(image, longest_side)
    except BadImage as fault:
        return fault


def _labels(parts: Iterable[Any]) -> list[int]:
    """The labels 0 to K-1 of a set that names no classes."""
    return list(range(1 + max(int(label) for part in parts for _, label in part)))


def _parts(make: Callable, params: TorchvisionSet, folder: Path) -> dict[str, Any]:
    """Split -> its torchvision data set."""
    return {split: make(folder, download=False, **chosen) for split, chosen in params.splits.items()}


def _downloaded(make: Callable, params: TorchvisionSet, folder: Path) -> dict[str, Any]:
    """The parts of a set that torchvision fetches and checks; they appear in `folder` when all of them are whole."""
    arriving = folder.with_name(f"{folder.name}.arriving")
    shutil.rmtree(arriving, ignore_errors=True)
    if folder.exists():
        shutil.copytree(folder, arriving)  # what is there already need not come again
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # seconds; torchvision itself would wait for ever on a server that is silent
    try:
        for chosen in params.splits.values():
            make(arriving, download=True, **chosen)
    except Exception as error:  # of urllib, of an archive that is not whole, or torchvision's own
        shutil.rmtree(arriving, ignore_errors=True)
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConvoyError(
            f"{params.name} could not be fetched from {_address(error)}: {said}. Try again when that address answers,"
            f" or put the files that torchvision looks for into {folder}/"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    shutil.rmtree(folder, ignore_errors=True)
    arriving.rename(folder)
    return _parts(make, params, folder)


def _address(error: BaseException) -> str:
    """The address that a download was at when it failed: torchvision's errors do not always tell."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    addresses = [frame.f_locals["url"] for frame in frames if isinstance(frame.f_locals.get("url"), str)]
    return addresses[-1] if addresses else "its address"
