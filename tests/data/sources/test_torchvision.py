"""Torchvision data sets: downloaded from a local server as tiny archives in the original layout."""

import gc
import http.server
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image

from convoy.core.errors import ConvoyError
from convoy.data.cache import CacheDir
from convoy.data.decode_pool import decode_all
from convoy.data.image_io import FORMATS
from convoy.data.sources.base import Sample, Source, TorchvisionConfig
from convoy.data.sources.torchvision import read_torchvision
from torchvision_sets import SETS, Files, Tiny, load_config, make_labels, make_shades, make_tiny_set

every_set = pytest.mark.parametrize("name", SETS)


# The server


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
def unused_address(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where no one answers."""
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/"


# Fetching


def write(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read_files(folder: Path) -> Files:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def read(name: str, downloads: Path, **chosen: dict[str, Any]) -> Source:
    """The set of that name in conf/dataset/, or the splits `chosen` from it."""
    params, _ = load_config(name)
    params = TorchvisionConfig(name=params.name, splits=chosen) if chosen else params  # type: ignore[arg-type]
    return read_torchvision(params, downloads / name)


def read_shade(member: Sample) -> int:
    """The one value of all pixels."""
    assert isinstance(member.content, np.ndarray | str)
    if isinstance(member.content, np.ndarray):
        values = np.unique(member.content)
    else:
        with Image.open(member.content) as image:
            values = np.unique(np.asarray(image))
    assert len(values) == 1
    return int(values[0])


def assert_is_the_tiny_set(name: str, found: Tiny, downloads: Path) -> list[str]:
    """What is read has each image once, in its split and its class; returns the paths."""
    params, known = load_config(name)
    count = len(found.classes)
    source = read(name, downloads)
    members = list(source.samples)
    assert source.classes == list(found.classes)
    assert source.count == len(members) == count * len(params.splits)
    assert sorted((member.split, member.label, read_shade(member)) for member in members) == sorted(
        ("" if split == "all" else split, found.classes[label], value)
        for split in params.splits
        for label, value in zip(
            make_labels(count), make_shades("train" if split == "all" else split, count), strict=True
        )
    )
    if found.shape is None:  # each path leads to the file
        assert [str(downloads / member.path) for member in members] == [member.content for member in members]
        assert len({member.path for member in members}) == len(members)
    else:
        assert {np.shape(member.content) for member in members} == {found.shape}  # type: ignore[arg-type]
        assert [member.path for member in members] == [
            f"{known.__name__}/{split}/{number}" for split in params.splits for number in range(count)
        ]
    return [member.path for member in members]


@every_set
def test_dataset_is_downloaded_and_verified_only_once(
    name: str, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make_tiny_set(name, server.address, monkeypatch)
    server.files = found.files
    paths = assert_is_the_tiny_set(name, found, tmp_path)
    assert set(server.asked) == set(server.files)

    server.asked.clear()
    assert assert_is_the_tiny_set(name, found, tmp_path) == paths
    assert server.asked == []
    assert [folder.name for folder in tmp_path.iterdir()] == [name]


@every_set
def test_archives_may_be_placed_by_hand(
    name: str, tmp_path: Path, unused_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make_tiny_set(name, unused_address, monkeypatch)
    write(tmp_path / name, found.files)
    assert_is_the_tiny_set(name, found, tmp_path)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize(
    ("name", "fault"),
    [(name, "wrong") for name in SETS]
    + [(name, fault) for name in ("mnist", "cifar10") for fault in ("missing", "cut", "cut in a chunk", "refused")],
)
def test_failed_download_names_url_and_fix_and_leaves_no_file(
    name: str, fault: str, tmp_path: Path, server: Server, unused_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = unused_address if fault == "refused" else server.address
    server.files, server.fault = make_tiny_set(name, address, monkeypatch).files, fault
    with pytest.raises(ConvoyError) as refusal:
        read(name, tmp_path)
    message = str(refusal.value)
    assert message.startswith(f"{load_config(name)[1].__name__} could not be fetched from {address}")
    assert f"copy the original files that torchvision downloads into {tmp_path / name}/" in message
    assert list(tmp_path.iterdir()) == []

    found = make_tiny_set(name, server.address, monkeypatch)
    server.files, server.fault = found.files, ""  # when the address answers, it is as if nothing had happened
    assert_is_the_tiny_set(name, found, tmp_path)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("name", ["mnist", "flowers102", "oxford_pets"])
def test_download_failing_at_its_last_file_keeps_the_old_data(
    name: str, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make_tiny_set(name, server.address, monkeypatch)
    first, *between, last = found.files
    there = write(tmp_path / name, {first: found.files[first], "note.txt": b"mine"})
    before = read_files(there)
    server.files = {file: found.files[file] for file in between}
    with pytest.raises(ConvoyError, match=rf"404.*{there}/"):
        read(name, tmp_path)
    assert read_files(there) == before
    assert [folder.name for folder in tmp_path.iterdir()] == [name]

    server.files, server.asked = found.files, []
    assert_is_the_tiny_set(name, found, tmp_path)
    assert first not in server.asked
    assert last in server.asked
    assert read_files(there).items() >= before.items()


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_killed_download_keeps_files_of_the_user(
    renamed: int, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make_tiny_set("mnist", server.address, monkeypatch)
    server.files = found.files
    there = write(tmp_path / "mnist", {"mine/note.txt": b"mine"})
    rename, left = Path.rename, iter([*[True] * renamed, False])

    def rename_some(file: Path, target: Path) -> Path:
        if file == there:
            write(there, {"late.txt": b"came while the download went on"})
        if next(left):
            return rename(file, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", rename_some)
        read("mnist", tmp_path)
    assert_is_the_tiny_set("mnist", found, tmp_path)
    assert (
        read_files(there).items() >= {"mine/note.txt": b"mine", "late.txt": b"came while the download went on"}.items()
    )
    assert [folder.name for folder in tmp_path.iterdir()] == ["mnist"]


class Silent(torchvision.datasets.VisionDataset):
    """A set whose server says nothing, which shows by how long one is ready to wait."""

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        raise RuntimeError(f"waited {socket.getdefaulttimeout()}")


def test_silent_server_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "MNIST", Silent)
    before = socket.getdefaulttimeout()
    with pytest.raises(ConvoyError, match=r"MNIST could not be fetched from its address: waited \d+"):
        read("mnist", tmp_path)
    assert socket.getdefaulttimeout() == before


# What is refused


def test_unknown_dataset_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(
        ConvoyError, match=r"dataset\.torchvision\.name='MINST': torchvision has no such data set; did you mean MNIST\?"
    ):
        read_torchvision(TorchvisionConfig(name="MINST", splits={"train": {}}), tmp_path)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("mnist", {"trian": True}), ("emnist", {"split": "leters"}), ("food101", {"split": "val"}), ("eurosat", {"x": 1})],
)
def test_unsupported_arguments_are_refused_by_name(name: str, wrong: dict[str, Any], tmp_path: Path) -> None:
    key, known = next(iter(wrong)), load_config(name)[1].__name__
    with pytest.raises(ConvoyError, match=rf"dataset\.torchvision\.splits=.*{key}.* is not for {known}"):
        read(name, tmp_path, train=wrong)


def test_images_without_labels_are_refused(
    tmp_path: Path, unused_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "stl10", make_tiny_set("stl10", unused_address, monkeypatch).files)
    with pytest.raises(ConvoyError, match=r"splits=.*unlabeled.* selects images of STL10 without labels"):
        read("stl10", tmp_path, train={"split": "train+unlabeled"}, test={"split": "test"})


# Classes and images


def test_class_without_images_is_excluded(tmp_path: Path, unused_address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "emnist", make_tiny_set("emnist", unused_address, monkeypatch).files)
    source = read("emnist", tmp_path, train={"split": "letters", "train": True})
    assert source.classes == list("abcdefghijklmnopqrstuvwxyz")
    assert [member.label for member in source.samples] == list("defghijklmnopqrstuvwxyzabc")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_only_the_damaged_file_is_refused_by_name(
    tmp_path: Path, unused_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = write(tmp_path / "oxford_pets", make_tiny_set("oxford_pets", unused_address, monkeypatch).files)
    read("oxford_pets", tmp_path)
    images = there / "oxford-iiit-pet/images"
    cut, changed = images / "Bengal_101.jpg", images / "Bengal_201.jpg"
    cut.write_bytes(cut.read_bytes()[:-2])  # of which Pillow would say nothing
    changed.write_bytes(POSTSCRIPT)
    faults = {
        member.path: fault
        for members, batch in decode_all(read("oxford_pets", tmp_path), 512, CacheDir(tmp_path / "nothing", tmp_path))
        for member, fault in zip(members, batch.faults, strict=True)
    }
    assert len(faults) == 10
    assert {path: fault for path, fault in faults.items() if fault} == {
        str(cut.relative_to(tmp_path)): "can't be decoded: Premature end of JPEG file",
        str(changed.relative_to(tmp_path)): f"is not an image in {', '.join(FORMATS)}",
    }


@pytest.mark.parametrize("name", ["imagenette", "flowers102", "food101", "eurosat", "oxford_pets"])
def test_listing_samples_opens_no_file(
    name: str, tmp_path: Path, unused_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / name, make_tiny_set(name, unused_address, monkeypatch).files)
    read(name, tmp_path)
    files = [file for file in (tmp_path / name).rglob("*") if file.suffix.lower() in (".jpg", ".jpeg")]
    for file in files:
        file.write_bytes(POSTSCRIPT)  # which Pillow would hand to Ghostscript

    def opened(*_: object, **__: object) -> None:
        pytest.fail("Pillow was asked to open a file")

    monkeypatch.setattr(Image, "open", opened)
    assert {member.content for member in read(name, tmp_path).samples} == {str(file) for file in files}


def test_labels_that_do_not_match_the_classes_are_refused(
    tmp_path: Path, unused_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "oxford_pets", make_tiny_set("oxford_pets", unused_address, monkeypatch).files)
    with pytest.raises(ConvoyError, match=r"splits selects target_types=\['segmentation'\] of OxfordIIITPet"):
        read("oxford_pets", tmp_path, train={"split": "trainval", "target_types": "segmentation"})


class Nameless(torchvision.datasets.VisionDataset):
    """A set that names no classes, and whose splits do not show all of them."""

    opened = 0

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        super().__init__(root)
        self.of_images = [0, 1] if train else [0, 2]

    def __len__(self) -> int:
        return len(self.of_images)

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        type(self).opened += 1
        return Image.new("L" if row == 0 else "F", (2, 2)), self.of_images[row]


class Listed(Nameless):
    """The same, with the labels in a row."""

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        super().__init__(root, train, download)
        self.targets = self.of_images


@pytest.mark.parametrize(("known", "opened"), [(Nameless, 4), (Listed, 0)])
def test_classes_without_names_are_numbered(
    known: type[Nameless], opened: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets, "MNIST", known)
    monkeypatch.setattr(known, "opened", 0)
    source = read("mnist", tmp_path)
    assert source.classes == ["0", "1", "2"]
    assert known.opened == opened


class Annotated(Nameless):
    def __getitem__(self, row: int) -> tuple:
        return super().__getitem__(row)[0], {"annotation": {}}


def test_multi_label_dataset_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "MNIST", Annotated)
    with pytest.raises(ConvoyError, match=r"torchvision\.name='MNIST': its images do not have one class each"):
        read("mnist", tmp_path)


def test_images_are_opened_one_by_one_or_rejected_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets, "MNIST", Listed)
    monkeypatch.setattr(Listed, "opened", 0)
    found = []
    for number, member in enumerate(read("mnist", tmp_path).samples, start=1):
        assert Listed.opened == number
        found.append((member.path, member.label, member.split, str(member.content)[:12]))
    assert found == [
        ("MNIST/train/0", "0", "train", "[[[0]\n  [0]]"),
        ("MNIST/train/1", "1", "train", "[[[0]\n  [0]]"),
        ("MNIST/test/0", "0", "test", "[[[0]\n  [0]]"),
        ("MNIST/test/1", "2", "test", "[[[0]\n  [0]]"),
    ]
