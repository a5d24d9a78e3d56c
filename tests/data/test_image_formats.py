"""Formats of images beyond the usual ones: what is decoded, counted and refused."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convoy.data.cache import CacheDir
from convoy.data.image_io import Decoded, InvalidImageError, decode
from convoy.data.ingest import FetchConfig, ingest
from convoy.data.sources.base import DatasetConfig
from convoy.data.sources.folder import read_folder
from factories import EMPTY_LOCK, make_png, write
from heic_image import HEIC

NOISE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
PHOTO = Image.fromarray(NOISE)


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read_grey(values: np.ndarray) -> Decoded:
    return decode(save(Image.fromarray(values), "TIFF"), 256)


# Formats


@pytest.mark.parametrize("kind", ["PPM", "TGA", "JPEG2000"])
def test_lossless_format_is_decoded_exactly(kind: str) -> None:
    np.testing.assert_array_equal(decode(save(PHOTO, kind), 256).pixels, NOISE)


def test_avif_is_decoded_closely() -> None:
    smooth = PHOTO.resize((8, 6)).resize((64, 48))
    pixels = decode(save(smooth, "AVIF", quality=95), 256).pixels
    assert np.abs(pixels.astype(int) - np.asarray(smooth)).mean() < 4


def test_heic_is_decoded() -> None:
    decoded = decode(HEIC, 32)
    assert decoded.pixels.shape == (24, 32, 3)
    assert (decoded.height, decoded.width) == (48, 64)


@pytest.mark.parametrize("kind", ["PPM", "TGA", "JPEG2000", "AVIF", "HEIC"])
def test_truncated_file_is_refused(kind: str) -> None:
    data = HEIC if kind == "HEIC" else save(PHOTO, kind)
    for size in [len(data) * part // 20 for part in range(1, 20)] + [len(data) - 1]:
        # TGA ends with a footer, which may be missing.
        if kind != "TGA" or size <= len(data) - 26:
            with pytest.raises(InvalidImageError):
                decode(data[:size], 256)


def test_random_bytes_are_no_image_of_any_format() -> None:
    random = np.random.default_rng(1)
    for size in range(1, 600):
        with pytest.raises(InvalidImageError):
            decode(random.integers(0, 256, size, np.uint8).tobytes(), 256)


def test_tiff_of_32_bits_is_decoded_if_its_range_is_clear() -> None:
    fractions = np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(4, 0)
    np.testing.assert_array_equal(read_grey(fractions).pixels[0, :, 0], np.arange(256))
    eight_bits = np.arange(256, dtype=np.int32)[None].repeat(4, 0)
    np.testing.assert_array_equal(read_grey(eight_bits).pixels[0, :, 0], np.arange(256))
    np.testing.assert_array_equal(read_grey(eight_bits * 16).pixels[0, :, 0], np.arange(256))
    np.testing.assert_array_equal(read_grey((eight_bits * 256).astype(np.float32)).pixels[0, :, 0], np.arange(256))


@pytest.mark.parametrize("values", [[-0.5, 0.5], [0.5, 1.5], [0.0, np.nan], [0.0, np.inf], [0, 70_000], [-1, 5]])
def test_tiff_of_32_bits_is_refused_if_its_range_is_unclear(values: list[float]) -> None:
    kind = np.int32 if all(isinstance(value, int) for value in values) else np.float32
    with pytest.raises(InvalidImageError, match=r"has 32 bits per pixel and .* save it with 8 or 16 bits"):
        read_grey(np.array([values], kind))


def test_limit_on_pixels_is_a_setting() -> None:
    for data in (save(PHOTO, "PNG"), save(PHOTO, "JPEG"), HEIC):
        decode(data, 256, max_pixels=64 * 48)
        with pytest.raises(InvalidImageError, match=r"over the limit of 1000 \(fetch\.max_pixels\)|the limit of 1000"):
            decode(data, 256, max_pixels=1000)


# Pages and frames


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_frames_are_counted(kind: str) -> None:
    others = [PHOTO.transpose(Image.Transpose.ROTATE_180), PHOTO.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    assert decode(save(PHOTO, kind, save_all=True, append_images=others), 256).frames == 3
    assert decode(save(PHOTO, kind), 256).frames == 1


def test_tiff_of_several_pages_needs_first_page() -> None:
    pages = save(PHOTO, "TIFF", save_all=True, append_images=[PHOTO])
    with pytest.raises(InvalidImageError, match=r"has 2 pages: .* dataset\.first_page=true"):
        decode(pages, 256, first_page=False)
    np.testing.assert_array_equal(decode(pages, 256, first_page=True).pixels, NOISE)


def fetch_notes(folder: Path, first_page: bool = False) -> list[str]:
    dataset = DatasetConfig(name="set", longest_side=64, group=None, first_page=first_page)
    folder, out = folder / "data", folder / "out"
    out.mkdir()
    cache = CacheDir(folder.parent / "cache" / "here", folder.parent / "none")
    return ingest(read_folder(folder), dataset, FetchConfig(max_invalid_fraction=0.0), EMPTY_LOCK, out, cache).notes


def test_notes_tell_of_frames_bits_colours_and_pixels(tmp_path: Path) -> None:
    turned = PHOTO.transpose(Image.Transpose.ROTATE_180)
    write(
        tmp_path / "data",
        {
            "a/photo.png": save(PHOTO, "PNG"),
            "a/moving.gif": save(PHOTO, "GIF", save_all=True, append_images=[turned, PHOTO]),
            "a/pages.tif": save(PHOTO.rotate(180), "TIFF", save_all=True, append_images=[PHOTO]),
            "b/fax.png": save(PHOTO.convert("1"), "PNG"),
            "b/white.png": make_png(255),
            "b/dot.png": save(PHOTO.crop((0, 0, 1, 1)), "PNG"),
        },
    )
    assert fetch_notes(tmp_path, first_page=True) == [
        "2 of 6 images have several frames or pages, of which only the first is used, and 3 are not:"
        " data/a/moving.gif (3), data/a/pages.tif (2)",
        "1 of 6 images have one bit per pixel, as masks have: data/b/fax.png; if these are no images of the classes,"
        " leave them out by dataset.exclude",
        "1 of 6 images have only one colour: data/b/white.png",
        "1 of 6 images have only one pixel: data/b/dot.png",
    ]
