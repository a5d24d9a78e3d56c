"""Label tables: each row finds its image and keeps its columns, or is named with its fault."""

import csv
import io
import shutil
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoy.core.errors import ConvoyError
from convoy.data.image_io import InvalidImageError
from convoy.data.sources.base import Selection, TableConfig
from convoy.data.sources.folder import read_folder
from factories import PETS, list_faults, make_png, make_tar, make_zip, read, read_content, read_rows, write

LABELS = "path,label\ncat/1.png,siamese\ncat/2.png,persian\ndog/1.png,pug\n"
AS_ROWS = [("cat/1.png", "siamese", ""), ("cat/2.png", "persian", ""), ("dog/1.png", "pug", "")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def make_rows(name: str) -> list[tuple[str, str, str]]:
    return [(f"{name}{path}", label, split) for path, label, split in AS_ROWS]


# Where tables lie


def test_labels_of_a_table_override_class_folders(data: Path) -> None:
    write(data, PETS | {"labels.csv": LABELS})
    assert read_folder(data).classes == ["persian", "pug", "siamese"]
    assert read_rows(data) == make_rows("data/")


def test_table_may_lie_in_a_folder_around_all_files(data: Path) -> None:
    write(data, {f"pets/{name}": content for name, content in (PETS | {"labels.csv": LABELS}).items()})
    assert read_rows(write(data, {"README.md": b"pets"})) == make_rows("data/pets/")


@pytest.mark.parametrize("outer", ["", "pets/", "of/last/week/"])
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_table_may_lie_in_an_archive_with_its_images(data: Path, outer: str, make: type) -> None:
    inside = {f"{outer}{name}": content for name, content in (PETS | {"labels.csv": LABELS.encode()}).items()}
    write(data, {"pets.zip" if make is make_zip else "pets.tar.gz": make(inside)})
    assert [row[1:] for row in read_rows(data)] == [row[1:] for row in AS_ROWS]
    assert [read_content(member) for member in read(data)] == list(PETS.values())


@pytest.mark.parametrize("outer", ["", "pets/", "of/last/week/"])
def test_table_may_name_the_images_in_an_archive_beside_it(data: Path, outer: str) -> None:
    write(data, {f"{outer}labels.csv": LABELS, f"{outer}images.zip": make_zip(PETS)})
    assert read_rows(data) == make_rows(f"data/{outer}images.zip:")


def test_any_table_format_works_with_any_image_location(data: Path) -> None:
    loose, *others = PETS.items()
    write(data, dict([loose]) | {"a.tar.gz": make_tar(dict(others)), "labels.csv": LABELS, "notes.md": b"pets"})
    assert read_rows(data) == [(f"data/a.tar.gz:{path}" if k else f"data/{path}", label, split)
                          for k, (path, label, split) in enumerate(AS_ROWS)]  # fmt: skip


def test_order_is_that_of_the_files_and_not_of_the_table(data: Path) -> None:
    first, *lines = LABELS.splitlines()
    write(data, PETS | {"labels.csv": "\n".join([first, *reversed(lines)])})
    assert read_rows(data) == make_rows("data/")


def test_tables_named_after_splits_are_merged(data: Path) -> None:
    write(data, PETS | {"Train.csv": "path,label\ncat/1.png,a\n", "test.csv": "path,label\ncat/2.png,b\n"})
    write(data, {"more.csv": "file_name,label\ndog/1.png,a\n"})
    assert [(label, split) for _, label, split in read_rows(data)] == [("a", "train"), ("b", "test"), ("a", "")]


def test_table_in_the_folder_of_a_split_is_of_that_split(data: Path) -> None:
    for split, name in (("train", "1.png"), ("validation", "2.png"), ("test", "3.png")):
        write(data / split, {name: make_png(), "metadata.csv": f"file_name,label\n{name},cat\n"})
    assert read_rows(data) == [
        ("data/test/3.png", "cat", "test"), ("data/train/1.png", "cat", "train"),
        ("data/validation/2.png", "cat", "val"),
    ]  # fmt: skip


def test_split_and_group_come_from_columns(data: Path) -> None:
    table = "group,split,label,path,age\nA,Train,a,cat/1.png,3\nB, validation ,a,cat/2.png,4\n,,b,dog/1.png,5\n"
    members = read(write(data, PETS | {"test.csv": table}))
    assert [(m.label, m.split, m.group) for m in members] == [("a", "train", "A"), ("a", "val", "B"), ("b", "", "")]


def test_table_may_be_parquet(data: Path) -> None:
    table = pd.read_csv(io.StringIO(LABELS)).assign(split=["train", "test", None], group=[7, 8, 9])
    write(data, PETS)
    table.to_parquet(data / "labels.parquet")
    assert [row[1:] for row in read_rows(data)] == [("siamese", "train"), ("persian", "test"), ("pug", "")]
    assert [member.group for member in read(data)] == ["7", "8", "9"]


def test_parquet_table_in_an_archive_is_read_like_another(data: Path) -> None:
    table = io.BytesIO()
    pd.read_csv(io.StringIO(LABELS)).to_parquet(table)
    assert read_rows(write(data, {"pets.zip": make_zip(PETS | {"a.parquet": table.getvalue()})})) == make_rows(
        "data/pets.zip:"
    )


def test_parquet_class_indices_become_class_names(data: Path) -> None:
    table = pa.table({"path": list(PETS), "label": [1, 0, -1]}).replace_schema_metadata(
        {"huggingface": '{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}'}
    )
    write(data, PETS)
    pq.write_table(table, data / "labels.parquet")
    members = read(data)
    assert [member.label for member in members] == ["dog", "cat", ""]
    assert list_faults(members) == ["data/dog/1.png has no label in labels.parquet"]


# What columns may be called, and paths may be


@pytest.mark.parametrize("header", ["Path,Label,Split,Group", "file name, LABEL ,split,group",
                                    "image-path,class,Split,GROUP", "filename,Category,SPLIT,Group"])  # fmt: skip
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_columns_are_found_in_any_case_and_with_any_separator(data: Path, header: str, separator: str) -> None:
    lines = [header, "cat/1.png,siamese,train,A", "cat/2.png,persian,test,B", "dog/1.png,pug,,"]
    write(data, PETS | {"labels.tsv": "\n".join(lines).replace(",", separator)})
    source = read_folder(data)
    assert source.extra_columns == []
    assert [(m.label, m.split, m.group) for m in source.samples] == [
        ("siamese", "train", "A"), ("persian", "test", "B"), ("pug", "", ""),
    ]  # fmt: skip


def test_plainest_of_several_path_or_label_columns_is_used(data: Path) -> None:
    table = "file_name,class,Label,label,path\n1.png,pet,x,siamese,cat/1.png\n2.png,pet,y,persian,cat/2.png\n"
    source = read_folder(write(data, PETS | {"labels.csv": table}))
    assert source.extra_columns == ["file_name", "class", "Label"]
    assert [member.label for member in source.samples][:2] == ["siamese", "persian"]


@pytest.mark.parametrize("ending", [".png", ""])
@pytest.mark.parametrize("archive", [False, True])
def test_files_may_be_named_without_folder_and_suffix(data: Path, ending: str, archive: bool) -> None:
    images = {"images/part-1/a.png": make_png(1), "images/part-2/b.v2.png": make_png(2), "images/notes/a.txt": b"of a"}
    write(data, {"images.zip": make_zip(images)} if archive else images)
    write(data, {"labels.csv": f"image_id,label\na{ending},cat\nb.v2{ending},dog\n"})
    assert [label for _, label, _ in read_rows(data)] == ["cat", "dog"]


@pytest.mark.parametrize("outer", ["data/", "home/me/pets/", "work\\"])
def test_paths_may_begin_with_folders_of_another_machine(data: Path, outer: str) -> None:
    write(data, PETS | {"labels.csv": LABELS.replace("cat/", f"{outer}cat/").replace("dog/", f"{outer}dog/")})
    assert read_rows(data) == make_rows("data/")


def test_table_may_name_images_in_archives_in_folders_below_it(data: Path) -> None:
    loose, *others = PETS.items()
    write(data, {"labels.csv": LABELS, "of/a.zip": make_zip(dict([loose])), "of/b.tar.gz": make_tar(dict(others))})
    assert [row[1:] for row in read_rows(data)] == [row[1:] for row in AS_ROWS]


def test_ambiguous_file_name_is_reported(data: Path) -> None:
    write(
        data,
        {
            "x/1.png": make_png(1),
            "y/1.png": make_png(2),
            "y/2.png": make_png(3),
            "labels.csv": "file,label\n1.png,a\n2.png,b\n",
        },
    )
    assert list_faults(read(data)) == [
        "data/x/1.png is not in labels.csv, so its label is unknown",
        "data/y/1.png is not in labels.csv, so its label is unknown",
        "data/1.png is named in labels.csv, but 2 files have this name: add their folders, or leave out the others by"
        " dataset.exclude",
    ]


def test_rows_are_all_paths_or_all_file_names(data: Path) -> None:
    write(data, {"1.png": make_png(1), "masks/2.png": make_png(2), "labels.csv": "path,label\n1.png,a\n2.png,b\n"})
    assert "data/2.png is named in labels.csv, but there is no such file" in list_faults(read(data))


def test_split_folders_count_if_the_table_has_no_split_column(data: Path) -> None:
    write(data, {"train/1.png": make_png(1), "Test/2.png": make_png(2), "old/3.png": make_png(3)})
    write(data, {"labels.csv": "path,label\ntrain/1.png,a\nTest/2.png,b\nold/3.png,a\n"})
    assert [row[1:] for row in read_rows(data)] == [("b", "test"), ("a", ""), ("a", "train")]
    write(data, {"labels.csv": "path,label,split\ntrain/1.png,a,\nTest/2.png,b,val\nold/3.png,a,\n"})
    assert [row[1:] for row in read_rows(data)] == [("b", "val"), ("a", ""), ("a", "")]


def test_submission_is_no_table_of_labels(data: Path) -> None:
    write(data, PETS | {"train.csv": LABELS, "sample_submission.csv": LABELS.replace("pug", "cat")})
    assert [row[1] for row in read_rows(data)] == ["siamese", "persian", "pug"]
    assert read_folder(data).notes == [
        "data/sample_submission.csv has the name of a sample submission, whose labels are only examples: it is not used"
    ]


# Other columns


def test_other_columns_come_with_each_image_as_text(data: Path) -> None:
    table = "site,path,label,path.1,age\nNA,cat/1.png,a,x,007\n,cat/2.png,b,y,7\nlab,dog/1.png,b,x,\n"
    source = read_folder(write(data, PETS | {"labels.csv": table}))
    assert source.extra_columns == ["site", "path.1", "age"]
    assert [member.extra_values for member in source.samples] == [("NA", "x", "007"), ("", "y", "7"), ("lab", "x", "")]


def test_missing_columns_are_empty_and_the_first_row_wins(data: Path) -> None:
    write(data, PETS | {"train.csv": "path,label,site\ncat/1.png,a,lab\ncat/1.png,a,home\n"})
    source = read_folder(write(data, {"test.csv": "path,label\ncat/2.png,b\ndog/1.png,a\n"}))
    assert [(member.path, member.extra_values) for member in source.samples] == [
        ("data/cat/1.png", ("lab",)),
        ("data/cat/2.png", ("",)),
        ("data/dog/1.png", ("",)),
    ]


def test_column_with_too_many_values_is_excluded(data: Path) -> None:
    names = [f"{number}.png" for number in range(51)]
    table = pd.DataFrame({"path": names, "label": "a", "number": range(51), "coarse": [f"{n % 50}" for n in range(51)]})
    write(data, {name: make_png(number) for number, name in enumerate(names)})
    table.to_csv(data / "labels.csv", index=False)
    assert read_folder(data).extra_columns == ["coarse"]


def test_other_parquet_columns_are_kept_unless_lists(data: Path) -> None:
    write(data, PETS)
    table = {"path": list(PETS), "label": ["a", "b", "a"], "boxes": [[1], [2], []], "night": [True, None, False]}
    pq.write_table(pa.table(table), data / "labels.parquet")
    source = read_folder(data)
    assert source.extra_columns == ["night"]
    assert [member.extra_values for member in source.samples] == [("True",), ("",), ("False",)]


# Words as they are written


@pytest.mark.parametrize("table", [
    '\ufeffpath,label\ncat/1.png,NA\ncat/2.png,007\ndog/1.png,true\n',
    '\ufeff"path","label"\r\n"cat/1.png","NA"\r\n"cat/2.png",007\r\n"dog/1.png",true\r\n',
    'path,label\n./cat/1.png,NA\ncat//2.png,007\n\n,\ndog/./1.png,true',
    'path,label\ncat\\1.png,NA\n.\\cat\\2.png,007\ndog\\1.png,true\n',
    'label,file_name\nNA,cat/1.png\n007,cat/2.png\ntrue,dog/1.png\n',
])  # fmt: skip
def test_labels_are_read_as_text(data: Path, table: str) -> None:
    assert [label for _, label, _ in read_rows(write(data, PETS | {"labels.csv": table}))] == ["NA", "007", "true"]


def test_commas_quotes_and_spaces_in_paths_and_labels_survive(data: Path) -> None:
    name, label = 'a, "b" c/ 1 .png', ' a, "b"\nc '
    file = io.StringIO()
    csv.writer(file).writerows([("path", "label"), (name, label)])
    write(data, {name: make_png(), "labels.csv": file.getvalue()})
    assert read_rows(data) == [(f"data/{name}", label, "")]


def test_second_file_of_the_same_path_gets_no_label(data: Path) -> None:
    table = "path,label\n" + "".join(f"{name},{name[:3]}\n" for name in PETS)
    members = read(write(data, PETS | {"labels.csv": table, "pets.zip": make_zip(PETS)}))
    assert list_faults(members) == [
        f"data/pets.zip:{name} has the path of data/{name}, to which labels.csv refers: keep one" for name in PETS
    ]


def test_split_from_one_table_is_kept_if_another_has_none(data: Path) -> None:
    labels = "path,label\n" + "".join(f"{name},{name[:3]}\n" for name in PETS)
    train = "".join(labels.splitlines(keepends=True)[:3])
    for tables in ({"labels.csv": labels, "train.csv": train}, {"a.csv": labels, "train.csv": train}):
        shutil.rmtree(data, ignore_errors=True)
        found = read_rows(write(data, PETS | tables))
        assert sorted(split for *_, split in found) == [*[""] * (len(PETS) - 2), "train", "train"]


def test_missing_file_does_not_hide_the_common_prefix(data: Path) -> None:
    table = "path,label\n" + "".join(
        f"/export/me/{name},{name[:3]}\n".removeprefix("/") for name in ["gone.png", *PETS]
    )
    members = read(write(data, PETS | {"labels.csv": table}))
    assert sum(not isinstance(member.content, InvalidImageError) for member in members) == len(PETS)


@pytest.mark.parametrize(("column", "noted"), [("subset", True), ("split", False)])
def test_column_with_split_values_is_reported(data: Path, column: str, noted: bool) -> None:
    lines = [f"{name},{name[:3]},{'train' if n else 'Test'}\n" for n, name in enumerate(PETS)]
    source = read_folder(write(data, PETS | {"labels.csv": f"path,label,{column}\n{''.join(lines)}"}))
    said = (
        f"the column {column} of labels.csv has the values test, train: to split the images by it, set"
        f" dataset.table.split={column}"
    )
    assert source.notes == [said] * noted


@pytest.mark.parametrize(("column", "values", "noted"), [("is_test", "01", True), ("latest", "01", False),
                                                         ("test_bench", "012", False)])  # fmt: skip
def test_binary_column_named_after_a_split_is_reported(data: Path, column: str, values: str, noted: bool) -> None:
    lines = [f"{name},{name[:3]},{values[n % len(values)]}\n" for n, name in enumerate(PETS)]
    source = read_folder(write(data, PETS | {"labels.csv": f"path,label,{column}\n{''.join(lines)}"}))
    assert [f"the column {column} of labels.csv is not used" in note for note in source.notes] == [True] * noted


def test_names_match_in_either_unicode_normalization(data: Path) -> None:
    apart, together = "cafe\u0301.png", "caf\u00e9.png"
    for file, said in ((apart, together), (together, apart)):
        write(data, PETS | {f"cat/{file}": make_png(7), "labels.csv": f"path,label\ncat/{said},cat\ndog/0.png,dog\n"})
        labels = {member.path: member.label for member in read(data)}
        assert labels[f"data/cat/{file}"] == "cat"
        assert f"data/cat/{said}" not in labels
        (data / "cat" / file).unlink()


def test_table_in_a_class_folder_is_reported_as_unused(data: Path) -> None:
    table = "path,label\n1.png,siamese\n"
    assert (
        "data/cat/labels.csv is not used: tables of labels must be at the top"
        in read_folder(write(data, PETS | {"cat/labels.csv": table})).notes
    )


# no blanks alone, which are no line to pandas; and in names nothing that a path is made of
words = st.text(st.characters(codec="utf-8")).filter(str.strip)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0/\\.")).map(lambda name: f"a{name}.png"[-50:])


single_labels = words.filter(lambda label: not set(label) & set("|;["))  # lists of labels are refused


@given(
    st.dictionaries(names, st.tuples(single_labels, st.sampled_from(["", "train", "val", "test"]), words), min_size=1)
)
def test_any_text_round_trips_through_csv(
    tmp_path_factory: pytest.TempPathFactory, said: dict[str, tuple[str, str, str]]
) -> None:
    data = tmp_path_factory.getbasetemp() / "data"
    file = io.StringIO(newline="")
    columns = ("path", "label", "split", "group")
    csv.writer(file).writerows([columns, *((name, *words) for name, words in said.items())])
    write(data, dict.fromkeys(said, b"") | {"labels.csv": file.getvalue()})
    try:
        assert {m.path: (m.label, m.split, m.group) for m in read(data)} == {
            f"data/{name}": words for name, words in said.items()
        }
    finally:
        shutil.rmtree(data)


# Rows with a fault


def test_every_row_with_a_fault_is_named_and_the_others_are_read(data: Path) -> None:
    outside = write(data.parent, {"outside.png": make_png()}) / "outside.png"
    table = f"""path,label,split
cat/1.png,,train
cat/2.png,cat,trian
cat/3.png,cat,
../outside.png,cat,
..\\outside.png,cat,
dog/../cat/2.png,cat,trian
{outside},cat,
C:\\cat\\7.png,cat,
,cat,
dog/1.png,dog,test
"""
    members = read(write(data, PETS | {"labels.csv": table, "dog/2.png": make_png(), "dog/note.txt": b"a note"}))
    assert list_faults(members) == [
        "data/cat/1.png has no label in labels.csv",
        "data/cat/2.png has the split 'trian' in labels.csv, which is none of train, val, test",
        "data/dog/2.png is not in labels.csv, so its label is unknown",
        "data/cat/3.png is named in labels.csv, but there is no such file",
        "../outside.png is named in labels.csv and points out of the data",
        "..\\outside.png is named in labels.csv and points out of the data",
        f"data/{outside} is named in labels.csv, but there is no such file",
        "data/C:\\cat\\7.png is named in labels.csv, but there is no such file",
        "data/labels.csv has a row without a path",
    ]
    assert [m.path for m in members if isinstance(m.content, str)] == ["data/dog/1.png"]


def test_image_in_no_table_is_reported_with_all_tables(data: Path) -> None:
    write(data, PETS | {"train.csv": "path,label\ncat/1.png,a\n", "test.csv": "path,label\ncat/2.png,b\n"})
    assert list_faults(read(data)) == ["data/dog/1.png is not in test.csv or train.csv, so its label is unknown"]


def test_repeated_path_is_one_sample_per_label(data: Path) -> None:
    table = (
        "path,label\ncat/1.png,cat\n./cat/1.png,cat\ncat/2.png,cat\ncat/2.png,dog\ndog/1.png,dog\nx.png,a\nx.png,a\n"
    )
    members = read(write(data, PETS | {"labels.csv": table, "pets.zip": make_zip({"dog/2.png": make_png()})}))
    assert [(member.path, member.label) for member in members] == [
        ("data/cat/1.png", "cat"), ("data/cat/2.png", "cat"), ("data/cat/2.png", "dog"), ("data/dog/1.png", "dog"),
        ("data/pets.zip:dog/2.png", ""), ("data/x.png", "a"),
    ]  # fmt: skip


def test_path_in_two_splits_is_two_samples(data: Path) -> None:
    write(data, PETS | {"train.csv": LABELS, "test.csv": "path,label\ncat/1.png,siamese\n"})
    assert [split for path, _, split in read_rows(data) if path == "data/cat/1.png"] == ["test", "train"]


def test_label_twice_in_an_archive_does_not_unpack_it_twice(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(data, {"labels.csv": LABELS + "cat/1.png,tabby\n", "pets.tar.gz": make_tar(PETS)})
    source = read_folder(data)
    monkeypatch.setattr("_compression.DecompressReader._rewind", None)
    assert [m.label for m in source.samples] == ["siamese", "tabby", "persian", "pug"]


def test_table_alone_names_files_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path, PETS | {"data.csv": LABELS})
    assert list_faults(read(tmp_path / "data.csv"))[0] == "cat/1.png is named in data.csv, but there is no such file"


# Tables that are none


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        (b"path,label\ncat/1.png,caf\xe9\n", "is not in UTF-8"),
        (LABELS.encode("utf-16"), "is not in UTF-8"),
        (b'path,label\n"cat/1.png,cat\n', "is not complete CSV .*EOF inside string"),
        (b"path,label\ncat/1.png,cat,3\ncat/2.png,cat,4\n", "is not complete CSV .*Length of header"),
        (b"path,label\ncat/1.png,cat\ncat/2.png,cat,4\n", "is not complete CSV .*Expected 2 fields in line 3, saw 3"),
        (b'"path,label\n', "is not complete CSV .*EOF inside string"),
    ],
)
@pytest.mark.parametrize("archived", [False, True])
def test_unreadable_csv_is_refused_with_the_fix(data: Path, table: bytes, fault: str, archived: bool) -> None:
    files = PETS | {"labels.csv": table}
    write(data, {"pets.zip": make_zip(files)} if archived else files)
    name = r"data/pets\.zip:labels\.csv" if archived else r"data/labels\.csv"
    with pytest.raises(ConvoyError, match=rf"{name} {fault}.*: (save it as CSV in UTF-8|put commas between)"):
        read_folder(data)


