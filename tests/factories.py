"""Small images, folders and archives for tests of the data."""

import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
from PIL import Image

from convoy.data.data_lock import DataLock
from convoy.data.image_io import InvalidImageError
from convoy.data.packed.packed_dataset import PackedDataset
from convoy.data.sources.base import Sample
from convoy.data.sources.folder import read_folder

# The lock of a data set that has never been fetched.
EMPTY_LOCK = DataLock(classes=[], versions=[])


def make_png(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 3), value).save(file, "PNG")
    return file.getvalue()


PETS = {"cat/1.png": make_png(1), "cat/2.png": make_png(2), "dog/1.png": make_png(3)}
SPLIT_PETS = {
    "train/cat/1.png": make_png(1),
    "train/dog/2.png": make_png(2),
    "test/cat/3.png": make_png(3),
    "valid/dog/4.png": make_png(4),
}


def write(data: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, content in files.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return data


def make_zip(files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in files.items():
            file.writestr(zipfile.ZipInfo(name), content, compression)
    return archive.getvalue()


def make_tar(files: Mapping[str, bytes], mode: str = "w:gz") -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode=mode) as file:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


ARCHIVES: dict[str, Callable[[Mapping[str, bytes]], bytes]] = {
    "zip": make_zip,
    "ZIP": make_zip,
    "tar": lambda files: make_tar(files, "w"),
    "tar.gz": lambda files: make_tar(files, "w:gz"),
    "tgz": lambda files: make_tar(files, "w:gz"),
    "tar.bz2": lambda files: make_tar(files, "w:bz2"),
    "tar.xz": lambda files: make_tar(files, "w:xz"),
}


def read(data: Path) -> list[Sample]:
    """All members of the data, which are as many and of the classes that were promised."""
    source = read_folder(data)
    members = list(source.samples)
    assert len(members) == source.count
    assert {member.label for member in members} - {""} <= set(source.classes)
    return members


def read_rows(data: Path) -> list[tuple[str, str, str]]:
    """The path, label and split of all members, none of which has a fault."""
    members = read(data)
    assert list_faults(members) == []
    return [(member.path, member.label, member.split) for member in members]


def list_faults(members: list[Sample]) -> list[str]:
    return [f"{member.path} {member.content}" for member in members if isinstance(member.content, InvalidImageError)]


def read_content(member: Sample) -> bytes:
    """What a member holds, which is read here where it is only named."""
    assert isinstance(member.content, str | bytes), str(member.content)
    return Path(member.content).read_bytes() if isinstance(member.content, str) else member.content


def read_table(packed: PackedDataset) -> pd.DataFrame:
    """Load the complete table of a packed data set."""
    return pd.read_parquet(packed.table.file)
