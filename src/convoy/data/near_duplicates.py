"""Likeness: how alike two pictures look, by a perceptual hash first and then by their thumbnails."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from convoy.data.image_io import as_image

SIDE = 32  # pixels, of a thumbnail
LOW = 8  # of its frequencies each way, which make the hash
# how far two hashes of near duplicates may lie apart: recompressed, resized, blurred and grey copies stay within it
DISTANCE = 4  # bits of 64
# how many a hash is compared with, of those that agree with it in the same two bands: many, but few if there are enough
FEW, MANY, ENOUGH = 32, 2048, 2**22
BLOCK = 2**15  # thumbnails, of 1 KB
BANDS = [range(0, 11), range(11, 22), range(22, 33), range(33, 44), range(44, 54), range(54, 64)]

# of a discrete cosine transform. Whole numbers: all sums below are exact in float64, so the hash is the same anywhere
COSINES = np.round(4096 * np.cos(np.pi * np.arange(LOW)[:, None] * (2 * np.arange(SIDE) + 1) / (2 * SIDE)))


def thumbnails(images: Sequence[np.ndarray]) -> np.ndarray:
    """N images (H, W, 1 or 3) uint8 of any sizes -> (N, 32, 32, 3) uint8."""
    small = np.empty((len(images), SIDE, SIDE, 3), np.uint8)
    for place, pixels in enumerate(images):
        if pixels.shape[:2] != (SIDE, SIDE):
            image = as_image(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
            pixels = np.asarray(image).reshape(SIDE, SIDE, -1)
        small[place] = pixels
    return small


def _grey(thumbnails: np.ndarray) -> np.ndarray:
    """(N, 32, 32, 3) uint8 -> (N, 32, 32) uint8"""
    mixed = as_image(thumbnails.reshape(-1, SIDE, 3)).convert("L")  # all in one tall image, which is quicker
    return np.asarray(mixed).reshape(-1, SIDE, SIDE)


def perceptual_hash(thumbnails: np.ndarray) -> np.ndarray:
    """(N, 32, 32, 3) uint8 -> (N,) uint64: which of the 8x8 lowest frequencies are above their median.

    This is pHash (Zauner 2010), in the form that the library imagehash gave it; 0 for an even picture, which has
    nothing to be recognised by.
    """
    grey = _grey(thumbnails)
    rows = grey.reshape(-1, SIDE).astype(np.float64) @ COSINES.T
    columns = rows.reshape(-1, SIDE, LOW).transpose(0, 2, 1).reshape(-1, SIDE) @ COSINES.T
    frequencies = columns.reshape(-1, LOW, LOW).transpose(0, 2, 1).reshape(-1, LOW * LOW)
    above = frequencies > np.median(frequencies, axis=1, keepdims=True)
    even = np.ptp(grey.reshape(len(grey), -1), axis=1) == 0
    return np.where(even, 0, np.packbits(above, axis=1).view(">u8").astype(np.uint64).ravel()).astype(np.uint64)


def candidate_pairs(hashes: np.ndarray) -> np.ndarray:
    """(N,) uint64 -> (P, 2): pairs of rows whose hashes differ in `DISTANCE` bits or less; that of even pictures apart.

    Of six bands of bits two at least are equal in such a pair, as four different bits reach four bands at most. So
    only hashes that agree in two bands are compared: for a million random ones some four million comparisons. Where
    very many look alike, as the images of a camera that stands still, each is compared with `FEW` of them at least and
    as many with it, but not with all.
    """
    rows = np.flatnonzero(hashes)
    hashes = hashes[rows]
    both_of = list(itertools.combinations(BANDS, 2))
    found, count = [np.empty((0, 2), np.int64)], 0
    for number, (one, other) in enumerate(both_of):
        key = ((_bits(hashes, one) << np.uint64(len(other))) | _bits(hashes, other)).astype(np.uint32)
        order = np.argsort(key, kind="stable")
        key = key[order]
        for step in range(1, MANY):
            same = np.flatnonzero(key[step:] == key[:-step])
            if not len(same) or (step > FEW and count > ENOUGH):
                break
            left, right = order[same], order[same + step]
            apart = hashes[left] ^ hashes[right]
            fresh = np.bitwise_count(apart) <= DISTANCE
            for first, second in both_of[:number]:  # found by these already
                fresh &= (_bits(apart, first) | _bits(apart, second)) != 0
            left, right = left[fresh], right[fresh]
            count += len(left)
            found.append(np.sort(rows[np.stack([left, right], axis=1)], axis=1))
    pairs = np.concatenate(found)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _bits(hashes: np.ndarray, band: range) -> np.ndarray:
    return (hashes >> np.uint64(band.start)) & np.uint64((1 << len(band)) - 1)


def confirm_pairs(image: Callable[[int], np.ndarray], pairs: np.ndarray, least: float) -> np.ndarray:
    """(P, 2) rows -> (P,): whether the thumbnails of the two correlate by `least` or more.

    `image` gives a row's (H, W, 1 or 3) uint8. Colours count where both images have any.
    """
    near = np.zeros(len(pairs), bool)
    for here, rows, local in _blocks(pairs, BLOCK):
        grey = np.empty((len(rows), SIDE, SIDE), np.uint8)
        for start in range(0, len(rows), 1024):
            grey[start : start + 1024] = _grey(thumbnails([image(row) for row in rows[start : start + 1024]]))
        near[here] = correlation(grey, local) >= least
    found = np.flatnonzero(near)
    for here, rows, local in _blocks(pairs[found], BLOCK // 4):
        small = thumbnails([image(row) for row in rows])
        both = _coloured(small)[local].all(axis=1)
        near[found[here[both]]] = correlation(small, local[both]) >= least
    return near


def _blocks(pairs: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The pairs by parts: which pairs, what rows they have (2 * `size` at most), and the pairs as places in those."""
    rows, places = np.unique(pairs, return_inverse=True)
    places = places.reshape(-1, 2)
    blocks = places // size
    for both in np.unique(blocks, axis=0):
        here = np.flatnonzero((blocks == both).all(axis=1))
        needed, local = np.unique(places[here], return_inverse=True)
        yield here, rows[needed], local.reshape(-1, 2)


def _coloured(thumbnails: np.ndarray) -> np.ndarray:
    """(N, 32, 32, 3) uint8 -> (N,): whether the channels differ by more than a JPEG rounds."""
    red, green, blue = np.moveaxis(thumbnails.reshape(len(thumbnails), -1, 3).astype(np.int16), 2, 0)
    return np.maximum(abs(red - green), abs(green - blue)).max(axis=1) > 16


def correlation(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """(N, ...) uint8, (P, 2) rows of it -> (P,): of each pair, whatever their brightness and contrast.

    1 is the same picture, 0 nothing in common. An even picture has nothing to be recognised by: it correlates with
    none. The sums are whole numbers, the same on any machine.
    """
    flat = images.reshape(len(images), -1)
    size = flat.shape[1]
    totals = flat.sum(axis=1, dtype=np.int64)
    spreads = size * np.einsum("nd,nd->n", flat, flat, dtype=np.int64) - totals**2
    products = [np.empty(0, np.int64)]
    for start in range(0, len(pairs), 4096):
        one, other = pairs[start : start + 4096].T
        products.append(np.einsum("pd,pd->p", flat[one], flat[other], dtype=np.int32))  # below 2**31
    one, other = pairs.T
    scale = np.sqrt(spreads[one].astype(np.float64) * spreads[other])
    shared = size * np.concatenate(products) - totals[one] * totals[other]
    return np.where(scale > 0, shared / np.maximum(scale, 1.0), 0.0)
