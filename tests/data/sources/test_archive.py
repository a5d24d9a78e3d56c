"""Archives: zip and tar files are read like folders, and damaged or hostile ones do no harm."""

import bz2
import gzip
import io
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convoy.core.errors import ConvoyError
from convoy.data.image_io import InvalidImageError
from convoy.data.sources import archive as archives
from convoy.data.sources.folder import read_folder
from factories import (
    ARCHIVES,
    PETS,
    SPLIT_PETS,
    list_faults,
    make_png,
    make_tar,
    make_zip,
    read,
    read_content,
    read_rows,
    write,
)

every_archive = pytest.mark.parametrize("kind", ARCHIVES)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@every_archive
@pytest.mark.parametrize("outer", ["", "pets/", "./"])
def test_archive_holds_what_a_folder_holds(data: Path, kind: str, outer: str) -> None:
    inside = {f"{outer}{name}": content for name, content in PETS.items()} | {f"{outer}__MACOSX/._1.png": b"junk"}
    write(data, {f"pets.{kind}": ARCHIVES[kind](inside)})
    shown = outer.removeprefix("./")
    assert read_rows(data) == [(f"data/pets.{kind}:{shown}{name}", name[:3], "") for name in PETS]
    assert [read_content(member) for member in read(data)] == list(PETS.values())


def test_undeclared_utf8_names_are_read_as_utf8(data: Path) -> None:
    archive = make_zip({"caf~~/1.png": make_png(1), "th~~/1.png": make_png(2)}).replace(b"~~", "é".encode())
    source = read_folder(write(data, {"pets.zip": archive}))
    assert (source.classes, source.notes) == (["café", "thé"], [])


def test_zip_names_of_unknown_encoding_are_reported(data: Path) -> None:
    archive = make_zip({"~~~~/1.png": make_png(1), "dog/1.png": make_png(2)}).replace(b"~~~~", "猫咪".encode("gbk"))
    (note,) = read_folder(write(data, {"pets.zip": archive})).notes
    assert note == (
        "data/pets.zip does not declare the encoding of ├¿▀Σ/1.png: if this looks wrong, pack it again with UTF-8 names"
    )


@pytest.mark.parametrize("ending", [".tbz2", ".txz"])
def test_short_archive_suffixes_are_recognized(ending: str, data: Path) -> None:
    archive = make_tar(PETS, {".tbz2": "w:bz2", ".txz": "w:xz"}[ending])
    assert read_folder(write(data, {f"pets{ending}": archive})).classes == ["cat", "dog"]


def test_archive_for_each_split_keeps_the_split(data: Path) -> None:
    for split in ("train", "test"):
        write(data, {f"{split}.zip": make_zip({f"{split}/{name}": content for name, content in PETS.items()})})
    assert {(label, split) for _, label, split in read_rows(data)} == {
        (label, split) for label in ("cat", "dog") for split in ("train", "test")
    }


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_dataset_may_be_a_single_archive(tmp_path: Path, kind: str) -> None:
    (tmp_path / "data").write_bytes(ARCHIVES[kind](SPLIT_PETS))
    assert sorted(read_rows(tmp_path / "data")) == [
        ("data:test/cat/3.png", "cat", "test"),
        ("data:train/cat/1.png", "cat", "train"),
        ("data:train/dog/2.png", "dog", "train"),
        ("data:valid/dog/4.png", "dog", "val"),
    ]


