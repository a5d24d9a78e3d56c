"""Tiny data sets for tests, in the layouts in which torchvision downloads the real ones."""

import dataclasses
import gzip
import hashlib
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import scipy.io
import torchvision
import yaml
from PIL import Image

from convoy.core.config import validate
from convoy.data.sources.base import TorchvisionConfig
from small_project import ROOT

SETS = {
    file.stem: content["torchvision"]
    for file in sorted((ROOT / "conf/dataset").glob("*.yaml"))
    if "torchvision" in (content := yaml.safe_load(file.read_text()))
}
Files = dict[str, bytes]  # where torchvision puts it, below the folder of the set -> content


# In every split there is one image of each class, of one shade of grey.


@dataclasses.dataclass(frozen=True)
class Tiny:
    """What a server has of a set, and what comes out of it."""

    files: Files
    classes: Sequence[str]
    shape: tuple[int, int, int] | None = None  # of an image; None where it is a file, not decoded


def make_shades(split: str, count: int) -> list[int]:
    """Of the images of a split; no two splits have one in common at the same place, nor does a split have one twice."""
    return {
        "train": list(range(count)),
        "val": list(range(100, 100 + count)),
        "test": list(range(255, 255 - count, -1)),
    }[split]


def make_labels(count: int) -> list[int]:
    """Of the images of a split, in another order than that of the images."""
    return [(number + 3) % count for number in range(count)]


