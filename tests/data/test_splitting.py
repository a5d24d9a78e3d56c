"""Splitting: it depends on the images alone and keeps groups and near-duplicates together."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convoy.data.data_lock import LockedVersion
from convoy.data.packed.packed_dataset import SPLITS
from convoy.data.splitting import (
    assign_groups,
    describe_groups,
    draw_splits,
    exclude_leaks,
    find_cross_split_duplicates,
)
from factories import EMPTY_LOCK

TEST_FRACTION, VAL_FRACTION = 0.2, 0.25


def make_table(count: int = 1000, start: int = 0, **columns: str) -> pd.DataFrame:
    """As of `count` different images."""
    hashes = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(start, start + count)]
    paths = [f"data/cat/{number}.png" for number in range(start, start + count)]
    pictures = np.arange(start, start + count)
    images = {"path": paths, "label": "cat", "split": "", "group": "", "sha256": hashes, "pixel_hash": pictures}
    return pd.DataFrame(images).assign(**columns)


def split_first_version(images: pd.DataFrame, seed: int = 1) -> pd.Series:
    """As the first version of the data is split."""
    return split(images, seed, EMPTY_LOCK.splits_to_draw(set(images["split"])))


def split(images: pd.DataFrame, seed: int, drawn: Sequence[str]) -> pd.Series:
    return draw_splits(images, TEST_FRACTION, VAL_FRACTION, seed, drawn)


def split_by_hash(images: pd.DataFrame, seed: int = 1) -> dict[str, str]:
    return dict(zip(images["sha256"], split_first_version(images, seed), strict=True))


# The split


@given(count=st.integers(0, 300), seed=st.integers(0, 2**40))
@settings(max_examples=30)
def test_every_image_is_in_exactly_one_split(count: int, seed: int) -> None:
    images = make_table(count)
    sides = split_first_version(images, seed)
    assert sides.index.equals(images.index)
    assert sides.isin(SPLITS).all()


def test_split_fractions_are_as_requested() -> None:
    shares = split_first_version(make_table(20_000), 1).value_counts(normalize=True)
    assert shares["test"] == pytest.approx(TEST_FRACTION, abs=0.01)
    assert shares["val"] == pytest.approx(VAL_FRACTION * (1 - TEST_FRACTION), abs=0.01)


@given(kept=st.integers(1, 300), seed=st.integers(0, 100))
@settings(max_examples=30)
def test_new_images_never_move_an_old_one(kept: int, seed: int) -> None:
    before, after = split_by_hash(make_table(kept), seed), split_by_hash(make_table(400), seed)
    assert {digest: after[digest] for digest in before} == before


def test_split_of_an_image_depends_on_its_pixels_alone() -> None:
    images = make_table()
    changed = images.sample(frac=1, random_state=0).assign(
        path="data/elsewhere.png", label="dog", pixel_hash=0, height=9
    )
    assert split_by_hash(changed) == split_by_hash(images)


@given(groups=st.lists(st.sampled_from(["tom", "rex", "", "é|`"]), min_size=1, max_size=60), seed=st.integers(0, 50))
def test_group_is_never_divided_and_its_growth_moves_nothing(groups: list[str], seed: int) -> None:
    images = make_table(len(groups)).assign(group=groups)
    sides = split_first_version(images, seed)
    assert (sides.groupby(images["group"]).nunique().drop("", errors="ignore") == 1).all()
    half = images.sample(frac=0.5, random_state=0)
    assert split_first_version(half, seed).equals(sides[half.index])


def test_group_name_equal_to_a_hash_does_not_collide() -> None:
    images = make_table(200)
    assert not split_first_version(images, 1).equals(split_first_version(images.assign(group=images["sha256"]), 1))


def test_split_depends_on_the_seed() -> None:
    assert split_by_hash(make_table(), 1) == split_by_hash(make_table(), 1)
    assert split_by_hash(make_table(), 1) != split_by_hash(make_table(), 2)


@pytest.mark.parametrize("given_split", ["test", "val"])
def test_given_split_is_kept_and_the_missing_one_is_drawn(given_split: str) -> None:
    images = pd.concat(
        [make_table(1000, split="train"), make_table(300, start=1000, split=given_split)], ignore_index=True
    )
    sides = split_first_version(images, 1)
    (drawn,) = {"test", "val"} - {given_split}
    assert (sides == given_split).equals(images["split"] == given_split)
    assert set(sides[:1000]) == {"train", drawn}


def test_no_split_is_drawn_if_the_source_gives_all_three() -> None:
    images = pd.concat([make_table(100, start=100 * k, split=name) for k, name in enumerate(SPLITS)], ignore_index=True)
    assert split_first_version(images, 1).tolist() == images["split"].tolist()


def test_val_and_test_are_drawn_if_only_train_is_given() -> None:
    assert split_by_hash(make_table(split="train")) == split_by_hash(make_table())


@given(
    old=st.lists(st.sampled_from(["", "train", "val", "test"]), min_size=1, max_size=60),
    new=st.lists(st.sampled_from(["", "train", "val", "test"]), max_size=60),
)
def test_splits_given_with_new_images_move_no_old_image(old: list[str], new: list[str]) -> None:
    before, after = make_table(len(old)).assign(split=old), make_table(len(old + new)).assign(split=old + new)
    drawn = EMPTY_LOCK.splits_to_draw(set(old))
    later = EMPTY_LOCK.add_version(["cat"], LockedVersion(digest="", images={}, quarantine=0), drawn).splits_to_draw(
        set(old + new)
    )
    assert split(before, 1, drawn).equals(split(after, 1, later)[: len(old)])


@given(
    rows=st.lists(
        st.tuples(st.sampled_from(["tom", "rex", "fox", ""]), st.sampled_from(["", "train", "val", "test"])),
        min_size=1, max_size=40,
    )
)  # fmt: skip
def test_group_is_in_one_split_alone_whatever_is_given(rows: list[tuple[str, str]]) -> None:
    images = make_table(len(rows)).assign(group=[group for group, _ in rows], split=[given for _, given in rows])
    drawn = EMPTY_LOCK.splits_to_draw(set(images["split"]))
    own = split(images, 1, drawn)
    places = assign_groups(images, own.map(SPLITS.index).to_numpy(), drawn)
    sides = pd.Series(np.array(SPLITS)[places[0]])
    withheld = exclude_leaks(images, *places, np.empty((0, 2), int))
    left = sides.drop(withheld.index)
    assert (left.groupby(images["group"]).nunique().drop("", errors="ignore") <= 1).all()
    assert sides[images["split"].isin(["val", "test"])].equals(images["split"][images["split"].isin(["val", "test"])])
    assert sides[images["group"] == ""].equals(own[images["group"] == ""])
    assert set(images["split"][withheld.index]) <= {"train", "val"}  # what has no split goes where its group is
    moved = sides[(images["split"] == "train") & (sides != own)]
    assert set(moved) <= set(drawn)
    assert withheld["reason"].str.fullmatch(r"is in the group '\w+', which has (val|test) images").all()


# Near duplicates


@st.composite
def draw_near_duplicates(draw: st.DrawFn) -> tuple[pd.DataFrame, np.ndarray]:
    """Images of which some have the same picture in another file, and pairs of rows that are near each other."""
    count = draw(st.integers(1, 40))
    pictures = draw(st.lists(st.integers(0, 60), min_size=count, max_size=count))
    row = st.integers(0, count - 1)
    pairs = draw(st.lists(st.tuples(row, row).filter(lambda pair: pair[0] != pair[1]), max_size=60))
    return make_table(count).assign(pixel_hash=pictures), np.array(pairs, np.int64).reshape(-1, 2)


def list_used(images: pd.DataFrame, near: np.ndarray, seed: int = 1) -> dict[str, str]:
    """sha256 -> side, of the images that are not withheld."""
    sides = split_first_version(images, seed)
    places = sides.map(SPLITS.index).to_numpy()
    left = sides.drop(exclude_leaks(images, places, places, near).index)
    return dict(zip(images["sha256"][left.index], left, strict=True))


@given(draw_near_duplicates(), st.integers(0, 20))
def test_no_near_duplicates_are_in_two_splits(drawn: tuple[pd.DataFrame, np.ndarray], seed: int) -> None:
    images, near = drawn
    sides = list_used(images, near, seed)
    hashes = images["sha256"].to_numpy()
    for one, other in hashes[near]:
        assert not (one in sides and other in sides and sides[one] != sides[other])
    assert not images[images["sha256"].isin(list(sides))]["pixel_hash"].duplicated().any()


@given(draw_near_duplicates(), st.integers(0, 20))
def test_image_is_used_in_its_own_split_or_excluded(drawn: tuple[pd.DataFrame, np.ndarray], seed: int) -> None:
    images, near = drawn
    alone = split_by_hash(images, seed)
    assert list_used(images, near, seed).items() <= alone.items()


@given(draw_near_duplicates(), st.integers(0, 20), st.randoms())
def test_excluded_images_depend_on_neither_order_nor_names(
    drawn: tuple[pd.DataFrame, np.ndarray], seed: int, random: object
) -> None:
    images, near = drawn
    order = np.random.default_rng(seed).permutation(len(images))
    moved = images.iloc[order].reset_index(drop=True).assign(path=[f"elsewhere/{row}" for row in order])
    assert list_used(moved, np.argsort(order)[near][:, ::-1], seed) == list_used(images, near, seed)


@given(draw_near_duplicates(), st.integers(0, 20))
def test_new_images_do_not_move_a_test_image(drawn: tuple[pd.DataFrame, np.ndarray], seed: int) -> None:
    images, near = drawn
    alone = split_by_hash(images, seed)
    pictures = images.set_index("sha256")["pixel_hash"]
    for digest, side in alone.items():
        if side == "test" and (pictures == pictures[digest]).sum() == 1:
            assert list_used(images, near, seed)[digest] == "test"


def test_exclusion_reason_names_the_near_duplicate() -> None:
    images = make_table(3)
    sides = np.array([SPLITS.index(side) for side in ("train", "test", "val")])
    withheld = exclude_leaks(images, sides, sides, np.array([[0, 1], [2, 1]]))
    assert withheld.to_dict("records") == [
        {"path": "data/cat/0.png", "label": "cat", "reason": "is a near-duplicate of the test image data/cat/1.png"},
        {"path": "data/cat/2.png", "label": "cat", "reason": "is a near-duplicate of the test image data/cat/1.png"},
    ]
    same = exclude_leaks(images.assign(pixel_hash=[5, 5, 6]), sides, sides, np.empty((0, 2), int))
    assert same["reason"].tolist() == ["has the same pixels as data/cat/1.png"]


def test_cross_split_duplicates_of_test_images_are_recorded() -> None:
    images = make_table(6).assign(pixel_hash=[1, 2, 3, 4, 2, 6])
    sides = np.array([SPLITS.index(side) for side in ("train", "test", "val", "test", "train", "train")])
    found = find_cross_split_duplicates(images, sides, np.array([[0, 1], [1, 3], [2, 3], [0, 5]]))
    names = images["sha256"].tolist()
    pairs = {(names.index(test), names.index(other)) for test, other in found.itertuples(index=False)}
    assert pairs == {(1, 0), (3, 2), (1, 4)}
    assert not len(find_cross_split_duplicates(images.assign(pixel_hash=range(6)), sides, np.empty((0, 2), int)))


def test_group_moves_training_images_only_into_drawn_splits() -> None:
    said = pd.DataFrame({"group": ["a", "a"], "split": ["test", "train"]})
    sides = np.array([SPLITS.index("test"), SPLITS.index("train")], np.int8)
    assert assign_groups(said, sides, ["test"])[0].tolist() == [2, 2]
    assert assign_groups(said, sides, ["val"])[0].tolist() == [2, 0]


def test_groups_of_each_split_are_counted() -> None:
    table = pd.DataFrame({"group": ["a", "a", "b", "c", ""], "split": ["train", "train", "val", "test", "train"]})
    assert describe_groups(table) == (
        "3 groups: 1 train, 1 val, 1 test; none of them in two splits; 1 images are in no group"
    )
    table["split"] = ["train", "test", "val", "test", "train"]
    assert describe_groups(table).startswith("3 groups: 1 train, 1 val, 2 test; 1 of them in two splits")
    assert describe_groups(table.assign(group="")) == ""
