"""Preprocessing: the split depends on the images alone, and the arrays match the table."""

import dataclasses
import io
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import convoy.data.cache
import convoy.data.image_io
import convoy.data.resize
from convoy.core.errors import ConvoyError
from convoy.data.cache import CacheDir
from convoy.data.image_io import center_crop_resize
from convoy.data.ingest import FetchConfig, ingest
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.data.packed.packed_dataset import SPLITS, PackedDataset
from convoy.data.preprocessing import (
    PreprocessConfig,
    PreprocessResult,
    find_near_duplicates,
    prepare,
    prepare_size,
)
from convoy.data.sources.base import DatasetConfig, Sample, Source
from factories import EMPTY_LOCK, read_table

PARAMS = PreprocessConfig(size=32, channels="auto", test_fraction=0.2, val_fraction=0.25, near_duplicate_threshold=0.98)


def test_recompressed_photographs_are_found(tmp_path: Path) -> None:
    photograph = load_sample_images().images[0][130:]  # below the sky, which looks alike everywhere
    pictures = [photograph[top : top + 96, left : left + 96] for top in (0, 96) for left in range(0, 540, 96)]
    copies = []
    for picture in pictures[:8]:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=70)
        copies.append(file.getvalue())
    images = pack(tmp_path / "packed", {"china": pictures, "copies": copies})
    found = find_near_duplicates(images, 0.98)
    paths = read_table(images)["path"].to_numpy()[found]
    expected = {(f"data/china/{number}.png", f"data/copies/{number}.png") for number in range(8)}
    assert {tuple(sorted(pair)) for pair in paths} == expected


def test_training_image_of_a_cross_split_pair_is_excluded(tmp_path: Path) -> None:
    pictures = make_noise(60, 3, 1, size=40)
    slightly = [np.clip(picture.astype(int) + 1, 0, 255).astype(np.uint8) for picture in pictures]
    found = prepare_images(
        pack(tmp_path / "packed", {"cat": pictures + slightly, "dog": make_noise(60, 3, 2)}), tmp_path
    )
    assert len(found.near_duplicates) == 60
    assert 10 < len(found.excluded) < 40
    assert found.excluded["reason"].str.contains("is a near-duplicate of the (?:test|val) image data/cat/").all()
    used = pd.read_parquet(tmp_path / "images.parquet")
    assert not set(found.excluded["path"]) & set(used["path"])
    assert len(found.excluded) + len(used) == 180


def test_excluded_images_stay_out_of_another_size(tmp_path: Path) -> None:
    pictures = make_noise(60, 1, 1, size=40)
    slightly = [np.clip(picture.astype(int) + 1, 0, 255).astype(np.uint8) for picture in pictures]
    packed = pack(tmp_path / "packed", {"cat": pictures + slightly, "dog": make_noise(60, 1, 2)})
    assert len(prepare_images(packed, tmp_path).excluded)
    (tmp_path / "48").mkdir()
    prepare_size(packed, tmp_path, 48, tmp_path / "48", CacheDir(tmp_path / "remembered 48", tmp_path / "48"))
    for split in SPLITS:
        small, large = (np.load(folder / f"{split}_pixels.npy") for folder in (tmp_path, tmp_path / "48"))
        assert large.shape == (len(small), 48, 48, 1)


# The arrays


def pack(
    folder: Path,
    images: Mapping[str, Sequence[np.ndarray | bytes]],
    given_split: str = "",
    group: str = "",
    longest_side: int = 512,
) -> PackedDataset:
    """`images` by class, as a packed data set in `folder`."""
    members = [
        Sample(f"data/{label}/{number}.png", label, given_split, group, content)
        for label, contents in images.items()
        for number, content in enumerate(contents)
    ]
    return pack_samples(members, folder, longest_side)


def pack_samples(members: Sequence[Sample], folder: Path, longest_side: int = 512) -> PackedDataset:
    folder.mkdir(parents=True, exist_ok=True)
    source = Source(sorted({member.label for member in members}), len(members), iter(members))
    limits = FetchConfig(max_invalid_fraction=0.0)
    pets = DatasetConfig(name="pets", longest_side=longest_side, group=None)
    return ingest(source, pets, limits, EMPTY_LOCK, folder, CacheDir(folder / "remembered" / "here", folder)).packed


def prepare_images(packed: PackedDataset, folder: Path, params: PreprocessConfig = PARAMS) -> PreprocessResult:
    return prepare(packed, params, 1, folder, CacheDir(folder / "remembered", folder))


def make_noise(count: int, channels: int = 1, seed: int = 0, size: int = 32) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), np.uint8))