def compute_md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def make_zip(files: Mapping[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return archive.getvalue()


def make_tar(files: Mapping[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as file:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def make_jpeg(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (shade, shade, shade)).save(file, "JPEG", quality=100)
    return file.getvalue()


def make_matlab_file(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, arrays)  # format 5
    return file.getvalue()


def make_idx_images(of_shades: Sequence[int]) -> bytes:
    """Magic number, sizes, then the bytes, and gzip around them."""
    pixels = b"".join(bytes([shade]) * 28 * 28 for shade in of_shades)
    return gzip.compress(struct.pack(">IIII", 0x803, len(of_shades), 28, 28) + pixels)


def make_idx_labels(of_labels: Sequence[int]) -> bytes:
    return gzip.compress(struct.pack(">II", 0x801, len(of_labels)) + bytes(of_labels))


def mnist(known: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """MNIST and its relatives: four files."""
    folder = f"{known.__name__}/raw/"
    files = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        files[f"{prefix}-images-idx3-ubyte.gz"] = make_idx_images(make_shades(split, 10))
        files[f"{prefix}-labels-idx1-ubyte.gz"] = make_idx_labels(make_labels(10))
    monkeypatch.setattr(known, "mirrors", [address + folder])
    monkeypatch.setattr(known, "resources", [(name, compute_md5(files[name])) for name, _ in known.resources])
    return Tiny({folder + name: content for name, content in files.items()}, known.classes, (28, 28, 1))


def emnist(known: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """One zip archive with the files of all six ways to make classes of the characters; "letters" counts from 1."""
    members = {}
    for way, classes in known.classes_split_dict.items():
        first = classes.count("N/A")
        numbers = [first + label for label in make_labels(len(classes) - first)]
        members[f"emnist-{way}-mapping.txt"] = "".join(f"{n} {ord(classes[n][0])}\n" for n in sorted(numbers)).encode()
        for split in ("train", "test"):
            members[f"emnist-{way}-{split}-images-idx3-ubyte.gz"] = make_idx_images(make_shades(split, len(numbers)))
            members[f"emnist-{way}-{split}-labels-idx1-ubyte.gz"] = make_idx_labels(numbers)
    archive = make_zip({f"gzip/{name}": content for name, content in members.items()})
    monkeypatch.setattr(known, "url", f"{address}EMNIST/raw/gzip.zip")
    monkeypatch.setattr(known, "md5", compute_md5(archive))
    return Tiny({"EMNIST/raw/gzip.zip": archive}, known.classes_split_dict["balanced"], (28, 28, 1))


def cifar(known: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """The pickled batches of CIFAR, in a folder in a tar.gz."""
    count, key = (100, "fine_labels") if known is torchvision.datasets.CIFAR100 else (10, "labels")
    classes = [f"class {number}" for number in range(count)]
    members = {known.meta["filename"]: pickle.dumps({known.meta["key"]: classes})}
    for split, names in (("train", known.train_list), ("test", known.test_list)):
        parts = np.array_split(np.arange(count), len(names))
        for (name, _), numbers in zip(names, parts, strict=True):
            pixels = np.repeat(np.array(make_shades(split, count), np.uint8)[numbers, None], 3072, axis=1)
            members[name] = pickle.dumps({"data": pixels, key: [make_labels(count)[number] for number in numbers]})
        monkeypatch.setattr(known, f"{split}_list", [[name, compute_md5(members[name])] for name, _ in names])
    archive = make_tar({f"{known.base_folder}/{name}": content for name, content in members.items()})
    monkeypatch.setattr(known, "meta", known.meta | {"md5": compute_md5(members[known.meta["filename"]])})
    monkeypatch.setattr(known, "url", address + known.filename)
    monkeypatch.setattr(known, "tgz_md5", compute_md5(archive))
    return Tiny({known.filename: archive}, classes, (32, 32, 3))


def svhn(known: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """MATLAB files with the images along the last axis, and 10 for the digit 0."""
    files = {}
    for split in ("train", "test"):
        pixels = np.broadcast_to(np.array(make_shades(split, 10), np.uint8), (32, 32, 3, 10))
        digits = np.array([[label or 10] for label in make_labels(10)], np.uint8)
        files[f"{split}_32x32.mat"] = make_matlab_file(X=pixels, y=digits)
    listed = {name.split("_")[0]: [address + name, name, compute_md5(content)] for name, content in files.items()}
    monkeypatch.setattr(known, "split_list", known.split_list | listed)
    return Tiny(files, list("0123456789"), (32, 32, 3))


def stl10(known: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Bare bytes, labels from 1, and images without labels."""
    classes = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    members = {
        "class_names.txt": "\n".join(classes).encode(),
        "fold_indices.txt": b"0 1 2 \n" * 10,
        "unlabeled_X.bin": bytes(3 * 96 * 96),
    }
    for split in ("train", "test"):
        members[f"{split}_X.bin"] = b"".join(bytes([shade]) * 3 * 96 * 96 for shade in make_shades(split, 10))
        members[f"{split}_y.bin"] = bytes(label + 1 for label in make_labels(10))
    archive = make_tar({f"stl10_binary/{name}": content for name, content in members.items()})
    for names in ("train_list", "test_list"):
        monkeypatch.setattr(known, names, [[name, compute_md5(members[name])] for name, _ in getattr(known, names)])
    monkeypatch.setattr(known, "url", f"{address}stl10_binary.tar.gz")
    monkeypatch.setattr(known, "tgz_md5", compute_md5(archive))
    return Tiny({"stl10_binary.tar.gz": archive}, classes, (96, 96, 3))


def imagenette(known: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A folder for each class, called by its number in WordNet, and a table of labels made wrong on purpose."""
    numbers = sorted(known._WNID_TO_CLASS)
    members = {"noisy_imagenette.csv": b"path,noisy_labels_0\n"}
    for folder, split in (("train", "train"), ("val", "test")):
        for number, (label, shade) in enumerate(zip(make_labels(10), make_shades(split, 10), strict=True)):
            members[f"{folder}/{numbers[label]}/ILSVRC2012_val_{number:08}.JPEG"] = make_jpeg(shade)
    archive = make_tar({f"imagenette2-320/{name}": content for name, content in members.items()})
    resource = (f"{address}imagenette2-320.tgz", compute_md5(archive))
    monkeypatch.setattr(known, "_ARCHIVES", known._ARCHIVES | {"320px": resource})
    return Tiny({"imagenette2-320.tgz": archive}, [known._WNID_TO_CLASS[number][0] for number in numbers])


def flowers(known: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Numbered images in one folder, and two MATLAB files: labels from 1, and the numbers that each split has."""
    count = len(known.classes)
    names = {"train": "trnid", "val": "valid", "test": "tstid"}
    numbers = {split: np.arange(first, 3 * count, 3) + 1 for first, split in enumerate(("test", "train", "val"))}
    label_of = np.zeros((1, 3 * count), np.uint8)
    images = {}
    for split, of_split in numbers.items():
        label_of[0, of_split - 1] = np.array(make_labels(count)) + 1
        for number, shade in zip(of_split, make_shades(split, count), strict=True):
            images[f"jpg/image_{number:05}.jpg"] = make_jpeg(shade)
    files = {
        "102flowers.tgz": make_tar(images),
        "imagelabels.mat": make_matlab_file(labels=label_of),
        "setid.mat": make_matlab_file(
            **{names[split]: of_split[None].astype(np.uint16) for split, of_split in numbers.items()}
        ),
    }
    checked = {key: (name, compute_md5(files[name])) for key, (name, _) in known._file_dict.items()}
    monkeypatch.setattr(known, "_file_dict", checked)
    monkeypatch.setattr(known, "_download_url_prefix", f"{address}flowers-102/")
    return Tiny({f"flowers-102/{name}": content for name, content in files.items()}, known.classes)


def food(known: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A folder for each class, and lists of what is in each split."""
    classes = ["apple_pie", "baby_back_ribs", "baklava", "beef_carpaccio", "waffles"]
    members = {
        "README.txt": b"",
        "license_agreement.txt": b"",
        "meta/classes.txt": "\n".join(classes).encode(),
        "meta/labels.txt": "\n".join(name.replace("_", " ").capitalize() for name in classes).encode(),
    }
    for split, first in (("train", 1005649), ("test", 1011328)):
        listed: dict[str, list[str]] = {name: [] for name in classes}
        for number, (label, shade) in enumerate(zip(make_labels(5), make_shades(split, 5), strict=True)):
            image = f"{classes[label]}/{first + number}"
            listed[classes[label]].append(image)
            members[f"images/{image}.jpg"] = make_jpeg(shade)
        members[f"meta/{split}.json"] = json.dumps(listed).encode()
        members[f"meta/{split}.txt"] = "\n".join(image for images in listed.values() for image in images).encode()
    archive = make_tar({f"food-101/{name}": content for name, content in members.items()})
    monkeypatch.setattr(known, "_URL", f"{address}food-101.tar.gz")
    monkeypatch.setattr(known, "_MD5", compute_md5(archive))
    return Tiny({"food-101.tar.gz": archive}, classes)


def eurosat(known: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A folder for each class, without splits."""
    classes = [
        "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial",
        "Pasture", "PermanentCrop", "Residential", "River", "SeaLake",
    ]  # fmt: skip
    named = zip(make_labels(10), make_shades("train", 10), strict=True)
    archive = make_zip({f"2750/{classes[label]}/{classes[label]}_1.jpg": make_jpeg(shade) for label, shade in named})

    def from_here(url: str, download_root: str, **_: str) -> None:  # address and checksum stand in the code itself
        file = url.rpartition("/")[2]
        torchvision.datasets.utils.download_and_extract_archive(
            f"{address}eurosat/{file}", download_root, md5=compute_md5(archive)
        )

    monkeypatch.setattr(torchvision.datasets.eurosat, "download_and_extract_archive", from_here)
    return Tiny({"eurosat/EuroSAT.zip": archive}, classes)


def pets(known: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Images in one folder, among other things; lists with the class, from 1, of each; outlines that are not used."""
    classes = ["Abyssinian", "american_bulldog", "american_pit_bull_terrier", "basset_hound", "Bengal"]
    images = {"Abyssinian_100.mat": b"MATLAB 5.0 MAT-file"}
    lists = {"README": b"", "list.txt": b"#Image CLASS-ID SPECIES BREED ID\n", "trimaps/._Bengal_1.png": b""}
    for folder, split, first in (("trainval", "train", 100), ("test", "test", 200)):
        lines = []
        for number, (label, shade) in enumerate(zip(make_labels(5), make_shades(split, 5), strict=True)):
            image = f"{classes[label]}_{first + number}"
            lines.append(f"{image} {label + 1} {1 if image[0].isupper() else 2} 1\n")
            images[f"{image}.jpg"] = make_jpeg(shade)
        lists[f"{folder}.txt"] = "".join(lines).encode()
    files = {
        "images.tar.gz": make_tar({f"images/{name}": content for name, content in images.items()}),
        "annotations.tar.gz": make_tar({f"annotations/{name}": content for name, content in lists.items()}),
    }
    resources = [(f"{address}oxford-iiit-pet/{name}", compute_md5(content)) for name, content in files.items()]
    monkeypatch.setattr(known, "_RESOURCES", resources)
    return Tiny(
        {f"oxford-iiit-pet/{name}": content for name, content in files.items()},
        ["Abyssinian", "American Bulldog", "American Pit Bull Terrier", "Basset Hound", "Bengal"],
    )


LAYOUTS: dict[type, Callable[[Any, str, pytest.MonkeyPatch], Tiny]] = {
    torchvision.datasets.MNIST: mnist,
    torchvision.datasets.EMNIST: emnist,
    torchvision.datasets.CIFAR10: cifar,
    torchvision.datasets.SVHN: svhn,
    torchvision.datasets.STL10: stl10,
    torchvision.datasets.Imagenette: imagenette,
    torchvision.datasets.Flowers102: flowers,
    torchvision.datasets.Food101: food,
    torchvision.datasets.EuroSAT: eurosat,
    torchvision.datasets.OxfordIIITPet: pets,
}


def load_config(name: str) -> tuple[TorchvisionConfig, type]:
    params = validate(TorchvisionConfig, SETS[name], "dataset.torchvision")
    return params, getattr(torchvision.datasets, params.name)


def make_tiny_set(name: str, address: str, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """A tiny set in the layout of `name`, which torchvision then looks for at `address` and holds for the true one."""
    _, known = load_config(name)
    layouts = [LAYOUTS[parent] for parent in known.__mro__ if parent in LAYOUTS]
    assert layouts, f"{name}: add its layout to tests/torchvision_sets.py, beside mnist and cifar"
    return layouts[0](known, address, monkeypatch)
