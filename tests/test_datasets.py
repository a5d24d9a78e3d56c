"""Data sets: what lies in folders, archives and torchvision's addresses arrives whole, or is refused by name."""

import gc
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import socket
import struct
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torchvision
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from convoy import datasets
from convoy.config import ConvoyError, typed
from convoy.datasets import Dataset, Packed, TorchvisionSet, pack, read_folder, read_torchvision

ROOT = Path(__file__).parents[1]


def png(value: int = 0, size: tuple[int, int] = (4, 3), mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, value if mode == "L" else (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(data: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content)
    return data


def zipped(files: Mapping[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in files.items():
            file.writestr(zipfile.ZipInfo(name), content)
    return archive.getvalue()


def tarred(files: Mapping[str, bytes], mode: str = "w:gz") -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode=mode) as file:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def packed(data: Path) -> Packed:
    """The images in `data`, packed beside it."""
    folder = data.parent / "packed"
    folder.mkdir()
    return pack(read_folder(data, 64), "pets", folder)


def rows(found: Packed) -> list[tuple[str, str, str]]:
    return list(found.table[["path", "label", "split"]].itertuples(index=False, name=None))


PETS = {"cat/1.png": png(1), "cat/2.png": png(2), "dog/1.png": png(3)}
AS_ROWS = [("data/cat/1.png", "cat", ""), ("data/cat/2.png", "cat", ""), ("data/dog/1.png", "dog", "")]
SPLIT_PETS = {"train/cat/1.png": png(1), "train/dog/2.png": png(2), "test/cat/3.png": png(3), "valid/dog/4.png": png(4)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


# Folders


def test_a_folder_for_each_class_is_a_data_set(data: Path) -> None:
    found = packed(write(data, PETS))
    assert found.classes == ["cat", "dog"]
    assert rows(found) == AS_ROWS


def test_folders_inside_a_class_folder_belong_to_the_class(data: Path) -> None:
    found = packed(write(data, {"cat/a/b/1.png": png(), "cat/2.png": png(), "dog/c/3.png": png()}))
    assert [label for _, label, _ in rows(found)] == ["cat", "cat", "dog"]


def test_folders_around_all_classes_are_looked_through(data: Path) -> None:
    found = packed(write(data, {f"outer/inner/{name}": content for name, content in PETS.items()}))
    assert found.classes == ["cat", "dog"]


@pytest.mark.parametrize("outer", ["", "pets/"])
@pytest.mark.parametrize("style", [str.lower, str.capitalize])
def test_train_and_test_folders_keep_their_split(data: Path, outer: str, style: Callable[[str], str]) -> None:
    found = packed(write(data, {outer + style(name.split("/")[0]) + name[name.index("/") :]: content
                                for name, content in SPLIT_PETS.items()}))  # fmt: skip
    assert found.classes == ["cat", "dog"]
    assert {(label, split) for _, label, split in rows(found)} == {
        ("cat", "train"), ("dog", "train"), ("cat", "test"), ("dog", "val"),
    }  # fmt: skip


def test_an_archive_for_each_split_keeps_the_split(data: Path) -> None:
    for split in ("train", "test"):
        write(data, {f"{split}.zip": zipped({f"{split}/{name}": content for name, content in PETS.items()})})
    assert {(label, split) for _, label, split in rows(packed(data))} == {
        (label, split) for label in ("cat", "dog") for split in ("train", "test")
    }


def test_a_class_may_be_called_like_a_split(data: Path) -> None:
    found = packed(write(data, {"bus/1.png": png(), "train/1.png": png()}))
    assert rows(found) == [("data/bus/1.png", "bus", ""), ("data/train/1.png", "train", "")]


@pytest.mark.parametrize(
    "names", [("NA", "None", "nan"), ("007", "7", "7.0"), ("true", "no", "null"), ("é", "猫", " ")]
)
def test_the_names_of_classes_survive(data: Path, names: tuple[str, ...]) -> None:
    found = packed(write(data, {f"{name}/1.png": png(k) for k, name in enumerate(names)}))
    assert found.classes == sorted(names)
    assert found.table["label"].tolist() == sorted(names)
    assert Packed.load(data.parent / "packed").table.equals(found.table)


def test_what_systems_leave_in_folders_is_passed_over(data: Path) -> None:
    write(data, dict.fromkeys((".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "dog/desktop.ini"), b"junk"))
    write(data, {"__MACOSX/cat/._1.png": b"junk", "cat/._1.png": b"junk", ".git/config": b"junk"})
    assert rows(packed(write(data, PETS))) == AS_ROWS


def test_what_lies_beside_the_class_folders_may_be_anything_but_an_image(data: Path) -> None:
    extra = {"README.md": b"pets", "LICENSE": b"free", "make.py": b"print()"}
    found = packed(
        write(data, PETS | extra | {"more.zip": zipped({f"more/{n}": c for n, c in (PETS | extra).items()})})
    )
    assert rows(found) == AS_ROWS + [(f"data/more.zip:more/{path[5:]}", label, split) for path, label, split in AS_ROWS]


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({**PETS, "stray.jpg": png()}, "data/stray.jpg"),
        ({"1.png": png(), "2.png": png()}, "data/1.png"),
        ({**SPLIT_PETS, "train/stray.png": png()}, "data/train/stray.png"),
        ({"train/1.png": png(), "test/2.png": png()}, "data/test/2.png"),
        ({"pets.zip": zipped({**PETS, "stray.PNG": png()})}, "data/pets.zip:stray.PNG"),
        ({"cat.zip": zipped({"1.png": png(), "2.png": png()})}, "data/cat.zip:1.png"),
    ],
)
def test_an_image_in_no_class_folder_is_named(data: Path, files: dict[str, bytes], named: str) -> None:
    with pytest.raises(ConvoyError) as refusal:
        read_folder(write(data, files), 64)
    assert str(refusal.value) == f"{named} is in no class folder: move it into the folder of its class"


@pytest.mark.parametrize(
    "files", [{}, {"README.md": b"soon"}, {"empty.zip": zipped({})}, {"empty.tar": tarred({}, "w")}]
)
def test_data_without_images_are_refused(data: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(ConvoyError, match="data/ holds no images: put them there in one folder for each class"):
        read_folder(write(data, files), 64)


def test_a_missing_data_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match="data/ holds no images"):
        read_folder(tmp_path / "data", 64)


def test_a_single_class_is_refused_by_name(data: Path) -> None:
    with pytest.raises(ConvoyError, match="pets has one class, 'cat', and a classifier needs two or more"):
        packed(write(data, {"cat/1.png": png(), "cat/2.png": png()}))


@pytest.mark.parametrize("target", ["outside.png", "outside", "nowhere"])
def test_a_link_is_refused_whatever_it_leads_to(data: Path, target: str) -> None:
    write(data.parent, {"outside.png": png(), "outside/1.png": png()})
    (write(data, PETS) / "cat" / "link").symlink_to(data.parent / target)
    with pytest.raises(ConvoyError, match="data/cat/link is a link"):
        read_folder(data, 64)


@pytest.mark.parametrize("name", [b"caf\xe9/1.png", b"cat/caf\xe9.png"])
def test_a_name_that_is_not_utf8_is_refused(data: Path, name: bytes) -> None:
    with pytest.raises(ConvoyError, match=r"caf\\udce9.*not UTF-8: rename it"):
        read_folder(write(data, PETS | {os.fsdecode(name): png()}), 64)


def test_all_broken_images_are_listed_at_once(data: Path) -> None:
    write(data, PETS | {"cat/empty.png": b"", "dog/note.png": b"a note", "dog/half.png": png(size=(90, 90))[:60]})
    write(data, {"more.zip": zipped({"cat/cut.png": b"\x89PNG", "dog/5.png": png()})})
    with pytest.raises(ConvoyError) as refusal:
        packed(data)
    first, *listed = str(refusal.value).splitlines()
    assert first == "4 of 8 images can't be used; mend or remove: "
    assert [line.split()[0] for line in listed] == [
        "data/cat/empty.png", "data/dog/half.png", "data/dog/note.png", "data/more.zip:cat/cut.png",
    ]  # fmt: skip
    assert listed[0].endswith("is empty")


def test_a_file_that_must_not_be_read_is_a_broken_image(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConvoyError, match=r"3 of 3 images can't be used(?s:.*)Permission denied"):
        packed(write(data, PETS))


# Archives

WRITERS: dict[str, Callable[[Mapping[str, bytes]], bytes]] = {
    "zip": zipped,
    "ZIP": zipped,
    "tar": lambda files: tarred(files, "w"),
    "tar.gz": lambda files: tarred(files, "w:gz"),
    "tgz": lambda files: tarred(files, "w:gz"),
    "tar.bz2": lambda files: tarred(files, "w:bz2"),
    "tar.xz": lambda files: tarred(files, "w:xz"),
}
every_archive = pytest.mark.parametrize("kind", WRITERS)


@every_archive
@pytest.mark.parametrize("outer", ["", "pets/", "./"])
def test_an_archive_holds_what_a_folder_holds(data: Path, kind: str, outer: str) -> None:
    inside = {f"{outer}{name}": content for name, content in PETS.items()} | {f"{outer}__MACOSX/._1.png": b"junk"}
    found = packed(write(data, {f"pets.{kind}": WRITERS[kind](inside)}))
    assert rows(found) == [(f"data/pets.{kind}:{outer}{path[5:]}", label, "") for path, label, _ in AS_ROWS]
    assert [int(image[0, 0, 0]) for image in found.images()] == [1, 2, 3]


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_data_itself_may_be_one_archive(tmp_path: Path, kind: str) -> None:
    (tmp_path / "data").write_bytes(WRITERS[kind](SPLIT_PETS))
    assert sorted(rows(packed(tmp_path / "data"))) == [
        ("data:test/cat/3.png", "cat", "test"),
        ("data:train/cat/1.png", "cat", "train"),
        ("data:train/dog/2.png", "dog", "train"),
        ("data:valid/dog/4.png", "dog", "val"),
    ]


def test_data_that_is_one_file_and_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(png())
    with pytest.raises(ConvoyError, match="data is not a whole tar archive"):
        read_folder(tmp_path / "data", 64)


def test_archives_and_folders_are_one_data_set(data: Path) -> None:
    write(data, PETS | {"a.zip": zipped({"cat/3.png": png()}), "b.tar.gz": tarred({"bird/1.png": png()})})
    found = packed(data)
    assert found.classes == ["bird", "cat", "dog"]
    assert len(found.table) == 5


@every_archive
def test_half_an_archive_is_refused_by_name(data: Path, kind: str) -> None:
    noise = np.random.default_rng(0).bytes(5000)
    whole = WRITERS[kind](PETS | {"dog/9.png": noise})
    with pytest.raises(ConvoyError, match=rf"data/pets\.{kind} is not a whole (zip|tar) archive .*: put a sound copy"):
        read_folder(write(data, {f"pets.{kind}": whole[: len(whole) // 2]}), 64)


@every_archive
def test_a_file_that_is_no_archive_is_refused_by_name(data: Path, kind: str) -> None:
    with pytest.raises(ConvoyError, match=rf"data/pets\.{kind} is not a whole"):
        read_folder(write(data, PETS | {f"pets.{kind}": b"a note"}), 64)


@pytest.mark.parametrize("place", [600, 1024, 1100, 2600])
def test_a_tar_archive_with_a_broken_entry_does_not_lose_those_after_it(data: Path, place: int) -> None:
    # by itself Python's tarfile takes the first broken header for the end of the archive
    archive = bytearray(tarred(PETS, "w"))
    archive[place] ^= 0xFF
    try:
        found = packed(write(data, {"pets.tar": bytes(archive)}))
    except ConvoyError as refusal:
        assert "data/pets.tar" in str(refusal)
    else:
        assert len(found.table) == 3


def test_a_tar_archive_cut_between_two_entries_is_refused(data: Path) -> None:
    archive = tarred(PETS, "w")
    with pytest.raises(ConvoyError, match=r"data/pets\.tar is not a whole tar archive"):
        read_folder(write(data, {"pets.tar": archive[:1024]}), 64)


@settings(max_examples=300)
@given(
    kind=st.sampled_from(sorted(WRITERS)),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_an_archive_with_wrong_bytes_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, changes: list[tuple[float, int]]
) -> None:
    archive = bytearray(WRITERS[kind](PETS))
    for place, byte in changes:
        archive[int(place * len(archive))] = byte
    data = write(tmp_path_factory.getbasetemp() / "data", {f"pets.{kind}": bytes(archive)})
    try:
        examples = list(read_folder(data, 64).examples)
    except ConvoyError as refusal:
        assert f"pets.{kind}" in str(refusal) or "holds no images" in str(refusal)
    else:
        assert all(isinstance(example.pixels, np.ndarray | Exception) for example in examples)
    finally:
        shutil.rmtree(data)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_link_in_an_archive_is_refused(data: Path, kind: bytes) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as file:
        link = tarfile.TarInfo("cat/link.png")
        link.type, link.linkname = kind, "/etc/passwd"
        file.addfile(link)
    with pytest.raises(ConvoyError, match=r"data/pets\.tar:cat/link\.png is no plain file"):
        read_folder(write(data, {"pets.tar": archive.getvalue()}), 64)


def test_an_encrypted_archive_is_refused_image_by_image(data: Path) -> None:
    archive = bytearray(zipped(PETS))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = archive.find(mark)
        while start >= 0:
            archive[start + place] |= 1  # the bit that says encrypted
            start = archive.find(mark, start + 1)
    with pytest.raises(ConvoyError, match=r"3 of 3 images can't be used(?s:.*)encrypted"):
        packed(write(data, {"pets.zip": bytes(archive)}))


# The packed form


def test_images_come_back_as_they_were_packed(data: Path) -> None:
    grey, colour = np.arange(35, dtype=np.uint8).reshape(5, 7), np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    for name, pixels in (("cat/grey.png", grey), ("dog/colour.png", colour)):
        (data / name).parent.mkdir()
        Image.fromarray(pixels).save(data / name)
    packed(data)
    first, second = Packed.load(data.parent / "packed").images()
    assert np.array_equal(first, grey[:, :, None])
    assert np.array_equal(second, colour)


def test_only_equal_images_have_equal_hashes(data: Path) -> None:
    sizes = {"a": (4, 3), "copy": (4, 3), "turned": (3, 4), "grown": (4, 4)}
    found = packed(write(data, {f"{name}/1.png": png(9, size) for name, size in sizes.items()}))
    hashes = dict(zip(found.table["label"], found.table["sha256"], strict=True))
    assert hashes["a"] == hashes["copy"]
    assert len(set(hashes.values())) == 3


def test_the_packed_bytes_do_not_depend_on_where_the_project_stands(tmp_path: Path) -> None:
    def bytes_at(project: Path) -> dict[str, bytes]:
        packed(write(project / "data", PETS | {"more.zip": zipped(SPLIT_PETS)}))
        return {file.name: file.read_bytes() for file in (project / "packed").iterdir()}

    here, there = bytes_at(tmp_path / "here"), bytes_at(tmp_path / "some where" / "else")
    assert here == there
    assert sorted(here) == ["dataset.json", "images.parquet", "pixels.bin"]


def test_large_images_are_reduced_when_they_are_read(data: Path) -> None:
    found = packed(write(data, PETS | {"dog/large.png": png(size=(640, 320))}))
    assert found.table[["height", "width"]].to_numpy().tolist()[-1] == [32, 64]


# What torchvision knows: its own code fetches and checks tiny archives in the true layout, from a server here

TORCHVISION_SETS = {
    file.stem: content
    for file in sorted((ROOT / "conf/dataset").glob("*.yaml"))
    if "torchvision" in (content := yaml.safe_load(file.read_text()))
}
every_set = pytest.mark.parametrize("name", TORCHVISION_SETS)
Files = dict[str, bytes]  # name -> content
PER_SPLIT = {"train": 20, "test": 10}  # images, each with its number as the value of all pixels


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def labels_of(split: str, classes: int) -> list[int]:
    return [number % classes for number in range(PER_SPLIT[split])]


def mnist(known: type, monkeypatch: pytest.MonkeyPatch) -> Files:
    """The four files of MNIST and its relatives: magic number, sizes, then the bytes, and gzip around them."""
    files = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        count = PER_SPLIT[split]
        pixels = b"".join(bytes([number]) * 28 * 28 for number in range(count))
        files[f"{prefix}-images-idx3-ubyte.gz"] = struct.pack(">IIII", 0x803, count, 28, 28) + pixels
        files[f"{prefix}-labels-idx1-ubyte.gz"] = struct.pack(">II", 0x801, count) + bytes(labels_of(split, 10))
    files = {name: gzip.compress(content) for name, content in files.items()}
    monkeypatch.setattr(known, "resources", [(name, md5(files[name])) for name, _ in known.resources])
    return files


def cifar(known: type, monkeypatch: pytest.MonkeyPatch) -> Files:
    """The pickled batches of CIFAR, in a folder in a tar.gz."""
    classes = [f"class {number}" for number in range(100 if known is torchvision.datasets.CIFAR100 else 10)]
    members = {known.meta["filename"]: pickle.dumps({known.meta["key"]: classes})}
    for split, names in (("train", known.train_list), ("test", known.test_list)):
        parts = np.array_split(np.arange(PER_SPLIT[split]), len(names))
        for (name, _), numbers in zip(names, parts, strict=True):
            pixels = np.repeat(numbers.astype(np.uint8)[:, None], 3072, axis=1)
            labels = [labels_of(split, len(classes))[number] for number in numbers]
            key = "fine_labels" if len(classes) == 100 else "labels"
            members[name] = pickle.dumps({"data": pixels, key: labels})
        checked = [[name, md5(members[name])] for name, _ in names]
        monkeypatch.setattr(known, f"{split}_list", checked)
    monkeypatch.setattr(known, "meta", known.meta | {"md5": md5(members[known.meta["filename"]])})
    archive = tarred({f"{known.base_folder}/{name}": content for name, content in members.items()})
    monkeypatch.setattr(known, "tgz_md5", md5(archive))
    return {known.filename: archive}


LAYOUTS = {torchvision.datasets.MNIST: mnist, torchvision.datasets.CIFAR10: cifar}


def known_set(name: str) -> tuple[Dataset, type]:
    params = typed(Dataset, TORCHVISION_SETS[name], "dataset")
    assert params.torchvision is not None
    return params, getattr(torchvision.datasets, params.torchvision.name)


def tiny(name: str, monkeypatch: pytest.MonkeyPatch) -> Files:
    """The files of a tiny set in the layout of `name`, whose checksums torchvision then holds for the true ones."""
    _, known = known_set(name)
    layouts = [make for parent, make in LAYOUTS.items() if issubclass(known, parent)]
    assert layouts, f"{name}: write down its layout in tests/test_datasets.py, beside mnist and cifar"
    return layouts[0](known, monkeypatch)


def move_to(address: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torchvision look for the set `name` at `address`."""
    _, known = known_set(name)
    if hasattr(known, "mirrors"):
        monkeypatch.setattr(known, "mirrors", [address])
    else:
        monkeypatch.setattr(known, "url", address + known.filename)


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` from memory, whole or as `fault` says, and counts what it is asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: Files = {}
        self.fault = ""
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Answer(http.server.BaseHTTPRequestHandler):
    """One answer of the server."""

    server: Server

    def do_GET(self) -> None:
        content = self.server.files.get(self.path[1:])
        self.server.asked.append(self.path[1:])
        if content is None or self.server.fault == "missing":
            self.send_error(404)
            return
        self.send_response(200)
        if self.server.fault == "cut in a chunk":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(f"{len(content):x}\r\n".encode() + content[: len(content) // 2])
            return
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.server.fault == "wrong":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.wfile.write(content[: len(content) // 2] if self.server.fault == "cut" else content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.shutdown()
        thread.join()
    gc.collect()  # torchvision leaves a refused answer open, which must not trouble a later test


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where no one answers."""
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/"


def contents(folder: Path) -> Files:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def pack_set(name: str, tmp_path: Path) -> Packed:
    params, _ = known_set(name)
    source = datasets.read(params, tmp_path / "data", tmp_path / "downloads")
    (tmp_path / "packed").mkdir(exist_ok=True)
    return pack(source, params.name, tmp_path / "packed")


def assert_is_the_tiny_set(name: str, found: Packed) -> None:
    params, known = known_set(name)
    assert params.torchvision is not None
    classes = known.classes if hasattr(known, "classes") else found.classes
    expected = [
        (f"{params.torchvision.name}/{split}/{number}", str(classes[label]), split, number)
        for split in ("train", "test")
        for number, label in enumerate(labels_of(split, len(classes)))
    ]
    values = [{*image.ravel().tolist()} for image in found.images()]
    assert found.classes == list(classes)
    assert rows(found) == [row[:3] for row in expected]
    assert values == [{row[3]} for row in expected]
    shape = (28, 28, 1) if hasattr(known, "mirrors") else (32, 32, 3)
    assert {image.shape for image in found.images()} == {shape}


@every_set
def test_a_set_that_torchvision_knows_is_fetched_checked_and_packed_and_not_fetched_again(
    name: str, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = tiny(name, monkeypatch)
    move_to(server.address, name, monkeypatch)
    assert_is_the_tiny_set(name, pack_set(name, tmp_path))
    assert set(server.asked) == set(server.files)

    server.asked.clear()
    assert_is_the_tiny_set(name, pack_set(name, tmp_path))
    assert server.asked == []
    assert [folder.name for folder in (tmp_path / "downloads").iterdir()] == [name]


@every_set
def test_the_archives_of_a_set_may_be_put_there_by_hand(
    name: str, tmp_path: Path, nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tiny(name, monkeypatch)
    move_to(nowhere, name, monkeypatch)
    params, known = known_set(name)
    within = f"{known.__name__}/raw/" if hasattr(known, "mirrors") else ""
    write(tmp_path / "downloads" / params.name, {within + file: content for file, content in files.items()})
    assert_is_the_tiny_set(name, pack_set(name, tmp_path))


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("fault", ["missing", "wrong", "cut", "cut in a chunk", "refused"])
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_failed_download_names_the_set_the_address_and_the_mend_and_leaves_nothing_behind(
    name: str, fault: str, tmp_path: Path, server: Server, nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files, server.fault = tiny(name, monkeypatch), fault
    address = nowhere if fault == "refused" else server.address
    move_to(address, name, monkeypatch)
    with pytest.raises(ConvoyError) as refusal:
        pack_set(name, tmp_path)
    message = str(refusal.value)
    assert message.startswith(f"{known_set(name)[1].__name__} could not be fetched from {address}")
    assert f"put the files that torchvision looks for into {tmp_path / 'downloads' / name}/" in message
    assert list((tmp_path / "downloads").glob("*")) == []

    server.fault = ""  # and when the address answers, it is as if nothing had happened
    move_to(server.address, name, monkeypatch)
    assert_is_the_tiny_set(name, pack_set(name, tmp_path))


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_download_that_fails_at_the_last_file_keeps_what_was_there(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = tiny("mnist", monkeypatch)
    move_to(server.address, "mnist", monkeypatch)
    first, second, third, _ = files
    there = write(tmp_path / "downloads" / "mnist", {f"MNIST/raw/{first}": files[first], "note.txt": b"mine"})
    before = contents(there)
    server.files = {name: files[name] for name in (second, third)}
    with pytest.raises(ConvoyError, match="404"):
        pack_set("mnist", tmp_path)
    assert contents(there) == before
    assert [folder.name for folder in there.parent.iterdir()] == ["mnist"]

    server.files, server.asked = files, []
    assert_is_the_tiny_set("mnist", pack_set("mnist", tmp_path))
    assert first not in server.asked
    assert contents(there).items() >= before.items()


def test_a_name_that_torchvision_does_not_know_is_refused_with_one_like_it(tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match=r"dataset\.torchvision\.name='MINST': torchvision has no such set.*'MNIST'"):
        read_torchvision(TorchvisionSet(name="MINST", splits={"train": {}}), 64, tmp_path)


def test_arguments_that_a_set_does_not_take_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match=r"dataset\.torchvision\.splits=.*trian.* is not for MNIST"):
        read_torchvision(TorchvisionSet(name="MNIST", splits={"train": {"trian": True}}), 64, tmp_path)
    with pytest.raises(ConvoyError, match=r"dataset\.torchvision\.splits=.*leters.* is not for EMNIST"):
        read_torchvision(TorchvisionSet(name="EMNIST", splits={"train": {"split": "leters"}}), 64, tmp_path)


class Nameless(torchvision.datasets.VisionDataset):
    """A set that names no classes, and whose splits do not show all of them."""

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        super().__init__(root)
        self.labels = [0, 1] if train else [0, 2]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        if row >= len(self):
            raise IndexError
        return Image.new("L" if row == 0 else "F", (2, 2)), self.labels[row]


def test_a_set_without_names_has_numbers_for_classes_and_its_broken_images_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets, "MNIST", Nameless)
    params = TorchvisionSet(name="MNIST", splits={"train": {"train": True}, "test": {"train": False}})
    source = read_torchvision(params, 64, tmp_path)
    assert source.classes == ["0", "1", "2"]
    with pytest.raises(ConvoyError, match=r"2 of 4 images can't be used(?s:.*)MNIST/train/1 (?s:.*)MNIST/test/1 "):
        pack(source, "nameless", tmp_path)


def test_the_table_and_the_description_are_plain_files_that_others_can_read(data: Path) -> None:
    packed(write(data, PETS))
    folder = data.parent / "packed"
    assert json.loads((folder / "dataset.json").read_text()) == {"name": "pets", "classes": ["cat", "dog"]}
    table = pd.read_parquet(folder / "images.parquet")
    columns = ["path", "label", "split", "sha256", "height", "width", "channels", "offset"]
    assert table.columns.tolist() == columns
    assert (folder / "pixels.bin").stat().st_size == (table["height"] * table["width"] * table["channels"]).sum()
