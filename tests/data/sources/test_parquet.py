"""Parquet files with images, as data hubs export them: each row is a sample."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convoy.core.errors import ConvoyError
from convoy.data.image_io import InvalidImageError
from convoy.data.sources import parquet
from convoy.data.sources.folder import read_folder
from factories import PETS, list_faults, make_png, make_zip, read, read_rows, write

CLASSES = {"label": ["dog", "cat", "bird"]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def export(file: Path, columns: dict[str, Any], classes: dict[str, list[str]] | None = CLASSES, **options: int) -> None:
    """As `datasets.Dataset.to_parquet` does it: images as struct, the names of classes in the schema."""
    table = pa.table(columns)
    if classes is not None:
        features: dict[str, Any] = {name: {"_type": "Value"} for name in columns}
        features |= {name: {"names": names, "_type": "ClassLabel"} for name, names in classes.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, **options)


def make_structs(*contents: bytes | None) -> pa.Array:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.array([{"bytes": content, "path": f"{k}.png"} for k, content in enumerate(contents)], kind)


# What a file holds


@pytest.mark.parametrize("column", ["image", "img", "picture"])
@pytest.mark.parametrize("images", [make_structs(make_png(1), make_png(2)), pa.array([make_png(1), make_png(2)])])
def test_rows_become_samples_in_the_class_order_of_the_hub(data: Path, column: str, images: pa.Array) -> None:
    export(data / "train-00000-of-00001.parquet", {column: images, "label": [1, 0]})
    assert read_folder(data).classes == ["dog", "cat", "bird"]
    assert read_rows(data) == [
        ("data/train-00000-of-00001.parquet:0", "cat", "train"),
        ("data/train-00000-of-00001.parquet:1", "dog", "train"),
    ]
    assert [member.content for member in read(data)] == [make_png(1), make_png(2)]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (pa.array(["b", "a", "b"]), ["a", "b"]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array([10, 9, 10], pa.uint8()), ["9", "10"]),
        (pa.array([True, False, True]), ["False", "True"]),
        (pa.array(["NA", "007", "NA"]), ["007", "NA"]),
    ],
)
def test_labels_may_be_strings_or_unnamed_numbers(data: Path, labels: pa.Array, classes: list[str]) -> None:
    export(data / "pets.parquet", {"image": make_structs(*[make_png()] * 3), "label": labels}, classes=None)
    assert read_folder(data).classes == classes
    assert [label for _, label, _ in read_rows(data)] == [str(label) for label in labels.to_pylist()]


def test_numbers_in_several_files_are_in_the_order_of_numbers(data: Path) -> None:
    for name, labels in (("train", [10, 2]), ("test", [2, 1])):
        export(data / f"{name}.parquet", {"image": make_structs(make_png(), make_png()), "label": labels}, classes=None)
    assert read_folder(data).classes == ["1", "2", "10"]


def test_only_column_of_classes_may_have_another_name(data: Path) -> None:
    classes = {"digit": ["zero", "one"], "split": ["train", "test"]}
    export(
        data / "a.parquet", {"image": make_structs(make_png(), make_png()), "digit": [0, 1], "split": [1, 0]}, classes
    )
    assert [row[1:] for row in read_rows(data)] == [("zero", "test"), ("one", "train")]


@pytest.mark.parametrize("folder", ["", "data/", "mnist/"])
def test_split_is_read_from_the_file_name(data: Path, folder: str) -> None:
    names = {"train-00000-of-00002": "train", "train-00001-of-00002": "train", "validation-00000-of-00001": "val",
             "test-00000-of-00001-2f9dd3a6c1b4": "test", "Test": "test", "trainable": "", "pets": ""}  # fmt: skip
    for name in names:
        export(data / folder / f"{name}.parquet", {"image": make_structs(make_png()), "label": [0]})
    assert {path.split("/")[-1]: split for path, _, split in read_rows(data)} == {
        f"{name}.parquet:0": split for name, split in names.items()
    }


@pytest.mark.parametrize("outer", ["", "default/"])
def test_split_is_read_from_the_folder_name(data: Path, outer: str) -> None:
    for split in ("train", "validation", "test"):
        export(data / outer / split / "0000.parquet", {"image": make_structs(make_png()), "label": [0]})
    assert [split for _, _, split in read_rows(data)] == ["test", "train", "val"]


def test_split_and_group_come_from_columns(data: Path) -> None:
    said = {"label": [0, 1, 2], "split": ["test", "Valid", None], "group": [7, None, 8]}
    export(data / "train.parquet", {"image": make_structs(*[make_png()] * 3), **said})
    members = read(data)
    assert [(m.split, m.group) for m in members] == [("test", "7"), ("val", ""), ("", "8")]


def test_dataset_may_be_a_single_file(tmp_path: Path) -> None:
    export(tmp_path / "data", {"image": make_structs(make_png()), "label": [0]})
    assert read_rows(tmp_path / "data") == [("data:0", "dog", "")]


def test_parquet_and_class_folders_are_one_data_set(data: Path) -> None:
    export(data / "pets.parquet", {"image": make_structs(make_png()), "label": [2]})
    write(data, PETS | {"ant/1.png": make_png(), "stray.png": make_png()})
    assert read_folder(data).classes == ["dog", "cat", "bird", "ant"]
    assert [m.label for m in read(data)] == ["ant", "cat", "cat", "dog", "", "bird"]


@pytest.mark.parametrize("options", [{"row_group_size": 20}, {"write_batch_size": 20}])  # groups, or pages in one
def test_no_more_than_a_few_rows_are_in_memory_at_once(data: Path, options: dict[str, int]) -> None:
    images = make_structs(*(k.to_bytes(2, "big") * 50_000 for k in range(400)))  # 40 MB
    export(data / "train.parquet", {"image": images, "label": [0] * 400}, **options)
    del images
    pool = pa.default_memory_pool()
    pool.release_unused()
    before = pool.bytes_allocated()
    most = max(pool.bytes_allocated() - before for _ in read_folder(data).samples)
    assert most < 10_000_000


# Rows with a fault


def test_every_row_with_a_fault_is_named_and_the_others_are_read(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_FILE_BYTES", 1000)
    images = make_structs(make_png(), None, make_png(), make_png(), make_png(), bytes(1001), make_png())
    said = {"label": [0, 0, -1, None, 3, 0, 0], "split": ["train"] * 6 + ["trian"]}
    export(data / "a.parquet", {"image": images, **said})
    members = read(data)
    assert list_faults(members) == [
        "data/a.parquet:1 has no bytes in its row",
        "data/a.parquet:2 has no label",
        "data/a.parquet:3 has no label",
        "data/a.parquet:4 has the label 3, but its file has names only for 0 to 2",
        "data/a.parquet:5 is larger than 256 MiB",
        "data/a.parquet:6 has the split 'trian', which is none of train, val, test",
    ]
    assert members[0].content == make_png()


@pytest.mark.parametrize("images", [pa.array([make_png(), None]), pa.array([{"bytes": make_png()}, None])])
def test_row_with_nothing_in_it_is_named(data: Path, images: pa.Array) -> None:
    export(data / "a.parquet", {"image": images, "label": [0, 0]})
    assert list_faults(read(data)) == ["data/a.parquet:1 has no bytes in its row"]


def test_floats_without_fraction_are_read_as_integers(data: Path) -> None:
    images = make_structs(*[make_png()] * 3)
    export(data / "pets.parquet", {"image": images, "label": [10.0, 9.0, 0.5]}, classes=None)
    assert read_folder(data).classes == ["0.5", "9", "10"]


def test_files_may_be_in_nested_folders(data: Path) -> None:
    for split in ("train", "test"):
        export(data / "convert" / "default" / split / "0000.parquet", {"image": make_structs(make_png()), "label": [1]})
    assert {split for _, _, split in read_rows(write(data, {"README.md": b"pets"}))} == {"train", "test"}


@pytest.mark.parametrize("labels", [["a", ""], ["a", None], [1.0, float("nan")], [7, -1]])
def test_row_with_no_label_is_named(data: Path, labels: list) -> None:
    export(data / "a.parquet", {"image": make_structs(make_png(), make_png()), "label": labels}, classes=None)
    assert list_faults(read(data)) == ["data/a.parquet:1 has no label"]
    assert len(read_folder(data).classes) == 1


# Files that are refused


@pytest.mark.parametrize(
    ("columns", "classes", "fault"),
    [
        ({"fine": [0], "coarse": [0]}, {"fine": ["a"], "coarse": ["b"]},
         "has several columns of classes, fine, coarse, but no column label: name the one to predict"),
        ({"breed": [0]}, {}, "has the columns image, breed, but no column label: name"),
        ({"label": [[0, 1]]}, {}, "has several labels for an image in the column label"),
        ({"label": [0], "img": [b""]}, {}, "has several columns of bytes, image, img: rename"),
    ],
)  # fmt: skip
def test_file_whose_columns_are_unclear_is_refused(
    data: Path, columns: dict[str, Any], classes: dict[str, list[str]], fault: str
) -> None:
    export(data / "a.parquet", {"image": make_structs(make_png()), **columns}, classes)
    with pytest.raises(ConvoyError, match=rf"data/a\.parquet {fault}"):
        read_folder(data)


def test_two_columns_of_one_name_are_refused(data: Path) -> None:
    table = pa.Table.from_arrays([make_structs(make_png()), pa.array([0]), pa.array([1])], ["image", "label", "label"])
    pq.write_table(table, data / "a.parquet")
    with pytest.raises(ConvoyError, match=r"data/a\.parquet has two columns of the same name: rename one of them"):
        read_folder(data)


def test_images_in_parquet_in_an_archive_are_refused(data: Path, tmp_path: Path) -> None:
    export(tmp_path / "a.parquet", {"image": make_structs(make_png()), "label": [0]})
    write(data, {"pets.zip": make_zip({"a.parquet": (tmp_path / "a.parquet").read_bytes()})})
    with pytest.raises(ConvoyError, match=r"data/pets\.zip:a\.parquet contains images: extract it from the archive"):
        read_folder(data)


@pytest.mark.parametrize("whole", [0.0, 0.001, 0.5, 0.999])
def test_truncated_file_is_refused(data: Path, whole: float) -> None:
    export(data / "a.parquet", {"image": make_structs(make_png()), "label": [0]})
    content = (data / "a.parquet").read_bytes()
    (data / "a.parquet").write_bytes(content[: int(whole * len(content))])
    with pytest.raises(ConvoyError, match=r"data/a\.parquet is not a complete Parquet file .*: replace it"):
        read_folder(data)


def test_invalid_schema_metadata_is_ignored(data: Path) -> None:
    for row, said in enumerate(["{", "[]", '{"info": 3}', '{"info": {"features": {"label": 3}}}']):
        table = pa.table({"image": make_structs(make_png()), "label": [row]}).replace_schema_metadata(
            {"huggingface": said}
        )
        pq.write_table(table, data / f"{row}.parquet")
    assert read_folder(data).classes == ["0", "1", "2", "3"]


@settings(max_examples=200)
@given(changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=3))
def test_corrupt_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, int]]
) -> None:
    data = tmp_path_factory.getbasetemp() / "data"
    export(data / "a.parquet", {"image": make_structs(make_png(), make_png()), "label": [0, 1]})
    content = bytearray((data / "a.parquet").read_bytes())
    for place, byte in changes:
        content[int(place * len(content))] = byte
    (data / "a.parquet").write_bytes(content)
    try:
        members = list(read_folder(data).samples)
    except ConvoyError as refusal:
        assert "a.parquet" in str(refusal) or "holds no images" in str(refusal)
    else:
        assert all(isinstance(member.content, bytes | InvalidImageError) for member in members)
    finally:
        shutil.rmtree(data)


def test_corrupt_byte_is_found_by_the_page_checksum(data: Path) -> None:
    image = make_png(7)
    options: dict[str, Any] = {"write_page_checksum": True, "compression": "none", "use_dictionary": False}
    export(data / "a.parquet", {"image": make_structs(image, make_png(8)), "label": [0, 1]}, **options)
    content = (data / "a.parquet").read_bytes()
    assert len(read_rows(data)) == 2
    (data / "a.parquet").write_bytes(content.replace(image, image[:-1] + b"\0"))
    with pytest.raises(ConvoyError, match=r"data/a\.parquet is not a complete Parquet file"):
        list(read_folder(data).samples)


def test_negative_number_is_no_class(data: Path) -> None:
    export(data / "a.parquet", {"image": make_structs(*map(make_png, range(4))), "label": [0, 1, -2, -3]})
    members = read(data)
    assert list_faults(members) == [
        f"data/a.parquet:{row} has the label {label}, but its file has names only for 0 to 2"
        for row, label in ((2, -2), (3, -3))
    ]


def test_file_with_fewer_rows_than_declared_is_refused(data: Path) -> None:
    export(data / "a.parquet", {"image": make_structs(make_png()), "label": [0]})
    promised = dataclasses.replace(parquet.open_parquet("a.parquet", str(data / "a.parquet"), ""), count=2)
    with pytest.raises(ConvoyError, match=r"a\.parquet is not a complete Parquet file \(1 of 2 rows\)"):
        list(parquet.iter_samples(promised))
