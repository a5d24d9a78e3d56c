"""Pixel shards: they return what was written, and unchanged shards are reused."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from convoy.data.packed import pixel_shards
from convoy.data.packed.pixel_shards import NOT_STORED, SHARD_LIST, MissingShardError, Shards, ShardWriter

SIZE = 100


@pytest.fixture(autouse=True, scope="module")
def small_shards() -> None:
    """Eight images in a shard, and a run of less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixel_shards, "MEAN_SHARD_BYTES", 8 * SIZE)
        patch.setattr(pixel_shards, "MAX_SHARD_BYTES", 20 * SIZE)
        patch.setattr(pixel_shards, "CHUNK_BYTES", 5 * SIZE)
        yield


def make_image(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZE + number % 3)


def hash_image(number: int) -> int:
    return xxhash.xxh3_64_intdigest(make_image(number))


def is_last(number: int) -> bool:
    """Check whether the image is the last of its shard."""
    return hash_image(number) / 2**64 < len(make_image(number)) / pixel_shards.MEAN_SHARD_BYTES


def write_shards(
    folder: Path, numbers: list[int], earlier: Shards | None = None, at: dict | None = None, step: int = 7
) -> Shards:
    """The images of these numbers, `step` at a time; those that are in `at` lie there in `earlier`."""
    with contextlib.closing(ShardWriter(folder, earlier)) as writer:
        for start in range(0, len(numbers), step):
            some = numbers[start : start + step]
            offsets = [(at or {}).get(number, NOT_STORED) for number in some]
            new = b"".join(
                make_image(number) for number, offset in zip(some, offsets, strict=True) if offset == NOT_STORED
            )
            pictures = np.array([hash_image(number) for number in some], np.uint64)
            sizes = np.array([len(make_image(number)) for number in some])
            writer.write(pictures, sizes, np.array(offsets), new)
    return Shards.load(folder)


def locate(numbers: list[int]) -> dict[int, int]:
    sizes = [len(make_image(number)) for number in numbers]
    return dict(zip(numbers, (np.cumsum(sizes) - sizes).tolist(), strict=True))


def read_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


orders = st.lists(st.integers(0, 60), min_size=1, max_size=60)


@given(before=orders.map(lambda numbers: list(dict.fromkeys(numbers))), after=orders, step=st.integers(1, 20))
def test_reused_shards_do_not_change_the_bytes(
    before: list[int], after: list[int], step: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    earlier = write_shards(folder / "earlier", before)
    grown = write_shards(folder / "grown", after, earlier, locate(before), step)
    whole = b"".join(map(make_image, after))
    assert grown.read(0, len(whole)).tobytes() == whole
    assert read_files(grown.folder) == read_files(write_shards(folder / "afresh", after).folder)


@pytest.fixture(scope="module")
def fifty_images(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return write_shards(tmp_path_factory.mktemp("fifty") / "there", list(range(50)))


@given(start=st.integers(0, 6000), count=st.integers(0, 6000))
def test_any_part_can_be_read(fifty_images: Shards, start: int, count: int) -> None:
    assert fifty_images.read(start, count).tobytes() == b"".join(map(make_image, range(50)))[start : start + count]


def test_inserted_image_changes_at_most_two_shards(tmp_path: Path) -> None:
    numbers = list(range(400))
    earlier = write_shards(tmp_path / "earlier", numbers)
    grown = write_shards(tmp_path / "grown", [*numbers[:200], 1000, *numbers[200:]], earlier, locate(numbers))
    assert 30 < len(earlier.names) < 80
    assert len(set(grown.names) - set(earlier.names)) <= 2
    for name in set(grown.names) & set(earlier.names):
        assert (tmp_path / "grown" / name).samefile(tmp_path / "earlier" / name)


def test_files_that_cannot_be_linked_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Path) -> None:
        raise OSError(95, "Operation not supported")

    numbers = list(range(50))
    earlier = write_shards(tmp_path / "earlier", numbers)
    monkeypatch.setattr("os.link", refuse)
    assert read_files(write_shards(tmp_path / "copy", numbers, earlier, locate(numbers)).folder) == read_files(
        earlier.folder
    )


def test_modified_shard_is_not_linked(tmp_path: Path) -> None:
    numbers = list(range(50))
    earlier = write_shards(tmp_path / "earlier", numbers)
    sound = read_files(earlier.folder)
    with (earlier.folder / earlier.names[0]).open("ab") as file:
        file.write(b"more")
    assert read_files(write_shards(tmp_path / "grown", numbers, earlier, locate(numbers)).folder) == sound


@pytest.mark.parametrize("harm", ["gone", "empty", "cut"])
def test_shard_lost_during_reuse_is_reported(tmp_path: Path, harm: str) -> None:
    numbers = list(range(50))
    earlier = write_shards(tmp_path / "earlier", numbers)
    for name in earlier.names:
        file = earlier.folder / name
        file.unlink() if harm == "gone" else file.write_bytes(file.read_bytes()[:-1] if harm == "cut" else b"")
    with pytest.raises(MissingShardError, match="earlier was changed while it was read: run this again"):
        write_shards(tmp_path / "grown", [*numbers[1:]], earlier, locate(numbers))


def test_no_shard_is_much_larger_than_the_others(tmp_path: Path) -> None:
    alike = next(
        number
        for number in range(99)
        if hash_image(number) / 2**64 > len(make_image(number)) / pixel_shards.MEAN_SHARD_BYTES
    )
    write_shards(tmp_path / "alike", [alike] * 100)
    assert max(file.stat().st_size for file in (tmp_path / "alike").iterdir()) < 22 * SIZE


def test_identical_shards_take_disk_space_once(tmp_path: Path) -> None:
    numbers = list(range(50))
    last = next(
        number
        for number in numbers[::-1]
        if hash_image(number) / 2**64 < len(make_image(number)) / pixel_shards.MEAN_SHARD_BYTES
    )
    once = numbers[: last + 1]
    twice = write_shards(tmp_path / "twice", once * 2)
    assert twice.read(0, 10**6).tobytes() == b"".join(map(make_image, once * 2))
    assert len(list((tmp_path / "twice").iterdir())) == len(twice.names) // 2 + 1


def test_missing_or_truncated_shards_are_detected(tmp_path: Path) -> None:
    there = write_shards(tmp_path / "there", list(range(50)))
    file = tmp_path / "there" / there.names[0]
    file.write_bytes(file.read_bytes()[:-1])
    assert len(there.read(0, int(there.ends[0]))) == there.ends[0] - 1
    file.unlink()
    with pytest.raises(FileNotFoundError):
        there.read(0, 1)
    (tmp_path / "there" / SHARD_LIST).write_text("[]")
    with pytest.raises(ValueError, match="not enough values"):
        Shards.load(tmp_path / "there")
