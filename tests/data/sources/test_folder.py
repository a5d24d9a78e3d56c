"""Class folders: each file gets its label, is named with its fault, or is refused."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from convoy.core.errors import ConvoyError
from convoy.data.sources.base import Selection
from convoy.data.sources.folder import read_folder, reject_links
from factories import PETS, SPLIT_PETS, list_faults, make_png, make_tar, make_zip, read, read_content, read_rows, write

AS_ROWS = [("data/cat/1.png", "cat", ""), ("data/cat/2.png", "cat", ""), ("data/dog/1.png", "dog", "")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


# Class folders


def test_folder_for_each_class_is_a_data_set(data: Path) -> None:
    write(data, PETS)
    assert read_folder(data).classes == ["cat", "dog"]
    assert read_rows(data) == AS_ROWS
    assert {member.group for member in read(data)} == {""}


def test_file_outside_class_folders_is_named_and_not_read(data: Path) -> None:
    write(data, PETS)
    assert [member.content for member in read(data)] == [str(data / name) for name in PETS]


def test_folders_inside_a_class_folder_belong_to_the_class(data: Path) -> None:
    write(data, {"cat/a/b/1.png": make_png(), "cat/2.png": make_png(), "dog/c/3.png": make_png()})
    assert [label for _, label, _ in read_rows(data)] == ["cat", "cat", "dog"]


@pytest.mark.parametrize("outer", ["outer/inner/", "a/" * 1500])
def test_folders_around_all_classes_are_descended_into(data: Path, outer: str) -> None:
    inside = {f"{outer}{name}": content for name, content in PETS.items()}
    write(data, inside if len(outer) < 100 else {"pets.zip": make_zip(inside)})
    assert read_folder(data).classes == ["cat", "dog"]


@pytest.mark.parametrize("outer", ["", "pets/"])
@pytest.mark.parametrize("style", [str.lower, str.capitalize])
def test_train_and_test_folders_keep_their_split(data: Path, outer: str, style: Callable[[str], str]) -> None:
    write(data, {outer + style(name.split("/")[0]) + name[name.index("/") :]: content
                 for name, content in SPLIT_PETS.items()})  # fmt: skip
    assert read_folder(data).classes == ["cat", "dog"]
    assert {(label, split) for _, label, split in read_rows(data)} == {
        ("cat", "train"), ("dog", "train"), ("cat", "test"), ("dog", "val"),
    }  # fmt: skip


def test_class_may_be_called_like_a_split(data: Path) -> None:
    write(data, {"bus/1.png": make_png(), "train/1.png": make_png()})
    assert read_rows(data) == [("data/bus/1.png", "bus", ""), ("data/train/1.png", "train", "")]


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        ("Training/cat Testing/dog", "cat:train dog:test"),
        ("training_set/cat test_set/dog", "cat:train dog:test"),
        ("train_images/cat val_images/dog", "cat:train dog:val"),
        ("trainset/cat dev/dog", "cat:train dog:val"),
        ("train/cat eval/dog", "cat:train dog:test"),
        ("seg_train/seg_train/cat seg_test/seg_test/dog", "cat:train dog:test"),
        ("pets/train/images/cat pets/test/images/dog", "cat:train dog:test"),
        ("bus train car", "bus: car: train:"),
        ("test_tube train bus", "bus: test_tube: train:"),
        ("train_station test_tube/old bus", "bus: test_tube: train_station:"),
        ("contest/cat trainer/dog", "contest: trainer:"),
        ("cat/train_images cat/test_images dog/train_images dog/test_images", "cat:test cat:train dog:test dog:train"),
        ("cat/train cat/test dog/train dog/test bird", "bird: cat:test cat:train dog:test dog:train"),
        ("cat/train dog/train", "cat:train dog:train"),
        ("train/cat/one train/cat/two train/dog/one test/cat/one test/cat/two", "cat:test cat:train dog:train"),
        ("train/test_tube train/flask test/test_tube", "flask:train test_tube:test test_tube:train"),
        ("vehicle/train vehicle/bus fruit/fig", "fruit: vehicle:"),
        ("train/cat train/dog", "cat:train dog:train"),
    ],
)
def test_split_folders_are_around_the_classes_or_in_them(data: Path, folders: str, found: str) -> None:
    write(data, {f"{folder}/{number}.png": make_png() for number, folder in enumerate(folders.split())})
    assert {f"{label}:{split}" for _, label, split in read_rows(data)} == set(found.split())


def test_images_in_hidden_folders_are_reported(data: Path) -> None:
    write(
        data,
        PETS
        | {
            ".birds/0.png": make_png(),
            "cat/._0.png": make_png(),
            "__MACOSX/cat/0.png": make_png(),
            ".birds/notes": b"",
        },
    )
    source = read_folder(data)
    assert source.classes == ["cat", "dog"]
    assert source.notes == [".birds/0.png: not used, because a folder that contains it is hidden"]


@pytest.mark.parametrize("beside", ["unlabelled/", "meta/", "ground_truth/dog/", "seg_pred/", "nested/cat/"])
@pytest.mark.parametrize("splits", ["{}/", "seg_{}/", "{}_images/"])
def test_folder_beside_split_folders_is_no_class(data: Path, splits: str, beside: str) -> None:
    write(data, {f"{splits.format('train')}cat/1.png": make_png(), f"{splits.format('test')}dog/2.png": make_png()})
    members = read(write(data, {f"{beside}3.png": make_png(), f"{beside}notes.txt": b"of these"}))
    assert {member.label for member in members} == {"cat", "dog", ""}
    assert list_faults(members) == [f"data/{beside}3.png is in no class folder of a split, so its label is unknown"]


@pytest.mark.parametrize("files", ["train_images/1.png test_images/2.png", "Train/1.png Test/2.png Meta/3.png"])
def test_folders_of_splits_without_classes_are_refused(data: Path, files: str) -> None:
    with pytest.raises(ConvoyError, match=r"no images with a label(.|\n)*1\.png is in no class folder"):
        read_folder(write(data, dict.fromkeys(files.split(), make_png())))


def test_folder_without_images_is_no_class(data: Path) -> None:
    write(data, SPLIT_PETS | {"meta/classes.txt": b"cat\ndog\n"})
    assert {split for _, _, split in read_rows(data)} == {"train", "val", "test"}


@pytest.mark.parametrize(
    ("lists", "split", "faults"),
    [({"test.txt": "1.png"}, "train", []), ({"train.txt": "1.png"}, "", ["data/cat/3.png is in no list of a split"])],
)
def test_unlisted_image_trains_unless_training_is_listed(
    lists: dict[str, str], split: str, faults: list[str], data: Path
) -> None:
    names = ("cat/1.png", "dog/2.png", "cat/3.png")
    write(data, {name: make_png(number) for number, name in enumerate(names)} | {"val.txt": "2.png"} | lists)
    members = read(data)
    assert {member.path: member.split for member in members}["data/cat/3.png"] == split
    assert list_faults(members) == faults


def test_archives_may_be_named_after_splits(data: Path) -> None:
    pets = {"cat/1.png": make_png(1), "dog/1.png": make_png(2)}
    write(data, {"pets-train.zip": make_zip(pets), "test/pets.tar.gz": make_tar(pets), "more.zip": make_zip(pets)})
    assert {(path.partition(":")[0], split) for path, _, split in read_rows(data)} == {
        ("data/pets-train.zip", "train"), ("data/test/pets.tar.gz", "test"), ("data/more.zip", ""),
    }  # fmt: skip


def test_archive_and_folder_may_each_be_a_split(data: Path) -> None:
    write(data, {"train/cat/1.png": make_png(1), "train/dog/1.png": make_png(2), "test.zip": make_zip(PETS)})
    assert {(path[:10], split) for path, _, split in read_rows(data)} == {
        ("data/train", "train"),
        ("data/test.", "test"),
    }


def test_archive_alone_may_be_named_anything(data: Path) -> None:
    assert {
        split for _, _, split in read_rows(write(data, {"test.zip": make_zip(PETS), "old-test.zip": make_zip(PETS)}))
    } == {""}


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("ds/train/cat ds/train/dog ds/test/cat docs", "ds/ has split folders with folders in them"),
        ("ds/ds/train/cat ds/ds/train/dog ds/ds/test/cat docs", "ds/ has split folders with folders in them"),
        ("a/train/cat a/test/dog b/train/dog", "a/ has split folders with folders in them"),
        ("cat/train/one cat/test/one dog/train/two", "cat/ has split folders with folders in them"),
        ("cat/train dog/old", "cat have split folders, and dog have none"),
        ("cat/train_images cat/test_images dog/train_images", "cat have split folders, and dog have none"),
        ("cat dog test/cat test/dog", "test/ is named after a split, and cat, dog beside it is not"),
        ("cat dog new/cat", "new/ has folders with the names of those beside it (cat)"),
        ("asl_train/asl_train/A asl_train/asl_train/B asl_test/asl_test", "asl_test/asl_test/ has images and no class"),
        ("a/ill a/normal b/ill b/normal c/ill", "a, b, c have the same folders in them (ill, normal)"),
        ("train/a/ill train/a/well train/b/ill train/b/well test/c", "a, b have the same folders in them"),
    ],
)
def test_folders_in_another_form_are_refused_with_what_was_found(names: str, found: str, data: Path) -> None:
    write(data, {f"{name}/1.png": make_png() for name in names.split()})
    with pytest.raises(ConvoyError, match=rf"^data/{re.escape(found)}.*: folders may be class folders \(cat/1.jpg\)"):
        read_folder(data)
    # A table of labels decides in any folders.
    paths = "".join(f"{name}/1.png,cat\n" for name in names.split())
    assert read_folder(write(data, {"labels.csv": f"path,label\n{paths}".encode()})).classes == ["cat"]


def test_folder_in_another_form_may_be_excluded(data: Path) -> None:
    write(data, PETS | {"new/cat/1.png": make_png(7)})
    assert read_folder(data, Selection(exclude=["new/"])).classes == ["cat", "dog"]


def test_unlabelled_images_in_a_split_archive_have_no_label(data: Path) -> None:
    flat = {f"test_images/{number}.png": make_png(number) for number in range(3)}
    write(data, {"train_images.zip": make_zip(PETS), "test_images.zip": make_zip(flat)})
    assert read_folder(data).classes == ["cat", "dog"]
    assert len(list_faults(read(data))) == 3


@pytest.mark.parametrize(
    "names", [("NA", "None", "nan"), ("007", "7", "7.0"), ("true", "no", "null"), ("é", "猫", " ")]
)
def test_names_of_classes_survive(data: Path, names: tuple[str, ...]) -> None:
    write(data, {f"{name}/1.png": make_png() for name in names})
    assert read_folder(data).classes == [label for _, label, _ in read_rows(data)] == sorted(names)


def test_order_is_that_of_the_paths_folder_by_folder(data: Path) -> None:
    names = ["a/2.png", "a/x/1.png", "a/x.png", "a-b/1.png", "b/10.png", "b/9.png"]
    write(data, dict.fromkeys(reversed(names), make_png()))
    assert [path for path, _, _ in read_rows(data)] == [f"data/{name}" for name in names]


# What is no image with a label


def test_files_that_operating_systems_create_are_ignored(data: Path) -> None:
    write(data, dict.fromkeys((".DS_Store", "cat/.DS_Store", "cat/thumbs.db", "dog/Desktop.ini"), b"junk"))
    write(data, dict.fromkeys(("@eaDir/cat/1.png", "$RECYCLE.BIN/1.png", "cat/Icon\r"), b"junk"))
    write(data, {"__MACOSX/cat/._1.png": b"junk", "cat/._1.png": b"junk", ".git/config": b"junk"})
    assert read_rows(write(data, PETS)) == AS_ROWS


def test_other_files_beside_class_folders_are_ignored(data: Path) -> None:
    extra = {"README.md": b"pets", "LICENSE": b"free", "make.py": b"print()", "classes.txt": b"1 cat\n2 dog\n"}
    write(data, PETS | extra | {"more.zip": make_zip({f"more/{n}": c for n, c in (PETS | extra).items()})})
    assert read_rows(data) == AS_ROWS + [
        (f"data/more.zip:more/{path[5:]}", label, split) for path, label, split in AS_ROWS
    ]


def test_files_that_may_hold_images_and_are_not_read_are_named(data: Path) -> None:
    write(
        data, PETS | {"more.7z": b"7z", "pets.zip": make_zip(PETS | {"inner.zip": make_zip(PETS)}), "labels.npy": b""}
    )
    kind = "has an unsupported format: extract or convert it"
    names = ["data/labels.npy", "data/more.7z", "data/pets.zip:inner.zip"]
    assert read_folder(data).notes == [f"{name} {kind}" for name in names]


def test_every_file_in_a_class_folder_counts_as_an_image(data: Path) -> None:
    write(data, PETS | {"dog/note.txt": b"a note", "dog/table.csv": b"path,label\n"})
    assert [path for path, label, _ in read_rows(data) if label == "dog"] == [
        "data/dog/1.png", "data/dog/note.txt", "data/dog/table.csv",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({**PETS, "stray.jpg": make_png()}, "data/stray.jpg"),
        ({**SPLIT_PETS, "train/stray.png": make_png()}, "data/train/stray.png"),
        ({"pets.zip": make_zip({**PETS, "stray.PNG": make_png()})}, "data/pets.zip:stray.PNG"),
        ({**PETS, "cat.zip": make_zip({"1.png": make_png()})}, "data/cat.zip:1.png"),
    ],
)
def test_image_in_no_class_folder_is_named(data: Path, files: dict[str, bytes], named: str) -> None:
    members = read(write(data, files))
    in_splits = " of a split" if "train/" in named else ""
    assert list_faults(members) == [f"{named} is in no class folder{in_splits}, so its label is unknown"]
    assert [member.path for member in members if member.label == ""] == [named]
    assert len(members) == 1 + len(SPLIT_PETS if "train/cat/1.png" in files else PETS)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, ""),
        ({"README.md": b"soon"}, "data/README.md is none of these"),
        ({"empty.zip": make_zip({})}, ""),
        ({"empty.tar": make_tar({}, "w")}, ""),
        ({"1.png": make_png(), "2.png": make_png()}, "data/1.png is in no class folder"),
        ({"train/1.png": make_png(), "test/2.png": make_png()}, "data/test/2.png is in no class folder"),
        ({"cat.zip": make_zip({"1.png": make_png()})}, "data/cat.zip:1.png is in no class folder"),
        ({"a.csv": b"path,label\n1.png,\n", "1.png": make_png()}, "data/1.png has no label in a.csv"),
    ],
)
def test_data_without_a_label_are_refused_with_what_was_found(data: Path, files: dict[str, bytes], found: str) -> None:
    with pytest.raises(
        ConvoyError, match=r"^data/ holds no images .*: in the folder or bucket that data\.dvc names, put"
    ) as refusal:
        read_folder(write(data, files))
    assert found in str(refusal.value)


def test_missing_data_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match="data/ holds no images"):
        read_folder(tmp_path / "data")


@pytest.mark.parametrize("name", [b"caf\xe9/1.png", b"cat/caf\xe9.png", b"caf\xe9.7z", b"caf\xe9.csv"])
def test_name_that_is_not_utf8_is_refused(data: Path, name: bytes) -> None:
    with pytest.raises(ConvoyError, match=r"caf\\udce9.*not UTF-8: rename it"):
        read_folder(write(data, PETS | {os.fsdecode(name): make_png()}))


def test_folder_that_must_not_be_read_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: str) -> None:
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConvoyError, match="data/ can't be read: Permission denied"):
        read_folder(data)


# Masks and other companions


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        ("cat/1.png cat/1_mask.png dog/2.png dog/2_mask.png", "*_mask*.png"),
        ("cat/a-1.png cat/a-1-seg.png dog/2.png", "*-seg*.png"),
        ("cat/x (1).png cat/x (1)_mask.png cat/x (1)_mask_1.png dog/2.png", "*_mask*.png"),
        ("cat/1.png cat/masks/1.png dog/2.png dog/masks/2.png", "masks/"),
        ("cat/1.jpg cat/1_flip.jpg cat/2.jpg cat/2_flip.jpg dog/3.jpg dog/3_flip.jpg", "*_flip*.jpg"),
        ("cat/1.png cat/1_black.png dog/2.png dog/3.png", ""),
        ("cat/big_cat.png cat/small_cat.png dog/dog_2.png dog/dog_1.png", ""),
    ],
)
def test_companions_are_named_with_a_pattern_to_exclude(data: Path, names: str, pattern: str) -> None:
    write(data, {name.replace("@", " "): make_png() for name in re.split(r" (?!\()", names)})
    notes = [note for note in read_folder(data).notes if "masks or other versions" in note]
    assert len(notes) == bool(pattern)
    if pattern:
        assert f"--exclude '{pattern}'" in notes[0]
        left = [sample.path for sample in read_folder(data, Selection(exclude=[pattern])).samples]
        assert 0 < len(left) < len(list(read_folder(data).samples))
        assert not any("mask" in path or "flip" in path or "seg" in path for path in left)


def test_only_included_images_are_read(data: Path) -> None:
    write(data, PETS | {"cat/1_rgb.png": make_png(8), "dog/2_rgb.png": make_png(9), "labels.zip": make_zip({})})
    found = [sample.path for sample in read_folder(data, Selection(include=["*_rgb.png"])).samples]
    assert found == ["data/cat/1_rgb.png", "data/dog/2_rgb.png"]


# Links


@pytest.fixture(params=[read_folder, reject_links])
def check_links(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    return request.param


def test_all_links_out_of_the_data_are_listed_at_once(data: Path, check_links: Callable[[Path], None]) -> None:
    write(data.parent, {"outside.png": make_png(), "outside/1.png": make_png(), "data-2/1.png": make_png()})
    write(data, PETS | {".hidden/1.png": make_png()})
    targets = {
        "cat/absolute": data.parent / "outside.png",
        "cat/relative": Path("../../outside.png"),
        "cat/sibling": data.parent / "data-2" / "1.png",
        "folder": data.parent / "outside",
        "inner": data / "cat",
        "nowhere": Path("nothing.png"),
        "circle": Path("circle"),
        "self": data,
        ".hidden/passwords": Path("/etc/passwd"),
    }
    for name, target in targets.items():
        (data / name).symlink_to(target)
    with pytest.raises(ConvoyError) as refusal:
        check_links(data)
    assert str(refusal.value).splitlines() == [
        f"data/{name} is a link to {target}, which is not a file in the data: replace it by the file itself"
        for name, target in sorted(targets.items())
    ]


def test_link_with_a_name_that_is_not_utf8_can_be_printed(data: Path, check_links: Callable[[Path], None]) -> None:
    (data / os.fsdecode(b"caf\xe9")).symlink_to("/etc/passwd")
    with pytest.raises(ConvoyError, match=r"data/caf\\udce9 is a link") as refusal:
        check_links(data)
    assert str(refusal.value).encode()


def test_link_to_a_file_in_the_data_is_that_file(data: Path, check_links: Callable[[Path], None]) -> None:
    write(data, PETS)
    (data / "dog" / "2.png").symlink_to("../cat/2.png")
    (data / "dog" / "3.png").symlink_to(data / "dog" / "2.png")
    check_links(data)
    assert read_rows(data) == [*AS_ROWS, ("data/dog/2.png", "dog", ""), ("data/dog/3.png", "dog", "")]
    assert [read_content(member) for member in read(data)[-2:]] == [PETS["cat/2.png"]] * 2


def test_data_may_be_reached_by_a_link(data: Path, check_links: Callable[[Path], None]) -> None:
    write(data, PETS)
    (data / "dog" / "2.png").symlink_to(data / "cat" / "2.png")
    (data.parent / "link").mkdir()
    (data.parent / "link" / "data").symlink_to(data)
    check_links(data.parent / "link" / "data")


def test_named_pipe_is_refused_without_waiting(data: Path, check_links: Callable[[Path], None]) -> None:
    os.mkfifo(write(data, PETS) / "cat" / "pipe.png")
    with pytest.raises(ConvoyError, match=r"data/cat/pipe\.png is not a regular file"):
        check_links(data)


@pytest.mark.parametrize("given", ["nothing", "file"])
def test_missing_folder_has_no_links(tmp_path: Path, given: str) -> None:
    (tmp_path / "file").touch()
    reject_links(tmp_path / given)


# Many files


def measure_seconds(data: Path, classes: int) -> float:
    """Of processor, to list the data: the least of three times."""
    taken = []
    for _ in range(3):
        start = time.process_time()
        assert len(read_folder(data).classes) == classes
        taken.append(time.process_time() - start)
    return min(taken)


def test_nested_folders_are_listed_in_linear_time(data: Path) -> None:
    def in_folders(depth: int) -> float:
        inside = {f"{'a/' * depth}{label}/{label}-{image}/1.png": b"" for label in range(3) for image in range(50)}
        return measure_seconds(write(data, {"pets.zip": make_zip(inside)}), 3)

    assert in_folders(4000) < 20 * in_folders(500)  # 8 times the names; if each were compared with each, 64 times


def test_cost_per_file_does_not_grow_with_their_number(data: Path) -> None:
    def with_files(numbers: range) -> float:
        for label in range(10):
            (data / str(label)).mkdir(exist_ok=True)
            for image in numbers:
                (data / str(label) / f"{image}.png").touch()
        return measure_seconds(data, 10)

    few, many = with_files(range(100)), with_files(range(100, 1600))
    assert many < 40 * few  # 16 times the files; if each were compared with each, 256 times