def test_tar_that_ends_with_a_zip_is_read_as_tar(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(make_tar(PETS | {"more.zip": make_zip({"cat/9.png": make_png()})}, "w"))
    assert [path for path, _, _ in read_rows(tmp_path / "data")] == [f"data:{name}" for name in PETS]


def test_data_that_is_one_file_and_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(make_png())
    with pytest.raises(ConvoyError, match="data is not a complete tar archive"):
        read_folder(tmp_path / "data")


def test_archives_and_folders_are_one_data_set(data: Path) -> None:
    write(
        data, PETS | {"a.zip": make_zip({"cat/3.png": make_png()}), "x/b.tar.gz": make_tar({"bird/1.png": make_png()})}
    )
    assert read_folder(data).classes == ["bird", "cat", "dog"]
    assert len(read(data)) == 5


def test_zip_archive_may_have_backslashes_between_its_folders(data: Path) -> None:
    write(data, {"pets.zip": make_zip({name.replace("/", "\\"): content for name, content in PETS.items()})})
    assert read_rows(data) == [(f"data/pets.zip:{name}", name[:3], "") for name in PETS]


@every_archive
def test_archive_is_unpacked_from_its_beginning_to_its_end(
    data: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # sizes in whole blocks and whole buffers, after which `tarfile` by itself steps back by a byte
    noise = np.random.default_rng(0)
    inside = {f"{label}/{k}": noise.bytes(size) for label in "ab" for k, size in enumerate((0, 512, 8192, 131072, 3))}
    write(data, {f"pets.{kind}": ARCHIVES[kind](inside)})
    source = read_folder(data)

    def refuse(self: object) -> None:
        raise AssertionError("unpacked anew")

    monkeypatch.setattr("_compression.DecompressReader._rewind", refuse)
    assert [read_content(member) for member in source.samples] == list(inside.values())


# Broken archives


@every_archive
def test_truncated_archive_is_refused_by_name(data: Path, kind: str) -> None:
    noise = np.random.default_rng(0).bytes(5000)
    whole = ARCHIVES[kind](PETS | {"dog/9.png": noise})
    with pytest.raises(ConvoyError, match=rf"data/pets\.{kind} is not a complete (zip|tar) archive .*: replace it"):
        read_folder(write(data, {f"pets.{kind}": whole[: len(whole) // 2]}))


@every_archive
def test_file_that_is_no_archive_is_refused_by_name(data: Path, kind: str) -> None:
    with pytest.raises(ConvoyError, match=rf"data/pets\.{kind} is not a complete"):
        read_folder(write(data, PETS | {f"pets.{kind}": b"a note"}))


@pytest.mark.parametrize("place", [600, 1024, 1100, 2600])
def test_broken_tar_entry_does_not_hide_later_entries(data: Path, place: int) -> None:
    # by itself Python's tarfile takes the first broken header for the end of the archive
    archive = bytearray(make_tar(PETS, "w"))
    archive[place] ^= 0xFF
    write(data, {"pets.tar": bytes(archive)})
    try:
        assert len(read(data)) == 3
    except ConvoyError as refusal:
        assert "data/pets.tar" in str(refusal)


def test_tar_archive_cut_between_two_entries_is_refused(data: Path) -> None:
    with pytest.raises(ConvoyError, match=r"data/pets\.tar is not a complete tar archive"):
        read_folder(write(data, {"pets.tar": make_tar(PETS, "w")[:1024]}))


def test_corrupt_byte_in_gzip_is_found_by_its_checksum(data: Path) -> None:
    archive = io.BytesIO()
    with gzip.GzipFile(fileobj=archive, mode="w", compresslevel=0) as file:  # stored, so that a byte stays a byte
        file.write(make_tar(PETS | {"dog/2.png": b"whisker"}, "w"))
    with pytest.raises(ConvoyError, match=r"data/pets\.tar\.gz is not a complete tar archive \(CRC check failed"):
        read_folder(write(data, {"pets.tar.gz": archive.getvalue().replace(b"whisker", b"whisper")}))


def test_corrupt_zip_entry_is_named_and_the_others_are_read(data: Path) -> None:
    archive = make_zip(PETS | {"dog/0.png": b"whisker", "dog/2.png": make_png()}).replace(b"whisker", b"whisper")
    members = read(write(data, {"pets.zip": archive}))
    assert list_faults(members) == ["data/pets.zip:dog/0.png can't be read: Bad CRC-32 for file 'dog/0.png'"]
    assert [read_content(member) for member in members if member.path != "data/pets.zip:dog/0.png"] == [
        *PETS.values(),
        make_png(),
    ]


def test_each_image_of_an_encrypted_archive_is_named(data: Path) -> None:
    archive = bytearray(make_zip(PETS))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = archive.find(mark)
        while start >= 0:
            archive[start + place] |= 1  # the bit that says encrypted
            start = archive.find(mark, start + 1)
    found = list_faults(read(write(data, {"pets.zip": bytes(archive)})))
    assert len(found) == 3
    assert all("can't be read: File" in fault and "encrypted" in fault for fault in found)


@settings(max_examples=300)
@given(
    kind=st.sampled_from(sorted(ARCHIVES)),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_corrupt_archive_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, changes: list[tuple[float, int]]
) -> None:
    archive = bytearray(ARCHIVES[kind](PETS))
    for place, byte in changes:
        archive[int(place * len(archive))] = byte
    data = write(tmp_path_factory.getbasetemp() / "data", {f"pets.{kind}": bytes(archive)})
    try:
        members = list(read_folder(data).samples)
    except ConvoyError as refusal:
        assert f"pets.{kind}" in str(refusal) or "holds no images" in str(refusal)
    else:
        assert all(isinstance(member.content, bytes | InvalidImageError) for member in members)
    finally:
        shutil.rmtree(data)


# Hostile archives


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(
    "name",
    ["/etc/cat/1.png", "../cat/1.png", "cat/../../1.png", "cat/..", "..\\cat\\1.png", "C:\\cat\\1.png", "C:/cat/1.png"],
)
def test_path_that_leaves_the_archive_is_refused(data: Path, kind: str, name: str) -> None:
    with pytest.raises(ConvoyError, match=rf"data/pets\.{kind}:.*1?.* points out of the archive"):
        read_folder(write(data, {f"pets.{kind}": ARCHIVES[kind]({name: make_png(), "cat/1.png": make_png()})}))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_link_or_device_in_a_tar_archive_is_refused(data: Path, kind: bytes) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as file:
        link = tarfile.TarInfo("cat/link.png")
        link.type, link.linkname = kind, "/etc/passwd"
        file.addfile(link)
    with pytest.raises(ConvoyError, match=r"data/pets\.tar:cat/link\.png is not a regular file"):
        read_folder(write(data, {"pets.tar": archive.getvalue()}))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_link_or_device_in_a_zip_archive_is_refused(data: Path, kind: int) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        link = zipfile.ZipInfo("cat/link.png")
        link.external_attr = kind << 16
        file.writestr(link, "/etc/passwd")
    with pytest.raises(ConvoyError, match=r"data/pets\.zip:cat/link\.png is not a regular file"):
        read_folder(write(data, {"pets.zip": archive.getvalue()}))


@every_archive
def test_oversized_entry_is_named_and_the_others_are_read(
    data: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1000)
    write(data, {f"pets.{kind}": ARCHIVES[kind](PETS | {"dog/0.png": bytes(1001), "dog/9.png": bytes(1000)})})
    members = read(data)
    assert list_faults(members) == [f"data/pets.{kind}:dog/0.png is larger than 256 MiB"]
    assert len(members) == 5


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("promised", [10, 2**32 - 2])
def test_zip_entry_is_read_up_to_its_declared_size_at_most(
    data: Path, method: int, promised: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 100_000)
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 2**33)
    archive = make_zip({"cat/1.png": bytes(10_000_000), "dog/1.png": b"wag"}, method)
    first = archive.index(b"PK\x01\x02") + 24  # the size in the directory
    archive = archive[:first] + promised.to_bytes(4, "little") + archive[first + 4 :]
    members = read(write(data, {"pets.zip": archive}))
    reason = "can't be read: Bad CRC-32 for file 'cat/1.png'" if promised == 10 else "is larger than 256 MiB"
    assert list_faults(members) == [f"data/pets.zip:cat/1.png {reason}"]
    assert members[1].content == b"wag"


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_decompression_bomb_is_refused(data: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 1_000_000)
    monkeypatch.setattr(archives, "MAX_RATIO", 100)
    bomb = {"cat/1.png": bytes(2_000_000), "dog/1.png": b"wag"}
    whole = make_zip(bomb, zipfile.ZIP_DEFLATED) if kind == "zip" else ARCHIVES[kind](bomb)
    with pytest.raises(ConvoyError, match=rf"data/pets\.{kind} has \d+ bytes and would unpack to \d+ or more"):
        read_folder(write(data, {f"pets.{kind}": whole}))


def test_endless_zeros_after_a_tar_are_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 1_000_000)
    monkeypatch.setattr(archives, "MAX_RATIO", 100)
    with pytest.raises(ConvoyError, match=r"data/pets\.tar\.bz2 has \d+ bytes and would unpack to \d+ or more"):
        read_folder(write(data, {"pets.tar.bz2": bz2.compress(make_tar(PETS, "w") + bytes(2_000_000))}))


def make_header(kind: bytes, size: bytes, name: bytes = b"cat/1.png") -> bytes:
    """The header of a tar entry that promises `size`, with its checksum."""
    block = bytearray(512)
    block[: len(name)], block[124:136], block[148:156], block[156:157] = name, size.ljust(12, b"\0"), b" " * 8, kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        (make_header(tarfile.XHDTYPE, b"77777777777"), "a header of 8589934591 bytes"),  # pax, which is read whole
        (make_header(tarfile.GNUTYPE_LONGNAME, b"77777777777"), "a header of 8589934591 bytes"),
        (make_header(tarfile.REGTYPE, b"\xff" * 12), "a header of -1 bytes"),
        (
            make_header(tarfile.XHDTYPE, b"16") + b"14 size=-2048\n".ljust(512, b"\0") + make_header(b"0", b"0"),
            "of negative size",
        ),
        (make_header(tarfile.REGTYPE, b"7777"), "unexpected end of data"),
        (make_header(tarfile.XHDTYPE, b"0") * 5000, "recursion"),
    ],
)
def test_tar_with_false_sizes_is_refused(data: Path, entry: bytes, fault: str) -> None:
    archive = make_tar({"dog/1.png": b"wag"}, "w")[:1024] + entry + bytes(1024)
    with pytest.raises(ConvoyError, match=rf"data/pets\.tar is not a complete tar archive.*{fault}"):
        read_folder(write(data, {"pets.tar": archive}))


def test_zip_entries_that_share_their_bytes_are_read_or_named(data: Path) -> None:
    # as zip bombs do; newer versions of Python refuse such entries
    archive = make_zip({"cat/1.png": b"meow", "cat/2.png": b"meow"})
    second = archive.rindex(b"PK\x01\x02") + 42  # where its bytes begin
    archive = archive[:second] + bytes(4) + archive[second + 4 :]
    members = read(write(data, {"pets.zip": archive}))
    assert len(members) == 2
    assert "can't be read" in list_faults(members)[-1]


def test_name_that_is_not_utf8_in_a_tar_archive_is_refused(data: Path) -> None:
    name = b"cat/caf\xe9.png".decode(errors="surrogateescape")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.GNU_FORMAT) as file:
        file.addfile(tarfile.TarInfo(name))
    with pytest.raises(ConvoyError, match=r"data/pets\.tar:cat/caf\\udce9\.png.*not UTF-8: rename it"):
        read_folder(write(data, {"pets.tar": archive.getvalue()}))


def test_archive_is_never_unpacked_to_the_disk(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(data, {f"{kind}/pets.{kind}": make(PETS) for kind, make in ARCHIVES.items()})
    before = sorted(data.parent.rglob("*"))
    monkeypatch.setattr("tempfile.mkstemp", None)
    assert len(read(data)) == 3 * len(ARCHIVES)
    assert sorted(data.parent.rglob("*")) == before


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_bytes_of_an_image_do_not_depend_on_earlier_entries(data: Path, kind: str) -> None:
    inside = {"__MACOSX/cat/._1.png": b"junk", "cat/.DS_Store": b"junk"} | PETS
    if kind == "zip":
        inside = {"cat/": b""} | inside | {"dog/": b""}  # folders have entries of their own
    write(data, {f"pets.{kind}": ARCHIVES[kind](inside)})
    assert [read_content(member) for member in read(data)] == list(PETS.values())
