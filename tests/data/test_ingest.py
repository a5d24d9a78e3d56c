"""Ingest: invalid images are reported and excluded, the others are packed."""

import dataclasses
import io
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from convoy.core.config import validate
from convoy.core.errors import ConvoyError
from convoy.data.cache import CacheDir
from convoy.data.data_lock import DataLock, LockedVersion
from convoy.data.ingest import FetchConfig, IngestResult, estimate_disk_usage, find_group, ingest
from convoy.data.packed import pixel_shards
from convoy.data.sources.base import DatasetConfig, Sample, Source
from convoy.data.sources.folder import read_folder
from factories import EMPTY_LOCK, read_table

SIZE = 16


def make_image(seed: int, channels: int = 3) -> np.ndarray:
    """(16, 16, C) uint8, like no other."""
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, channels), np.uint8)


def encode(image: np.ndarray | Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image.squeeze())
    image.save(file, form, **options)
    return file.getvalue()


def make_bomb() -> bytes:
    """A PNG of a few bytes that says it has 10,000,000,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def flip_bit(data: bytes, place: int) -> bytes:
    broken = bytearray(data)
    broken[place] ^= 1
    return bytes(broken)


def write(data: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content)
    return data


def run_ingest(
    data: Path,
    max_invalid_fraction: float = 1.0,
    group: str | None = None,
    history: DataLock = EMPTY_LOCK,
    into: str = "packed",
) -> IngestResult:
    folder, before = data.parent / into, data.parent / "before"
    if folder.exists():
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
    folder.mkdir()
    limits = FetchConfig(max_invalid_fraction=max_invalid_fraction)
    earlier = CacheDir(data.parent / "remembered" / "here", before)
    return ingest(read_folder(data), make_config(group), limits, history, folder, earlier)


def make_config(group: str | None = None) -> DatasetConfig:
    return validate(DatasetConfig, {"name": "pets", "longest_side": 512, "group": group}, "dataset")


def list_accepted(intake: IngestResult) -> list[str]:
    return read_table(intake.packed)["path"].tolist()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


PETS = {
    f"{name}/{number}.png": encode(make_image(10 * k + number))
    for k, name in enumerate(["cat", "dog"])
    for number in range(4)
}
PNG, JPEG = encode(make_image(50)), encode(np.kron(make_image(51), np.ones((4, 4, 1), np.uint8)), "JPEG")
FAULTS = {
    "cat/cut.jpg": (JPEG[: len(JPEG) // 2], "can't be decoded: "),
    "cat/cut.png": (PNG[: len(PNG) // 2], "can't be decoded: "),
    "cat/one_bit.png": (flip_bit(PNG, len(PNG) // 2), "can't be decoded: broken PNG file"),
    "cat/empty.jpg": (b"", "is empty"),
    "cat/notes.txt": (b"milk, bread", "is not an image in BMP, GIF, JPEG, PNG, TIFF, WEBP"),
    "dog/page.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n%%EOF\n", "is not an image"),
    "dog/bomb.png": (make_bomb(), "has more than the limit of 100000000 pixels"),
    "dog/range.tif": (encode(Image.fromarray(np.full((8, 8), -1, np.float32)), "TIFF"), "has 32 bits per pixel"),
    "stray.png": (encode(make_image(52)), "is in no class folder, so its label is unknown"),
}


def test_folder_with_every_fault_gives_the_expected_report(data: Path) -> None:
    twin, shared = encode(make_image(60)), encode(make_image(61))
    write(data, PETS | {name: content for name, (content, _) in FAULTS.items()})
    write(data, {"cat/twin.png": twin, "cat/again/twin.png": twin})  # one file, twice
    write(data, {"cat/both.png": shared, "dog/both.bmp": encode(make_image(61), "BMP")})  # one picture, two labels
    intake = run_ingest(data)

    assert list_accepted(intake) == sorted([f"data/{name}" for name in PETS] + ["data/cat/again/twin.png"])
    assert intake.merged.to_dict("records") == [{"path": "data/cat/twin.png", "kept": "data/cat/again/twin.png"}]
    reasons = intake.quarantine.set_index("path")["reason"].to_dict()
    assert set(reasons) == {f"data/{name}" for name in [*FAULTS, "cat/both.png", "dog/both.bmp"]}
    for name, (_, reason) in FAULTS.items():
        assert reasons[f"data/{name}"].startswith(reason)
    assert reasons["data/cat/both.png"] == "has the same pixels as data/dog/both.bmp, which is labelled 'dog'"
    assert reasons["data/dog/both.bmp"] == "has the same pixels as data/cat/both.png, which is labelled 'cat'"


def test_file_with_two_labels_is_excluded_under_both(data: Path) -> None:
    rows = "".join(f"{name},{name[:3]}\n" for name in PETS)
    write(data, PETS | {"a.csv": f"path,label\n{rows}".encode(), "b.csv": b"path,label\ncat/0.png,dog\n"})
    intake = run_ingest(data)
    assert intake.quarantine.to_dict("records") == [
        {"path": "data/cat/0.png", "label": "cat", "reason": "is also labelled 'dog'"},
        {"path": "data/cat/0.png", "label": "dog", "reason": "is also labelled 'cat'"},
    ]


def test_each_accepted_image_keeps_its_pixels(data: Path) -> None:
    write(data, PETS | {"cat/1_broken.png": PNG[:50], "cat/2_again.png": PETS["cat/0.png"]})
    packed = run_ingest(data).packed
    for row, path in enumerate(read_table(packed)["path"]):
        with Image.open(data.parent / path) as image:
            assert np.array_equal(packed.read_image(row), np.asarray(image))


def test_images_that_need_half_of_the_disk_are_announced(
    data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write(data, PETS)
    count = len(run_ingest(data).packed.table.read_columns("label"))
    assert "GB" not in capfd.readouterr().err

    pixels = count * SIZE * SIZE * 3
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, pixels))
    run_ingest(data)
    assert "need about" in capfd.readouterr().err


@pytest.mark.parametrize(("free", "is_announced"), [(4000, False), (3999, True)])
def test_disk_estimate_counts_the_copy_in_the_cache(free: int, is_announced: bool) -> None:
    assert (estimate_disk_usage(1000, free) is not None) == is_announced


def test_too_many_invalid_images_stop_the_run_and_are_listed(data: Path) -> None:
    write(data, PETS | {f"cat/{number}.jpg": b"" for number in range(3)})
    with pytest.raises(ConvoyError) as refusal:
        run_ingest(data, max_invalid_fraction=0.2)
    message = str(refusal.value)
    assert message.startswith(
        "3 of 11 images can't be used, more than fetch.max_invalid_fraction=0.2 allows; fix or remove"
    )
    assert all(f"data/cat/{number}.jpg is empty" in message for number in range(3))
    assert len(run_ingest(data, max_invalid_fraction=3 / 11).quarantine) == 3


def test_single_class_with_valid_images_is_refused(data: Path) -> None:
    write(data, {"cat/1.png": PNG, "dog/1.png": b""})
    with pytest.raises(ConvoyError, match="pets has images of one class, 'cat', and a classifier needs two"):
        run_ingest(data)
    write(data, {"cat/1.png": b""})
    with pytest.raises(ConvoyError, match="pets has no images that can be used"):
        run_ingest(data)


def test_copies_in_different_splits_are_left_to_the_split(data: Path) -> None:
    for split in ("train", "test", "val"):
        write(data / split, PETS)
    intake = run_ingest(write(data / "test", {"cat/again.png": PETS["cat/0.png"]}).parent)
    assert read_table(intake.packed)["split"].value_counts().to_dict() == {"train": 8, "test": 8, "val": 8}
    assert intake.merged["kept"].tolist() == ["data/test/cat/0.png"]


def test_new_classes_are_appended_and_removed_ones_kept(data: Path) -> None:
    write(data, PETS | {"ape/1.png": PNG, "bat/1.png": b""})
    assert run_ingest(data).packed.classes == ["ape", "cat", "dog"]
    assert run_ingest(
        data, history=EMPTY_LOCK.add_version(["owl", "dog"], LockedVersion(digest="", images={}, quarantine=0))
    ).packed.classes == ["owl", "dog", "ape", "cat"]


# Groups


@pytest.mark.parametrize(
    ("pattern", "group"),
    [
        (None, ""),
        ("folder", "patient-7/left"),
        (r"patient-(\d+)", "7"),
        (r"patient-\d+", "patient-7"),
        (r"hospital-(\d+)", ""),
        (r"(hospital)?patient", ""),
    ],
)
def test_group_is_the_folder_or_a_match_of_the_pattern(pattern: str | None, group: str) -> None:
    assert find_group("data/patient-7/left/1.png", "ill", pattern) == group
    assert find_group("data/week-1/hospital-3.tar.gz:patient-7/left/1.png", "ill", pattern) == group


@pytest.mark.parametrize("around", ["data/", "data/pets/", "data/train/", "data/more/pets.zip:", "data:"])
def test_group_excludes_class_folders_and_those_around_them(around: str) -> None:
    assert find_group(f"{around}cat/litter-7/left/1.png", "cat", "folder") == "cat/litter-7/left"
    assert find_group(f"{around}cat/1.png", "cat", "folder") == ""


def test_images_that_a_pattern_puts_in_no_group_are_counted(data: Path) -> None:
    write(data, PETS)
    (note,) = run_ingest(data, group=r"cat/(\d+)").notes
    assert note == (
        r"dataset.group='cat/(\\d+)' finds no group in the paths of 4 of 8 images, such as data/dog/0.png: each of them"
        " is split on its own"
    )


def test_pattern_that_finds_no_group_at_all_is_refused(data: Path) -> None:
    with pytest.raises(
        ConvoyError, match=r"dataset\.group='pateint-.*' finds a group in no path, such as data/cat/0.png"
    ):
        run_ingest(write(data, PETS), group=r"pateint-(\d+)")


def test_invalid_regular_expression_is_refused_by_name() -> None:
    with pytest.raises(ConvoyError, match=r"dataset\.group='\(': .*must be null, folder or a regular expression"):
        make_config("(")


def test_group_of_the_source_overrides_the_pattern(data: Path) -> None:
    write(data, PETS | {"labels.csv": b"path,label,group\ncat/0.png,cat,tom\ncat/1.png,cat,\ndog/0.png,dog,rex\n"})
    table = read_table(run_ingest(data, group="folder").packed)
    assert table["group"].tolist() == ["tom", "", "rex"]


def test_copies_in_different_groups_are_left_to_the_split(data: Path) -> None:
    write(
        data,
        PETS | {"cat/a/0.png": PETS["cat/0.png"], "cat/b/0.png": PETS["cat/0.png"], "cat/b/1.png": PETS["cat/0.png"]},
    )
    intake = run_ingest(data, group="folder")
    assert intake.merged.to_dict("records") == [{"path": "data/cat/b/1.png", "kept": "data/cat/b/0.png"}]
    assert (read_table(intake.packed)["sha256"].value_counts().iloc[0], len(run_ingest(data).merged)) == (3, 3)


def test_classes_that_are_the_same_number_are_reported(data: Path) -> None:
    write(data, {"1/1.png": PETS["cat/0.png"], "1.0/1.png": PETS["cat/1.png"], "10/1.png": PETS["cat/2.png"]})
    assert run_ingest(data).notes == [
        "the classes '1' and '1.0' are different classes: if they are one, give them the same name"
    ]


@pytest.mark.parametrize("twin", ["Cat", "cat ", "\N{FULLWIDTH LATIN SMALL LETTER C}at"])
def test_classes_with_confusable_names_are_reported(data: Path, twin: str) -> None:
    write(data, PETS | {f"{twin}/9.png": encode(make_image(9))})
    (note,) = run_ingest(data).notes
    assert (
        note == f"the classes {twin!r} and 'cat' are different classes: if they are one, give them the same name"
        or (note == f"the classes 'cat' and {twin!r} are different classes: if they are one, give them the same name")
    )


def test_drawn_splits_stay_drawn_when_others_are_given(data: Path) -> None:
    write(data, {f"train/{name}": content for name, content in PETS.items()})
    first = run_ingest(data)
    assert (first.packed.drawn, first.notes) == (["val", "test"], [])
    history = EMPTY_LOCK.add_version(
        first.packed.classes, LockedVersion(digest="", images={}, quarantine=0), first.packed.drawn
    )
    later = run_ingest(write(data, {"test/cat/9.png": encode(make_image(9))}), history=history)
    assert later.packed.drawn == ["val", "test"]
    assert later.notes[0].startswith("the source assigns test images now; some of its training images stay test images")


# Growth


def test_cache_written_by_another_process_changes_no_pixel(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixel_shards, "MEAN_SHARD_BYTES", 1)  # so that each image lies in a shard of its own
    others = write(data.parent / "others" / "data", dict(list(PETS.items())[1:]))
    run_ingest(others)
    run_ingest(write(data, PETS))

    def members(source: Source) -> Iterator[Sample]:
        shutil.rmtree(data.parent / "remembered")
        shutil.copytree(others.parent / "remembered", data.parent / "remembered")
        yield from source.samples

    source = read_folder(data)
    source = dataclasses.replace(source, samples=members(source))
    (data.parent / "again").mkdir()
    earlier = CacheDir(data.parent / "remembered" / "here", data.parent / "packed")
    packed = ingest(
        source, make_config(), FetchConfig(max_invalid_fraction=0), EMPTY_LOCK, data.parent / "again", earlier
    ).packed
    assert [encode(packed.read_image(row)) for row in range(len(PETS))] == list(PETS.values())


def test_second_run_with_new_images_is_bit_identical(data: Path) -> None:
    write(data, PETS)
    run_ingest(data)
    write(data, {"cat/00.png": PNG, "dog/9.jpg": JPEG, "dog/bad.png": b""})
    grown = run_ingest(data)
    shutil.rmtree(data.parent / "remembered")
    afresh = run_ingest(data, into="afresh")
    pd.testing.assert_frame_equal(read_table(grown.packed), read_table(afresh.packed))
    pd.testing.assert_frame_equal(grown.quarantine, afresh.quarantine)
    one, other = (
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (data.parent / "packed", data.parent / "afresh")
    )
    assert one == other


def test_other_table_columns_are_kept_beside_recorded_ones(tmp_path: Path) -> None:
    files = {f"{number}.png": encode(make_image(number)) for number in range(4)} | {"4.png": b"torn"}
    rows = [f"{number}.png,{'ab'[number % 2]},site {number}" for number in range(5)]
    data = write(tmp_path / "data", files | {"labels.csv": "\n".join(["path,label,label_site", *rows]).encode()})
    table = read_table(run_ingest(data).packed)
    assert table["column_label_site"].tolist() == [f"site {number}" for number in range(4)]
    assert table["path"].tolist() == [f"data/{number}.png" for number in range(4)]
    assert (table["height"] == SIZE).all()


def test_conflicting_labels_count_as_invalid(data: Path) -> None:
    shared = encode(make_image(61))
    write(data, PETS | {"cat/both.png": shared, "dog/both.png": shared})
    with pytest.raises(ConvoyError, match=r"^2 of 10 images can't be used"):
        run_ingest(data, max_invalid_fraction=0.1)


def test_excluded_copies_do_not_count_as_merged(data: Path) -> None:
    shared = encode(make_image(61))
    write(data, PETS | {"cat/both.png": shared, "cat/both_again.png": shared, "dog/both.png": shared})
    intake = run_ingest(data)
    assert len(intake.quarantine) == 3
    assert not len(intake.merged)
