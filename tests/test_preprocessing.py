"""Preprocessing: the split follows from the images alone, and the arrays hold what the table says."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convoy.config import ConvoyError
from convoy.datasets import Example, Packed, Source, pack
from convoy.preprocessing import SPLITS, Preprocess, prepare, split
from convoy.task import Task, measure

PARAMS = Preprocess(size=32, channels="auto", test_fraction=0.2, val_fraction=0.25)


def table(count: int = 1000, start: int = 0, **columns: str) -> pd.DataFrame:
    """As of `count` different images."""
    hashes = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(start, start + count)]
    paths = [f"data/cat/{number}.png" for number in range(start, start + count)]
    return pd.DataFrame({"path": paths, "label": "cat", "split": "", "sha256": hashes}).assign(**columns)


def by_hash(images: pd.DataFrame, seed: int = 1) -> dict[str, str]:
    return dict(zip(images["sha256"], split(images, PARAMS, seed), strict=True))


# The split


@given(count=st.integers(0, 300), seed=st.integers(0, 2**40))
@settings(max_examples=30)
def test_every_image_is_on_exactly_one_side(count: int, seed: int) -> None:
    images = table(count)
    sides = split(images, PARAMS, seed)
    assert sides.index.equals(images.index)
    assert sides.isin(SPLITS).all()


def test_the_shares_are_as_asked() -> None:
    shares = split(table(20_000), PARAMS, 1).value_counts(normalize=True)
    assert shares["test"] == pytest.approx(0.2, abs=0.01)
    assert shares["val"] == pytest.approx(0.25 * 0.8, abs=0.01)  # of the images that are left to train with


@given(kept=st.integers(1, 300), seed=st.integers(0, 100))
@settings(max_examples=30)
def test_new_images_never_move_an_old_one(kept: int, seed: int) -> None:
    before, after = by_hash(table(kept), seed), by_hash(table(400), seed)
    assert {digest: after[digest] for digest in before} == before


def test_neither_order_nor_names_nor_labels_move_an_image() -> None:
    images = table()
    changed = images.sample(frac=1, random_state=0).assign(path="data/elsewhere.png", label="dog")
    assert by_hash(changed) == by_hash(images)


def test_two_copies_of_an_image_are_always_on_the_same_side() -> None:
    images = table(300)
    twice = pd.concat([images, images.assign(path="data/copy.png", label="dog")], ignore_index=True)
    first, second = np.split(split(twice, PARAMS, 1).to_numpy(), 2)
    assert (first == second).all()


def test_another_seed_gives_another_split_and_the_same_seed_the_same() -> None:
    assert by_hash(table(), 1) == by_hash(table(), 1)
    assert by_hash(table(), 1) != by_hash(table(), 2)


@pytest.mark.parametrize("given_split", ["test", "val"])
def test_a_split_that_the_source_gives_stands_and_the_other_is_drawn_from_the_training_images(given_split: str) -> None:
    images = pd.concat([table(1000, split="train"), table(300, start=1000, split=given_split)], ignore_index=True)
    sides = split(images, PARAMS, 1)
    (drawn,) = {"test", "val"} - {given_split}
    assert (sides == given_split).equals(images["split"] == given_split)
    assert set(sides[:1000]) == {"train", drawn}


def test_where_the_source_gives_all_three_nothing_is_drawn() -> None:
    images = pd.concat([table(100, start=100 * k, split=name) for k, name in enumerate(SPLITS)], ignore_index=True)
    assert split(images, PARAMS, 1).tolist() == images["split"].tolist()


def test_where_the_source_gives_only_training_images_both_others_are_drawn() -> None:
    assert by_hash(table(split="train")) == by_hash(table())


# The arrays


def packed(folder: Path, images: dict[str, list[np.ndarray]], given_split: str = "") -> Packed:
    """`images` by class, as a packed data set in `folder`."""
    examples = [
        Example(f"data/{label}/{number}.png", label, given_split, pixels)
        for label, list_of_pixels in images.items()
        for number, pixels in enumerate(list_of_pixels)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    return pack(Source(sorted(images), len(examples), iter(examples)), "pets", folder)


def noise(count: int, channels: int = 1, seed: int = 0, size: int = 32) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), np.uint8))


def even(count: int, values: range) -> list[np.ndarray]:
    """Images of one colour each, smaller than asked."""
    return [np.full((8, 8, 1), values[number % len(values)], np.uint8) for number in range(count)]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """The class "cat" is dark and the class "007" light."""
    images = {"cat": even(60, range(0, 100)), "007": even(60, range(150, 250))}
    prepare(packed(tmp_path / "packed", images), PARAMS, 1, tmp_path)
    return tmp_path


def test_each_image_is_in_the_arrays_once_with_its_label(prepared: Path) -> None:
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


def test_the_table_has_the_rows_of_the_arrays_in_their_order(prepared: Path) -> None:
    images = pd.read_parquet(prepared / "images.parquet")
    assert images.columns.tolist() == ["path", "label", "sha256", "split"]
    for name in SPLITS:
        rows = images.query("split == @name")
        labels = np.load(prepared / f"{name}_labels.npy")
        assert rows["label"].tolist() == [["007", "cat"][label] for label in labels]
        numbers = rows["path"].str.extract(r"(\d+)\.png")[0].astype(int) + np.where(labels == 0, 150, 0)
        assert numbers.tolist() == np.load(prepared / f"{name}_pixels.npy")[:, 0, 0, 0].tolist()
    assert images["split"].is_monotonic_increasing is False  # train, val, test: not by the alphabet
    assert images["split"].unique().tolist() == list(SPLITS)


def test_the_arrays_load_by_memory_map(prepared: Path) -> None:
    pixels = np.load(prepared / "train_pixels.npy", mmap_mode="r")
    assert isinstance(pixels, np.memmap)
    assert np.array_equal(pixels, np.load(prepared / "train_pixels.npy"))


def test_the_task_says_what_the_data_are(prepared: Path) -> None:
    task = Task.load(prepared / "task.json")
    assert (task.dataset, task.classes, task.size, task.channels) == ("pets", ["007", "cat"], 32, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_mean_and_deviation_are_those_of_the_training_images_alone(tmp_path: Path, channels: int) -> None:
    images = {"cat": noise(80, channels, 1), "dog": noise(80, channels, 2)}
    task = prepare(packed(tmp_path / "packed", images), PARAMS, 1, tmp_path)
    pixels = np.load(tmp_path / "train_pixels.npy") / 255
    assert task.mean == pytest.approx(pixels.mean(axis=(0, 1, 2)).tolist(), abs=1e-6)
    assert task.std == pytest.approx(pixels.std(axis=(0, 1, 2)).tolist(), abs=1e-6)
    everything = np.concatenate([np.load(tmp_path / f"{name}_pixels.npy") for name in SPLITS]) / 255
    assert task.mean != pytest.approx(everything.mean(axis=(0, 1, 2)).tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("asked", "source", "expected"), [("auto", 1, 1), ("auto", 3, 3), (1, 3, 1), (3, 1, 3), (1, 1, 1), (3, 3, 3)]
)
def test_channels_are_as_asked_and_by_themselves_grey_only_where_every_image_is(
    tmp_path: Path, asked: object, source: int, expected: int
) -> None:
    images = {"cat": noise(40, 1, 1), "dog": [*noise(39, 1, 2), *noise(1, source, 3)]}
    params = Preprocess(size=32, channels=asked, test_fraction=0.3, val_fraction=0.3)
    task = prepare(packed(tmp_path / "packed", images), params, 1, tmp_path)
    assert task.channels == len(task.mean) == len(task.std) == expected
    assert np.load(tmp_path / "train_pixels.npy").shape[1:] == (32, 32, expected)


def test_images_of_any_size_come_to_one_size(tmp_path: Path) -> None:
    images = {"cat": noise(30, 1, 1, size=7), "dog": noise(30, 1, 2, size=90)}
    prepare(packed(tmp_path / "packed", images), PARAMS, 1, tmp_path)
    assert {np.load(tmp_path / f"{name}_pixels.npy").shape[1:] for name in SPLITS} == {(32, 32, 1)}


def test_the_same_images_give_the_same_bytes(tmp_path: Path) -> None:
    def bytes_in(folder: Path) -> dict[str, bytes]:
        prepare(packed(folder / "packed", {"cat": noise(40, 1, 1), "dog": noise(40, 1, 2)}), PARAMS, 1, folder)
        return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    first = bytes_in(tmp_path / "first")
    assert bytes_in(tmp_path / "second") == first
    arrays = {f"{name}_{kind}.npy" for name in SPLITS for kind in ("pixels", "labels")}
    assert set(first) == arrays | {"images.parquet", "task.json"}


# What is refused


@pytest.mark.parametrize("count", [1, 2])
def test_a_class_with_too_few_images_is_refused_by_name(tmp_path: Path, count: int) -> None:
    images = packed(tmp_path / "packed", {"cat": noise(50), "rare": noise(count, 1, 1)})
    with pytest.raises(ConvoyError, match=rf"every class needs 3 images or more.*: 'rare' has {count}$"):
        prepare(images, PARAMS, 1, tmp_path)


def test_a_class_without_an_image_on_one_side_is_refused_by_name(tmp_path: Path) -> None:
    images = packed(tmp_path / "packed", {"cat": noise(50), "copies": noise(1, 1, 1) * 9})
    with pytest.raises(ConvoyError, match=r"no (train|val) image of 'copies'"):
        prepare(images, PARAMS, 1, tmp_path)


def test_data_of_test_images_alone_are_refused(tmp_path: Path) -> None:
    images = packed(tmp_path / "packed", {"cat": noise(20), "dog": noise(20, 1, 1)}, given_split="test")
    with pytest.raises(ConvoyError, match="no train image of 'cat', 'dog'"):
        prepare(images, PARAMS, 1, tmp_path)


# The task


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3])),
    seed=st.integers(0, 1000),
    chunk=st.integers(1, 10),
)
def test_measure_is_numpys_mean_and_deviation_whatever_the_order_and_the_chunk(
    shape: tuple[int, ...], seed: int, chunk: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    mean, std = measure(pixels, chunk)
    assert mean == pytest.approx((pixels / 255).mean(axis=(0, 1, 2)).tolist(), abs=1e-6)
    assert std == pytest.approx(np.maximum((pixels / 255).std(axis=(0, 1, 2)), 1 / 255).tolist(), abs=1e-6)
    assert measure(pixels[::-1], 4096) == (mean, std)


@given(value=st.integers(0, 255))
def test_a_channel_that_never_varies_can_still_be_divided_by(value: int) -> None:
    assert measure(np.full((3, 4, 4, 1), value, np.uint8)) == ([round(value / 255, 6)], [round(1 / 255, 6)])


def test_a_saved_task_comes_back_equal(tmp_path: Path) -> None:
    task = Task("pets", ["NA", "007", "é"], 32, 3, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    task.save(tmp_path / "task.json")
    assert Task.load(tmp_path / "task.json") == task