def make_constant_images(count: int, values: range) -> list[np.ndarray]:
    """Images of one colour each, smaller than asked."""
    return [np.full((8, 8, 1), values[number % len(values)], np.uint8) for number in range(count)]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """The class "cat" is dark and the class "007" light."""
    images = {"cat": make_constant_images(60, range(0, 100)), "007": make_constant_images(60, range(150, 250))}
    prepare_images(pack(tmp_path / "packed", images), tmp_path)
    return tmp_path


def test_each_image_is_packed_once_with_its_label(prepared: Path) -> None:
    values = []
    for name in SPLITS:
        pixels, labels = np.load(prepared / f"{name}_pixels.npy"), np.load(prepared / f"{name}_labels.npy")
        assert pixels.dtype == np.uint8
        assert pixels.shape == (len(labels), 32, 32, 1)
        assert labels.dtype == np.int64
        # classes in the order of their names: "007" is 0
        assert ((pixels[:, 0, 0, 0] < 100) == (labels == 1)).all()
        values += pixels[:, 0, 0, 0].tolist()
    assert sorted(values) == [*range(60), *range(150, 210)]


def test_table_has_the_rows_of_the_arrays_in_their_order(prepared: Path) -> None:
    images = pd.read_parquet(prepared / "images.parquet")
    assert images.columns.tolist() == ["path", "label", "sha256", "group", "split"]
    for name in SPLITS:
        rows = images.query("split == @name")
        labels = np.load(prepared / f"{name}_labels.npy")
        assert rows["label"].tolist() == [["007", "cat"][label] for label in labels]
        numbers = rows["path"].str.extract(r"(\d+)\.png")[0].astype(int) + np.where(labels == 0, 150, 0)
        assert numbers.tolist() == np.load(prepared / f"{name}_pixels.npy")[:, 0, 0, 0].tolist()
    assert images["split"].is_monotonic_increasing is False  # train, val, test: not by the alphabet
    assert images["split"].unique().tolist() == list(SPLITS)


def test_arrays_load_by_memory_map(prepared: Path) -> None:
    pixels = np.load(prepared / "train_pixels.npy", mmap_mode="r")
    assert isinstance(pixels, np.memmap)
    assert pixels.shape == (len(np.load(prepared / "train_labels.npy")), 32, 32, 1)