def test_table_in_an_archive_that_cannot_be_read_is_refused(data: Path) -> None:
    archive = make_zip(PETS | {"labels.csv": LABELS.encode()}).replace(b"siamese", b"japanes")
    with pytest.raises(ConvoyError, match=r"data/pets\.zip:labels\.csv can't be read: Bad CRC-32.*: replace it"):
        read_folder(write(data, {"pets.zip": archive}))


@pytest.mark.parametrize("table", ["name,size\ncat,3\n", "image_id,dx\ncat/1.png,nv\n", "label\ncat\n", "a;b\n1,5;2\n"])
def test_unknown_table_is_refused_with_its_columns_and_settings(data: Path, table: str) -> None:
    columns = ", ".join(table.partition("\n")[0].replace(";", ",").split(","))
    with pytest.raises(ConvoyError) as refusal:
        read_folder(write(data, PETS | {"notes.csv": table}))
    assert str(refusal.value).startswith(f"data/notes.csv has the columns {columns}: ")
    assert "--table notes.csv --path COLUMN --label COLUMN" in str(refusal.value)
    without = Selection(exclude=["notes.csv"])
    assert read_folder(data, without).notes == ["data/notes.csv is left out by dataset.include or dataset.exclude"]


@pytest.mark.parametrize("table", ["", "\n\n"])
def test_empty_table_is_refused_too(data: Path, table: str) -> None:
    with pytest.raises(ConvoyError, match=r"data/notes\.csv is empty"):
        read_folder(write(data, PETS | {"notes.csv": table}))


