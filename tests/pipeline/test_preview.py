"""The first look at a source of images: what is found in a second or two, of all of it or of a sample, and refused."""

import re
from pathlib import Path

import pytest

from convoy.core.errors import ConvoyError
from factories import ARCHIVES, PETS, SPLIT_PETS, make_png, make_tar, make_zip, write
from pipeline import preview
from pipeline.preview import preview_source

TABLE = "path,label\n1.png,cat\n2.png,dog\n"
IMAGES = {"1.png": make_png(1), "2.png": make_png(2)}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archive_and_folder_look_the_same(kind: str, tmp_path: Path) -> None:
    folder = preview_source(write(tmp_path / "pets", SPLIT_PETS))
    (tmp_path / f"pets.{kind}").write_bytes(ARCHIVES[kind](SPLIT_PETS))
    archive = preview_source(tmp_path / f"pets.{kind}")
    assert folder.classes == archive.classes == {"cat": 2, "dog": 2}
    assert folder.splits == archive.splits == {"train": 2, "val": 1, "test": 1}
    assert (folder.height, folder.width, folder.is_grey) == (archive.height, archive.width, archive.is_grey)
    assert (folder.loose_files, archive.loose_files) == (4, 0)
    assert not folder.is_sample
    assert not archive.is_sample


def test_images_without_a_label_are_problems(tmp_path: Path) -> None:
    found = preview_source(write(tmp_path / "pets", PETS | {"3.png": make_png()}))
    assert found.problems == ["pets/3.png is in no class folder, so its label is unknown"]
    assert found.count == 3


def test_broken_images_are_noted(tmp_path: Path) -> None:
    found = preview_source(write(tmp_path / "pets", PETS | {"dog/a.heic": b"x", "dog/b.png": make_png()[:9]}))
    (note,) = found.notes
    assert re.fullmatch("2 of 5 images can't be opened as .*: pets/dog/a.heic, pets/dog/b.png", note)


# Large sources


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "MAX_ENTRIES", 25)


def test_sample_of_a_folder_has_all_classes_and_splits(tmp_path: Path, small_limit: None) -> None:
    names = [f"{split}/{label}/{number}.png" for split in ("test", "train") for label in "abc" for number in range(40)]
    found = preview_source(write(tmp_path / "pets", dict.fromkeys(names, make_png())))
    assert found.is_sample
    assert list(found.classes) == ["a", "b", "c"]
    assert found.splits.keys() == {"train", "test"}
    assert found.count < len(names)


def test_sample_of_a_folder_has_its_table(tmp_path: Path, small_limit: None) -> None:
    names = [f"{number}.png" for number in range(50)]
    table = "path,label\n" + "".join(f"{name},{label}\n" for name, label in zip(names, "ab" * 25, strict=True))
    found = preview_source(write(tmp_path / "pets", {**dict.fromkeys(names, make_png()), "z.csv": table}))
    assert found.is_sample
    assert found.classes == {"a": 12, "b": 12}
    assert found.problems == []


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_sample_of_a_tar_archive_is_its_beginning(kind: str, tmp_path: Path, small_limit: None) -> None:
    names = [f"{label}/{number}.png" for label in "abc" for number in range(40)]
    (tmp_path / f"pets.{kind}").write_bytes(ARCHIVES[kind](dict.fromkeys(names, make_png())))
    found = preview_source(tmp_path / f"pets.{kind}")
    assert found.is_sample
    assert found.classes == {"a": 25}


def test_all_of_a_zip_archive_is_counted(tmp_path: Path, small_limit: None) -> None:
    names = [f"{label}/{number}.png" for label in "abc" for number in range(40)]
    (tmp_path / "pets.zip").write_bytes(make_zip(dict.fromkeys(names, make_png())))
    found = preview_source(tmp_path / "pets.zip")
    assert not found.is_sample
    assert found.classes == {"a": 40, "b": 40, "c": 40}


def test_look_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "MAX_TOTAL_S", 0.0)
    found = preview_source(write(tmp_path / "pets", PETS))
    assert found.is_sample
    assert list(found.classes) == ["cat", "dog"]
    assert found.count == 1


# What is refused


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "pets is empty: put labelled images there"),
        ({"1.png": make_png()}, "pets holds no images with a label: put them into one folder for each class"),
        ({"cat/1.png": make_png()}, "pets holds images of one class, 'cat', and a classifier needs two"),
        ({"a/1.png": b"", "b/2.png": b"x"}, "pets holds no image that can be used\n  pets/a/1.png can't be opened as"),
        (
            {"l.csv": TABLE + "1.png,dog\n", **IMAGES},
            r"pets holds images with several labels, such as pets/1.png \(cat",
        ),
        (
            {"l.csv": TABLE},
            "pets holds no image that can be used\n  l.csv: 2 of 2 rows lead to no file \\(1.png, 2.png\\)",
        ),
        ({"a.zip": make_zip(PETS)[:99]}, "pets/a.zip is not a complete zip archive"),
    ],
)
def test_folder_without_usable_images_is_refused(
    files: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pets").mkdir()
    write(tmp_path / "pets", files)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConvoyError, match=f"^{message}"):
        preview_source(Path("pets"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pets.zip", make_zip(PETS)[:99], "pets.zip is not a complete zip archive"),
        ("pets.zip", make_zip({}), "pets.zip is empty: put labelled images there"),
        ("pets.tgz", b"", "pets.tgz is not a complete tar archive"),
        ("pets.tar", make_tar({"../1.png": make_png()}, "w"), "pets.tar:../1.png points out of the archive"),
        ("pets.rar", b"Rar!", "pets.rar is neither a folder nor a zip or tar archive nor a Parquet file"),
        ("labels.csv", TABLE.encode(), "labels.csv is a table without images: name the folder of"),
    ],
)
def test_file_without_usable_images_is_refused(
    name: str, content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConvoyError, match=f"^{message}"):
        preview_source(Path(name))


def test_unreadable_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(preview, "list_file_sets", refuse)
    (tmp_path / "pets.zip").write_bytes(make_zip(PETS))
    with pytest.raises(ConvoyError, match=r"pets\.zip can't be read: Permission denied$"):
        preview_source(tmp_path / "pets.zip")
