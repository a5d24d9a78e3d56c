"""Near-duplicates: copies of an image are found however they were saved, and different images are not."""

import io
import itertools

import imagehash
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageEnhance, ImageFilter
from sklearn.datasets import load_sample_images

from convoy.data import near_duplicates
from convoy.data.near_duplicates import (
    MAX_DISTANCE_BITS,
    MIN_NEIGHBOURS,
    _to_grey,
    compute_perceptual_hashes,
    confirm_pairs,
    correlate,
    find_candidate_pairs,
    make_thumbnails,
)

# 84 real pictures of 160x160 pixels
PICTURES = [
    photograph[top : top + 160, left : left + 160]
    for photograph in load_sample_images().images
    for top in range(0, 240, 40)
    for left in range(0, 460, 80)
]


def recompress(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


COPIES = {
    "saved again": lambda image: recompress(image, 60),
    "half as large": lambda image: image.resize((80, 80)),
    "grey": lambda image: image.convert("L"),
    "a little blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "a little brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.05),
}


def hash_images(pictures: list[np.ndarray]) -> np.ndarray:
    return compute_perceptual_hashes(make_thumbnails(pictures))


def find_pairs(ones: list[np.ndarray], others: list[np.ndarray]) -> np.ndarray:
    images = [*ones, *others]
    return confirm_pairs(images.__getitem__, np.arange(len(images)).reshape(2, -1).T, 0.98)


def to_array(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


@pytest.mark.parametrize("change", COPIES.values(), ids=COPIES)
def test_copies_of_photographs_are_found_as_near_duplicates(change: object) -> None:
    copies = [to_array(change(Image.fromarray(picture))) for picture in PICTURES]  # type: ignore[operator]
    far = np.bitwise_count(hash_images(PICTURES) ^ hash_images(copies))
    assert (far <= MAX_DISTANCE_BITS).mean() > 0.9
    assert find_pairs(PICTURES, copies).mean() > 0.85


def test_different_images_do_not_correlate() -> None:
    assert not find_pairs(PICTURES[1:], PICTURES[:-1]).any()


def test_hash_equals_that_of_imagehash() -> None:
    small = [np.asarray(Image.fromarray(picture).resize((32, 32))) for picture in PICTURES]
    theirs = np.array([int(str(imagehash.phash(Image.fromarray(picture))), 16) for picture in small], np.uint64)
    # the cosines here are rounded, so that two nearly equal frequencies may change places
    assert np.bitwise_count(hash_images(small) ^ theirs).sum() <= 4


@given(arrays(np.uint8, (3, 32, 32, 3)))
def test_colors_become_grey_as_in_pillow(pixels: np.ndarray) -> None:
    expected = [np.asarray(Image.fromarray(picture).convert("L")) for picture in pixels]
    assert (_to_grey(pixels) == np.stack(expected)).all()


def test_block_size_does_not_change_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture for picture in PICTURES[:20] for _ in range(2)]
    pairs = np.array(list(itertools.combinations(range(40), 2)))
    at_once = confirm_pairs(images.__getitem__, pairs, 0.98)
    monkeypatch.setattr(near_duplicates, "BLOCK_THUMBNAILS", 7)
    assert (confirm_pairs(images.__getitem__, pairs, 0.98) == at_once).all()
    assert at_once.sum() >= 20
    assert confirm_pairs(images.__getitem__, pairs[:0], 0.98).tolist() == []


def test_constant_images_have_no_near_duplicates() -> None:
    even = [np.full((9, 9, 3), level, np.uint8) for level in (0, 3, 255)]
    assert hash_images(even).tolist() == [0, 0, 0]
    assert len(find_candidate_pairs(hash_images(even))) == 0


def test_comparisons_per_image_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_duplicates, "MANY_PAIRS", 10_000)
    alike = np.full(5000, 12345, np.uint64)
    pairs = find_candidate_pairs(alike)
    assert len(np.unique(pairs, axis=0)) == len(pairs)
    assert np.bincount(pairs.ravel(), minlength=5000).min() >= MIN_NEIGHBOURS
    assert len(pairs) <= 5000 * MIN_NEIGHBOURS


def test_brightness_and_contrast_do_not_change_the_correlation() -> None:
    picture = _to_grey(make_thumbnails(PICTURES[:1]))[0] // 2
    images = np.stack([picture, picture + np.uint8(50), 255 - picture])
    assert correlate(images, np.array([[0, 1], [0, 2]])) == pytest.approx([1.0, -1.0])


@given(arrays(np.uint8, (4, 5, 5)))
def test_correlation_equals_that_of_numpy(images: np.ndarray) -> None:
    pairs = np.array(list(itertools.combinations(range(4), 2)))
    for (one, other), found in zip(pairs, correlate(images, pairs), strict=True):
        if np.ptp(images[one]) and np.ptp(images[other]):
            assert found == pytest.approx(np.corrcoef(images[one].ravel(), images[other].ravel())[0, 1])
        else:
            assert found == 0.0  # an even picture has nothing to be recognised by


def test_recolored_shape_is_no_duplicate_unless_grey() -> None:
    red = np.zeros((32, 32, 3), np.uint8)
    red[8:24, 8:24] = [250, 0, 0]
    assert not find_pairs([red], [red[..., ::-1]]).any()
    assert find_pairs([red], [red // 2]).all()
    assert find_pairs([red], [red[..., :1]]).all()


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12, unique=True),
    st.lists(st.tuples(st.integers(0, 11), st.sets(st.integers(0, 63), max_size=6)), max_size=12),
)
def test_near_hashes_are_exactly_those_within_the_distance(seeds: list[int], changes: list) -> None:
    for place, bits in changes:
        seeds.append(seeds[place % len(seeds)] ^ sum(1 << bit for bit in bits))
    values = np.unique(np.array([seed or 1 for seed in seeds], np.uint64))
    expected = [
        [one, other]
        for one, other in itertools.combinations(range(len(values)), 2)
        if int(values[one] ^ values[other]).bit_count() <= MAX_DISTANCE_BITS
    ]
    assert find_candidate_pairs(values).tolist() == expected


def test_pale_colours_count_too() -> None:
    red = np.full((32, 32, 3), 100, np.uint8)
    red[8:24, 8:24] = [160, 100, 100]
    assert not find_pairs([red], [red[..., ::-1]]).any()
    assert find_pairs([red], [red + 20]).all()
