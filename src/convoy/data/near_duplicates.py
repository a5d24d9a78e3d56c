"""Near-duplicate search: candidate pairs by perceptual hash, confirmed by the correlation of thumbnails."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from convoy.data.image_io import as_image

# Height and width of a thumbnail, in pixels.
SIDE = 32
# The hash is made of this many of the lowest frequencies in each direction.
LOW = 8
# Largest Hamming distance between the hashes of near-duplicates, in bits of 64. Recompressed, resized, blurred and grey
# copies are within it.
DISTANCE = 4
# A hash is compared with fewer than `MANY` of those that agree with it in the same two bands, and with `FEW` of them
# once `ENOUGH` pairs are found.
FEW, MANY, ENOUGH = 32, 2048, 2**22
# Thumbnails in one block; a grey one has 1 KB.
BLOCK = 2**15
# The bits of a hash, in six bands.
BANDS = [range(0, 11), range(11, 22), range(22, 33), range(33, 44), range(44, 54), range(54, 64)]

# (8, 32) coefficients of a discrete cosine transform. They are integers, so that all sums below are exact in float64
# and the hash is the same on every machine.
COSINES = np.round(4096 * np.cos(np.pi * np.arange(LOW)[:, None] * (2 * np.arange(SIDE) + 1) / (2 * SIDE)))


def thumbnails(images: Sequence[np.ndarray]) -> np.ndarray:
    """Resize N images (H, W, 1 or 3) uint8 of any size to thumbnails (N, 32, 32, 3) uint8."""
    small = np.empty((len(images), SIDE, SIDE, 3), np.uint8)
    for place, pixels in enumerate(images):
        if pixels.shape[:2] != (SIDE, SIDE):
            image = as_image(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
            pixels = np.asarray(image).reshape(SIDE, SIDE, -1)
        small[place] = pixels
    return small


def _grey(thumbnails: np.ndarray) -> np.ndarray:
    """Convert thumbnails (N, 32, 32, 3) uint8 to grey (N, 32, 32) uint8."""
    # Converting all of them as one tall image is faster.
    mixed = as_image(thumbnails.reshape(-1, SIDE, 3)).convert("L")
    return np.asarray(mixed).reshape(-1, SIDE, SIDE)


def perceptual_hash(thumbnails: np.ndarray) -> np.ndarray:
    """Compute the perceptual hash of thumbnails.

    Each bit says whether one of the 8x8 lowest frequencies is above their median. This is pHash (Zauner 2010), in the
    variant of the library imagehash.

    Args:
        thumbnails: (N, 32, 32, 3) uint8.

    Returns:
        (N,) uint64; 0 for constant images, which have nothing to be recognised by.
    """
    grey = _grey(thumbnails)
    rows = grey.reshape(-1, SIDE).astype(np.float64) @ COSINES.T
    columns = rows.reshape(-1, SIDE, LOW).transpose(0, 2, 1).reshape(-1, SIDE) @ COSINES.T
    frequencies = columns.reshape(-1, LOW, LOW).transpose(0, 2, 1).reshape(-1, LOW * LOW)
    above = frequencies > np.median(frequencies, axis=1, keepdims=True)
    even = np.ptp(grey.reshape(len(grey), -1), axis=1) == 0
    return np.where(even, 0, np.packbits(above, axis=1).view(">u8").astype(np.uint64).ravel()).astype(np.uint64)


def candidate_pairs(hashes: np.ndarray) -> np.ndarray:
    """Find pairs of hashes that differ in at most `DISTANCE` bits.

    In such a pair, at least two of the six bands of bits are equal, as four different bits are in at most four bands.
    So only hashes that agree in two bands are compared: about four million comparisons for a million random hashes. If
    very many images are similar, such as those of a fixed camera, each is compared with at least the `FEW` before and
    after it, but not with all.

    Args:
        hashes: (N,) uint64 perceptual hashes; 0, that of constant images, is ignored.

    Returns:
        (P, 2) row numbers, sorted, the smaller one of a pair first.
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
            # Skip pairs that two earlier bands have already found.
            for first, second in both_of[:number]:
                fresh &= (_bits(apart, first) | _bits(apart, second)) != 0
            left, right = left[fresh], right[fresh]
            count += len(left)
            found.append(np.sort(rows[np.stack([left, right], axis=1)], axis=1))
    pairs = np.concatenate(found)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _bits(hashes: np.ndarray, band: range) -> np.ndarray:
    return (hashes >> np.uint64(band.start)) & np.uint64((1 << len(band)) - 1)


def confirm_pairs(image: Callable[[int], np.ndarray], pairs: np.ndarray, least: float) -> np.ndarray:
    """Check for each pair whether the thumbnails of its images correlate by at least `least`.

    The grey thumbnails are compared, and if both images are coloured, those in colour too.

    Args:
        image: Function from a row number to its image (H, W, 1 or 3) uint8.
        pairs: (P, 2) row numbers.
        least: Least correlation, in (0, 1].

    Returns:
        (P,) bool.
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
    """Divide pairs into blocks with at most 2 * `size` different rows.

    Yields:
        The indices of the pairs of a block, the rows that they contain, and the pairs as indices into these rows.
    """
    rows, places = np.unique(pairs, return_inverse=True)
    places = places.reshape(-1, 2)
    blocks = places // size
    for both in np.unique(blocks, axis=0):
        here = np.flatnonzero((blocks == both).all(axis=1))
        needed, local = np.unique(places[here], return_inverse=True)
        yield here, rows[needed], local.reshape(-1, 2)


def _coloured(thumbnails: np.ndarray) -> np.ndarray:
    """Check for each thumbnail whether its channels differ by more than the rounding of a JPEG."""
    red, green, blue = np.moveaxis(thumbnails.reshape(len(thumbnails), -1, 3).astype(np.int16), 2, 0)
    return np.maximum(abs(red - green), abs(green - blue)).max(axis=1) > 16


def correlation(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Compute the correlation of pairs of images, which ignores brightness and contrast.

    The sums are integers, so the result is the same on every machine.

    Args:
        images: (N, ...) uint8.
        pairs: (P, 2) indices into `images`.

    Returns:
        (P,) float64 in [-1, 1]; 1 for identical images, and 0 if one of the two is constant.
    """
    flat = images.reshape(len(images), -1)
    size = flat.shape[1]
    totals = flat.sum(axis=1, dtype=np.int64)
    spreads = size * np.einsum("nd,nd->n", flat, flat, dtype=np.int64) - totals**2
    products = [np.empty(0, np.int64)]
    for start in range(0, len(pairs), 4096):
        one, other = pairs[start : start + 4096].T
        # The products are below 2**31.
        products.append(np.einsum("pd,pd->p", flat[one], flat[other], dtype=np.int32))
    one, other = pairs.T
    scale = np.sqrt(spreads[one].astype(np.float64) * spreads[other])
    shared = size * np.concatenate(products) - totals[one] * totals[other]
    return np.where(scale > 0, shared / np.maximum(scale, 1.0), 0.0)