def test_dataset_info_describes_the_data(prepared: Path) -> None:
    info = DatasetInfo.load(prepared / "task.json")
    assert (info.dataset, info.classes, info.size, info.channels) == ("pets", ["007", "cat"], 32, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_mean_and_std_are_of_training_images_alone(tmp_path: Path, channels: int) -> None:
    images = {"cat": make_noise(80, channels, 1), "dog": make_noise(80, channels, 2)}
    info = prepare_images(pack(tmp_path / "packed", images), tmp_path).info
    pixels = np.load(tmp_path / "train_pixels.npy") / 255
    assert info.mean == pytest.approx(pixels.mean(axis=(0, 1, 2)).tolist(), abs=1e-6)
    assert info.std == pytest.approx(pixels.std(axis=(0, 1, 2)).tolist(), abs=1e-6)
    everything = np.concatenate([np.load(tmp_path / f"{name}_pixels.npy") for name in SPLITS]) / 255
    assert info.mean != pytest.approx(everything.mean(axis=(0, 1, 2)).tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("asked", "source", "expected"), [("auto", 1, 1), ("auto", 3, 3), (1, 3, 1), (3, 1, 3), (1, 1, 1), (3, 3, 3)]
)
def test_channels_are_grey_only_if_every_image_is_grey(
    tmp_path: Path, asked: object, source: int, expected: int
) -> None:
    images = {"cat": make_noise(40, 1, 1), "dog": [*make_noise(39, 1, 2), *make_noise(1, source, 3)]}
    params = PreprocessConfig(
        size=32, channels=asked, test_fraction=0.3, val_fraction=0.3, near_duplicate_threshold=0.98
    )
    info = prepare_images(pack(tmp_path / "packed", images), tmp_path, params).info
    assert info.channels == len(info.mean) == len(info.std) == expected
    assert np.load(tmp_path / "train_pixels.npy").shape[1:] == (32, 32, expected)


def test_images_of_any_size_come_to_one_size(tmp_path: Path) -> None:
    images = {"cat": make_noise(30, 1, 1, size=7), "dog": make_noise(30, 1, 2, size=90)}
    prepare_images(pack(tmp_path / "packed", images), tmp_path)
    assert {np.load(tmp_path / f"{name}_pixels.npy").shape[1:] for name in SPLITS} == {(32, 32, 1)}


def test_groups_are_suggested_for_many_near_duplicates(tmp_path: Path) -> None:
    frames = [np.maximum(make_noise(1)[0], shade) for shade in range(20)]
    notes = prepare_images(pack(tmp_path / "packed", {"cat": frames, "dog": make_noise(40, seed=3)}), tmp_path).notes
    assert any("near-duplicates of images in other splits" in note and "dataset.group" in note for note in notes)


@pytest.mark.parametrize(("longest_side", "noted"), [(40, False), (32, False), (30, True)])
def test_images_reduced_below_the_requested_size_are_counted(tmp_path: Path, longest_side: int, noted: bool) -> None:
    images = {
        "cat": make_noise(30, 1, 1, size=90),
        "dog": make_noise(30, 1, 2, size=7),
    }  # those of 7 pixels were never larger
    notes = prepare_images(pack(tmp_path / "packed", images, longest_side=longest_side), tmp_path).notes
    assert any("30 of 60 images were reduced to less than preprocess.size=32" in note for note in notes) == noted


def test_copy_given_for_training_leaves_the_test_image(tmp_path: Path) -> None:
    def make_table(members: Sequence[Sample], folder: Path) -> pd.DataFrame:
        prepare_images(pack_samples(members, folder / "packed"), folder)
        return pd.read_parquet(folder / "images.parquet")

    old = [Sample(f"data/{n}.png", "cd"[n % 2], "", "", image) for n, image in enumerate(make_noise(80))]
    before = make_table(old, tmp_path / "before").query("split == 'test'")
    copied = [member._replace(path=f"data/0-{member.path}", split="train") for member in old]
    given = [Sample(f"data/{n}.png", "cd"[n % 2], "val", "", image) for n, image in enumerate(make_noise(4, seed=9))]
    after = make_table([*copied, *old, *given], tmp_path / "after")
    assert len(before) > 5
    assert set(after[after["sha256"].isin(before["sha256"])]["split"]) == {"test"}


def read_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_same_images_give_bit_identical_arrays(tmp_path: Path) -> None:
    images = {"cat": make_noise(40, 1, 1), "dog": make_noise(40, 1, 2)}
    for name in ("first", "second"):
        prepare_images(pack(tmp_path / name / "packed", images), tmp_path / name)
    first = read_files(tmp_path / "first")
    assert read_files(tmp_path / "second") == first
    arrays = {f"{name}_{kind}.npy" for name in SPLITS for kind in ("pixels", "labels")}
    assert set(first) == arrays | {"images.parquet", "task.json"}


# The cache

LARGE = {"cat": make_noise(40, 3, 1, size=50), "dog": make_noise(40, 1, 2, size=40) + make_noise(5, 3, 4)}


@pytest.fixture
def resized_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the images that were fitted."""
    shapes = []

    def counted(pixels: np.ndarray, size: int, channels: int) -> np.ndarray:
        shapes.append(pixels.shape)
        return center_crop_resize(pixels, size, channels)

    monkeypatch.setattr(convoy.data.resize, "center_crop_resize", counted)
    return shapes


def prepare_once(folder: Path, resized_shapes: list) -> PackedDataset:
    """Images that are made and remembered; of what was fitted no count is left."""
    images = pack(folder / "packed", LARGE)
    prepare_images(images, folder)
    resized_shapes.clear()
    return images


def prepare_again(packed: PackedDataset, first: Path) -> dict[str, bytes]:
    """The files in another folder, with what is remembered from a first time."""
    folder = first / "again"
    folder.mkdir()
    prepare(packed, PARAMS, 1, folder, CacheDir(first / "remembered", first))
    return read_files(folder)


def test_only_new_images_are_resized_and_bytes_are_identical(tmp_path: Path, resized_shapes: list) -> None:
    grown = LARGE | {"owl": make_noise(3, 3, 3, size=60)}
    prepare_images(pack(tmp_path / "first" / "packed", LARGE), tmp_path / "first")
    resized_shapes.clear()
    images = pack(tmp_path / "packed", grown)
    again = prepare_again(images, tmp_path / "first")
    assert resized_shapes == [(60, 60, 3)] * 3
    prepare_images(images, tmp_path)
    assert again == read_files(tmp_path)


def test_another_size_is_resized_again(tmp_path: Path, resized_shapes: list) -> None:
    images = prepare_once(tmp_path, resized_shapes)
    info = prepare_images(images, tmp_path, dataclasses.replace(PARAMS, size=36)).info
    assert (info.size, len(resized_shapes)) == (36, 85)


def test_corrupt_cached_image_is_resized_again(tmp_path: Path, resized_shapes: list) -> None:
    images = pack(tmp_path / "packed", LARGE)
    prepare_images(images, tmp_path)
    sound = read_files(tmp_path)
    resized_shapes.clear()
    with (tmp_path / "train_pixels.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert prepare_again(images, tmp_path) == sound
    assert len(resized_shapes) == 1


def test_cache_without_disk_space_is_skipped(tmp_path: Path, resized_shapes: list) -> None:
    images = prepare_once(tmp_path, resized_shapes)
    (index,) = (tmp_path / "remembered").glob("*/index.npy")
    index.write_bytes(b"")
    prepare_again(images, tmp_path)
    assert len(resized_shapes) == 85


def test_images_of_the_requested_size_are_not_cached(tmp_path: Path) -> None:
    prepare_images(pack(tmp_path / "packed", {"cat": make_noise(40), "dog": make_noise(40, 1, 1)}), tmp_path)
    assert not list((tmp_path / "remembered").glob("*/*.npy"))


# Messages


@pytest.mark.parametrize("count", [1, 2])
def test_class_with_too_few_images_for_each_split_is_named(tmp_path: Path, count: int) -> None:
    images = pack(
        tmp_path / "packed", {"cat": make_noise(50), "dog": make_noise(50, 1, 2), "rare": make_noise(count, 1, 1)}
    )
    (note,) = prepare_images(images, tmp_path).notes
    assert re.fullmatch(
        rf"class 'rare' has no image in \w+ and \w+, of {count}|class 'rare' has no image in \w+, of 2", note
    )


def test_classes_with_too_few_images_are_reported_together(tmp_path: Path) -> None:
    rare = {f"rare {number}": make_noise(1, 1, number + 3) for number in range(30)}
    notes = prepare_images(
        pack(tmp_path / "packed", {"cat": make_noise(60), "dog": make_noise(60, 1, 2), **rare}), tmp_path
    ).notes
    told = [
        re.fullmatch(r"(\d+) classes have no image in \w+ and \w+: rare \d+, .* and \d+ more", note) for note in notes
    ]
    assert sum(int(match[1]) if match else 1 for match in told) == 30
    assert any(told)


def test_known_class_without_images_keeps_its_label(tmp_path: Path) -> None:
    images = pack(tmp_path / "packed", {"cat": make_noise(50), "dog": make_noise(50, 1, 2)})
    images = dataclasses.replace(images, classes=["owl", "cat", "dog"])
    found = prepare_images(images, tmp_path)
    assert found.notes == ["class 'owl' has no image: it stays in the class list, but no network can learn it"]
    assert found.info.classes == ["owl", "cat", "dog"]
    assert set(np.load(tmp_path / "train_labels.npy")) == {1, 2}


def test_data_of_test_images_alone_are_refused(tmp_path: Path) -> None:
    images = pack(tmp_path / "packed", {"cat": make_noise(20), "dog": make_noise(20, 1, 1)}, given_split="test")
    with pytest.raises(ConvoyError, match="there is no train image left of 40: all of pets is assigned to test, by"):
        prepare_images(images, tmp_path)


def test_message_counts_groups_if_a_split_gets_no_image(tmp_path: Path) -> None:
    images = pack(tmp_path / "packed", {"cat": make_noise(20), "dog": make_noise(20, 1, 1)}, group="one")
    with pytest.raises(
        ConvoyError, match=r"no .* image left of 40 in 1 groups, none of which is divided between splits: add"
    ):
        prepare_images(images, tmp_path)


@pytest.mark.parametrize("module", [convoy.data.image_io, convoy.data.resize], ids=lambda module: module.__name__)
def test_images_resized_by_other_code_are_resized_again(
    module: ModuleType, tmp_path: Path, resized_shapes: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = prepare_once(tmp_path, resized_shapes)
    (tmp_path / "changed.py").write_text("# other code\n")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "changed.py"))
    prepare_again(images, tmp_path)
    assert len(resized_shapes) == 85


@pytest.mark.parametrize("library", ["numpy", "pillow", "xxhash"])
def test_images_of_another_library_version_are_resized_again(
    library: str, tmp_path: Path, resized_shapes: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = prepare_once(tmp_path, resized_shapes)
    monkeypatch.setattr(convoy.data.cache, "version", lambda name: "0" if name == library else version(name))
    prepare_again(images, tmp_path)
    assert len(resized_shapes) == 85


def test_dataset_info_records_the_decode_size(tmp_path: Path) -> None:
    images = {"cat": make_noise(40, size=40), "dog": make_noise(40, 1, 1, size=40)}
    info = prepare_images(pack(tmp_path / "packed", images, longest_side=36), tmp_path).info
    assert info.longest_side == 36


def test_excluded_images_are_not_cached(tmp_path: Path) -> None:
    pictures = make_noise(60, 3, 1, size=40)
    slightly = [np.clip(picture.astype(int) + 1, 0, 255).astype(np.uint8) for picture in pictures]
    images = pack(tmp_path / "packed", {"cat": pictures + slightly, "dog": make_noise(60, 3, 2, size=40)})
    withheld = len(prepare_images(images, tmp_path).excluded)
    (index,) = (tmp_path / "remembered").glob("*/index.npy")
    sides = np.load(index)["split_id"]
    assert withheld > 0
    assert (len(sides), sides.min()) == (180 - withheld, 0)
