"""Near-duplicate search: candidate pairs by perceptual hash, confirmed by the correlation of thumbnails."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from convoy.data.image_io import as_image

# Height and width of a thumbnail, in pixels.
SIDE = 32
# The hash is made of this many of the lowest frequencies in each direction.
FREQUENCIES = 8
# Largest Hamming distance between the hashes of near-duplicates, in bits of 64. Recompressed, resized, blurred and grey
# copies are within it.
MAX_DISTANCE_BITS = 4
# A hash is compared with fewer than `MAX_NEIGHBOURS` of those that agree with it in the same two bands, and with
# `MIN_NEIGHBOURS` of them once `MANY_PAIRS` pairs are found.
MIN_NEIGHBOURS, MAX_NEIGHBOURS, MANY_PAIRS = 32, 2048, 2**22
# Thumbnails in one block; a grey one has 1 KB.
BLOCK_THUMBNAILS = 2**15
# The bits of a hash, in six bands.
BANDS = [range(0, 11), range(11, 22), range(22, 33), range(33, 44), range(44, 54), range(54, 64)]

# (8, 32) coefficients of a discrete cosine transform. They are integers, so that all sums below are exact in float64
# and the hash is the same on every machine.
DCT_COEFFICIENTS = np.round(
    4096 * np.cos(np.pi * np.arange(FREQUENCIES)[:, None] * (2 * np.arange(SIDE) + 1) / (2 * SIDE))
)


def make_thumbnails(images: Sequence[np.ndarray]) -> np.ndarray:
    """Resize N images (H, W, 1 or 3) uint8 of any size to thumbnails (N, 32, 32, 3) uint8."""
    small = np.empty((len(images), SIDE, SIDE, 3), np.uint8)
    for index, pixels in enumerate(images):
        if pixels.shape[:2] != (SIDE, SIDE):
            image = as_image(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
            pixels = np.asarray(image).reshape(SIDE, SIDE, -1)
        small[index] = pixels
    return small


def _to_grey(thumbnails: np.ndarray) -> np.ndarray:
    """Convert thumbnails (N, 32, 32, 3) uint8 to grey (N, 32, 32) uint8."""
    # Converting all of them as one tall image is faster.
    image = as_image(thumbnails.reshape(-1, SIDE, 3)).convert("L")
    return np.asarray(image).reshape(-1, SIDE, SIDE)


def compute_perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Compute the perceptual hash of thumbnails.

    Each bit says whether one of the 8x8 lowest frequencies is above their median. This is pHash (Zauner 2010), in the
    variant of the library imagehash.

    Args:
        thumbnails: (N, 32, 32, 3) uint8.

    Returns:
        (N,) uint64; 0 for constant images, which have nothing to be recognised by.
    """
    grey = _to_grey(thumbnails)
    rows = grey.reshape(-1, SIDE).astype(np.float64) @ DCT_COEFFICIENTS.T
    columns = rows.reshape(-1, SIDE, FREQUENCIES).transpose(0, 2, 1).reshape(-1, SIDE) @ DCT_COEFFICIENTS.T
    frequencies = columns.reshape(-1, FREQUENCIES, FREQUENCIES).transpose(0, 2, 1).reshape(-1, FREQUENCIES**2)
    above = frequencies > np.median(frequencies, axis=1, keepdims=True)
    is_constant = np.ptp(grey.reshape(len(grey), -1), axis=1) == 0
    return np.where(is_constant, 0, np.packbits(above, axis=1).view(">u8").astype(np.uint64).ravel()).astype(np.uint64)