# Paths and files that do not meet


def test_one_sentence_counts_rows_and_files_without_partner(data: Path) -> None:
    rows = "".join(f"bird/{number}.png,bird\n" for number in range(5))
    source = read_folder(write(data, PETS | {"labels.csv": f"path,label\n{rows}cat/1.png,cat\n"}))
    said = (
        "labels.csv: 5 of 6 rows lead to no file (bird/0.png, bird/1.png, bird/2.png, ...), and 2 images are in no row"
        " (data/cat/2.png, data/dog/1.png)"
    )
    assert source.mismatch
    assert source.mismatch.message == said
    assert said in source.notes


@pytest.mark.parametrize("start", ["/Users/me/set/", "C:\\data\\set\\", "\\\\server\\set\\", "../set/", "D:/set/"])
def test_paths_of_another_machine_lead_to_the_same_ends(data: Path, start: str) -> None:
    table = "".join(f"{start}{name},{name[:3]}\n" for name in PETS)
    if start == "../set/":
        write(data, {f"set/{name}": content for name, content in PETS.items()})
        write(data, {"tables/labels.csv": f"path,label\n{table}"})
    else:
        write(data, PETS | {"labels.csv": f"path,label\n{table}"})
    assert [label for _, label, _ in read_rows(data)] == ["cat", "cat", "dog"]


def test_folder_of_the_images_may_have_another_name(data: Path) -> None:
    write(data, {f"mine/{name}": content for name, content in PETS.items()})
    table = "".join(f"/kaggle/input/pets/{name},{name[:3]}\n" for name in PETS)
    write(data, {"labels.csv": f"path,label\n{table}"})
    assert [label for _, label, _ in read_rows(data)] == ["cat", "cat", "dog"]


def test_missing_files_do_not_lead_to_others_of_their_name(data: Path) -> None:
    write(data, {"cat/1.png": make_png(1), "dog/2.png": make_png(2)})
    write(data, {"labels.csv": "path,label\n/set/cat/1.png,cat\n/set/cat/2.png,cat\n/set/dog/2.png,dog\n"})
    members = read(data)
    assert {member.path: member.label for member in members if not isinstance(member.content, InvalidImageError)} == {
        "data/cat/1.png": "cat",
        "data/dog/2.png": "dog",
    }


def test_rows_of_excluded_files_are_not_missed(data: Path) -> None:
    write(data, PETS | {"labels.csv": LABELS})
    source = read_folder(data, Selection(exclude=["dog/"]))
    assert source.mismatch is None
    assert [sample.path for sample in source.samples] == ["data/cat/1.png", "data/cat/2.png"]