def find_candidate_pairs(hashes: np.ndarray) -> np.ndarray:
    """Find pairs of hashes that differ in at most `MAX_DISTANCE_BITS` bits.

    In such a pair, at least two of the six bands of bits are equal, as four different bits are in at most four bands.
    So only hashes that agree in two bands are compared: about four million comparisons for a million random hashes. If
    very many images are similar, such as those of a fixed camera, each is compared with at least the
    `MIN_NEIGHBOURS` before and after it, but not with all.

    Args:
        hashes: (N,) uint64 perceptual hashes; 0, that of constant images, is ignored.

    Returns:
        (P, 2) row numbers, sorted, the smaller one of a pair first.
    """
    rows = np.flatnonzero(hashes)
    hashes = hashes[rows]
    band_pairs = list(itertools.combinations(BANDS, 2))
    found, count = [np.empty((0, 2), np.int64)], 0
    for number, (upper, lower) in enumerate(band_pairs):
        key = ((_bits(hashes, upper) << np.uint64(len(lower))) | _bits(hashes, lower)).astype(np.uint32)
        order = np.argsort(key, kind="stable")
        key = key[order]
        for step in range(1, MAX_NEIGHBOURS):
            same = np.flatnonzero(key[step:] == key[:-step])
            if not len(same) or (step > MIN_NEIGHBOURS and count > MANY_PAIRS):
                break
            left, right = order[same], order[same + step]
            difference = hashes[left] ^ hashes[right]
            is_new = np.bitwise_count(difference) <= MAX_DISTANCE_BITS
            # Skip pairs that two earlier bands have already found.
            for first, second in band_pairs[:number]:
                is_new &= (_bits(difference, first) | _bits(difference, second)) != 0
            left, right = left[is_new], right[is_new]
            count += len(left)
            found.append(np.sort(rows[np.stack([left, right], axis=1)], axis=1))
    pairs = np.concatenate(found)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _bits(hashes: np.ndarray, band: range) -> np.ndarray:
    return (hashes >> np.uint64(band.start)) & np.uint64((1 << len(band)) - 1)


def confirm_pairs(read_image: Callable[[int], np.ndarray], pairs: np.ndarray, min_correlation: float) -> np.ndarray:
    """Check for each pair whether the thumbnails of its images correlate by at least `min_correlation`.

    The grey thumbnails are compared, and if both images are coloured, those in colour too.

    Args:
        read_image: Function from a row number to its image (H, W, 1 or 3) uint8.
        pairs: (P, 2) row numbers.
        min_correlation: Least correlation, in (0, 1].

    Returns:
        (P,) bool.
    """
    is_confirmed = np.zeros(len(pairs), bool)
    for selected, rows, local in _iter_blocks(pairs, BLOCK_THUMBNAILS):
        grey = np.empty((len(rows), SIDE, SIDE), np.uint8)
        for start in range(0, len(rows), 1024):
            grey[start : start + 1024] = _to_grey(
                make_thumbnails([read_image(row) for row in rows[start : start + 1024]])
            )
        is_confirmed[selected] = correlate(grey, local) >= min_correlation
    found = np.flatnonzero(is_confirmed)
    for selected, rows, local in _iter_blocks(pairs[found], BLOCK_THUMBNAILS // 4):
        small = make_thumbnails([read_image(row) for row in rows])
        are_coloured = _has_colour(small)[local].all(axis=1)
        is_confirmed[found[selected[are_coloured]]] = correlate(small, local[are_coloured]) >= min_correlation
    return is_confirmed


def _iter_blocks(pairs: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Divide pairs into blocks with at most 2 * `size` different rows.

    Yields:
        The indices of the pairs of a block, the rows that they contain, and the pairs as indices into these rows.
    """
    rows, indices = np.unique(pairs, return_inverse=True)
    indices = indices.reshape(-1, 2)
    blocks = indices // size
    for block in np.unique(blocks, axis=0):
        selected = np.flatnonzero((blocks == block).all(axis=1))
        needed, local = np.unique(indices[selected], return_inverse=True)
        yield selected, rows[needed], local.reshape(-1, 2)


def _has_colour(thumbnails: np.ndarray) -> np.ndarray:
    """Check for each thumbnail whether its channels differ by more than the rounding of a JPEG."""
    red, green, blue = np.moveaxis(thumbnails.reshape(len(thumbnails), -1, 3).astype(np.int16), 2, 0)
    return np.maximum(abs(red - green), abs(green - blue)).max(axis=1) > 16


def correlate(images: np.ndarray, pairs: np.ndarray) -> np.ndarray:
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
        left, right = pairs[start : start + 4096].T
        # The products are below 2**31.
        products.append(np.einsum("pd,pd->p", flat[left], flat[right], dtype=np.int32))
    left, right = pairs.T
    scale = np.sqrt(spreads[left].astype(np.float64) * spreads[right])
    shared = size * np.concatenate(products) - totals[left] * totals[right]
    return np.where(scale > 0, shared / np.maximum(scale, 1.0), 0.0)