def test_stem_of_two_files_is_ambiguous_until_one_is_excluded(data: Path) -> None:
    write(
        data, {"a.png": make_png(1), "a.jpg": make_png(2), "b.png": make_png(3), "labels.csv": "file,label\na,x\nb,y\n"}
    )
    assert "2 files have this name" in list_faults(read(data))[-1]
    source = read_folder(data, Selection(exclude=["*.jpg"]))
    assert [(sample.path, sample.label) for sample in source.samples] == [("data/a.png", "x"), ("data/b.png", "y")]


def test_paths_repeated_with_other_labels_are_refused(data: Path) -> None:
    rows = "".join(f"{name},{label}\n" for name in PETS for label in "ab")
    with pytest.raises(ConvoyError, match=r"labels\.csv has several labels for an image, such as cat/1\.png \(a, b\)"):
        read_folder(write(data, PETS | {"labels.csv": f"path,label\n{rows}"}))


@pytest.mark.parametrize("label", ["|", ";", ",", "a|a", "cat|", "|cat"])
def test_separator_without_two_labels_is_part_of_a_label(data: Path, label: str) -> None:
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("path", "label"), *((name, label) for name in PETS)])
    assert {member.label for member in read(write(data, PETS | {"labels.csv": table.getvalue()}))} == {label}


def test_another_table_is_set_aside_if_one_is_named(data: Path) -> None:
    write(data, PETS | {"labels.csv": LABELS, "sizes.csv": "name,size\ncat,3\n"})
    source = read_folder(data, Selection(table=TableConfig(file="labels.csv")))
    assert source.notes == ["data/sizes.csv is not used: dataset.table.file=labels.csv names another table"]


def test_no_more_leading_folders_are_removed_than_needed(data: Path) -> None:
    write(data, {"1.png": make_png(1), "cat/1.png": make_png(2), "labels.csv": "path,label\nold/place/cat/1.png,cat\n"})
    members = read(data)
    assert list_faults(members) == ["data/1.png is not in labels.csv, so its label is unknown"]
    assert [m.path for m in members if m.label == "cat"] == ["data/cat/1.png"]
