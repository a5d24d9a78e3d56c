"""Files with fewer pixels than their headers claim, which decoders fill in without an error."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from convoy.data.image_io import InvalidImageError, decode

NOISE = np.random.default_rng(0).integers(1, 256, (128, 96, 3), np.uint8)
PHOTO = Image.fromarray(NOISE)
FAX = PHOTO.convert("1")
COMPRESSIONS = ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd"]


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def save_tiff(compression: str | None) -> bytes:
    if compression is None:
        return save(PHOTO, "TIFF", tiffinfo={278: 16})
    if compression in ("group3", "group4"):
        return save(FAX, "TIFF", compression=compression)
    return save(PHOTO, "TIFF", compression=compression, strip_size=96 * 3 * 16)


def edit_tags(tiff: bytes, change: Callable[[int, list[int]], list[int]]) -> bytes:
    """Replace the numbers in the tags of a TIFF; there may be fewer than before."""
    edited = bytearray(tiff)
    (start,) = struct.unpack_from("<I", tiff, 4)
    for entry in range(start + 2, start + 2 + 12 * tiff[start], 12):
        tag, kind, count = struct.unpack_from("<HHI", tiff, entry)
        if kind not in (3, 4):
            continue
        letter, size = {3: ("H", 2), 4: ("I", 4)}[kind]
        place = entry + 8 if count * size <= 4 else struct.unpack_from("<I", tiff, entry + 8)[0]
        values = change(tag, list(struct.unpack_from(f"<{count}{letter}", tiff, place)))
        struct.pack_into("<I", edited, entry + 4, len(values))
        place = entry + 8 if len(values) * size <= 4 else place
        struct.pack_into(f"<{len(values)}{letter}", edited, place, *values)
    return bytes(edited)


def make_png(rows: bytes, is_interlaced: int = 0) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 96, 128, 8, 2, 0, 0, is_interlaced)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def interlace(passes: int) -> bytes:
    places = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    return b"".join(b"\0" + row.tobytes() for x, y, dx, dy in places[:passes] for row in NOISE[y::dy, x::dx])


def assert_refused(data: bytes) -> None:
    with pytest.raises(InvalidImageError):
        decode(data, 256)


# TIFF


@pytest.mark.parametrize("compression", [None, *COMPRESSIONS, "group3", "group4"])
def test_complete_tiff_is_decoded(compression: str | None) -> None:
    decode(save_tiff(compression), 256)


@pytest.mark.parametrize("count", [1, 4, 7])
@pytest.mark.parametrize("tags", [(273, 279), (273,), (279,)])
@pytest.mark.parametrize("compression", [None, *COMPRESSIONS])
def test_tiff_with_fewer_strips_is_refused(compression: str | None, tags: tuple[int, ...], count: int) -> None:
    assert_refused(edit_tags(save_tiff(compression), lambda tag, values: values[:count] if tag in tags else values))


@pytest.mark.parametrize("compression", [None, *COMPRESSIONS])
def test_tiff_with_empty_strips_is_refused(compression: str | None) -> None:
    assert_refused(
        edit_tags(save_tiff(compression), lambda tag, values: [*values[:4], 0, 0, 0, 0] if len(values) == 8 else values)
    )


@pytest.mark.parametrize("compression", [None, *COMPRESSIONS, "group3", "group4"])
def test_tiff_that_claims_more_rows_is_refused(compression: str | None) -> None:
    assert_refused(edit_tags(save_tiff(compression), lambda tag, values: [1000] if tag == 257 else values))
    assert_refused(edit_tags(save_tiff(compression), lambda tag, values: [1000] if tag in (257, 278) else values))


@pytest.mark.parametrize("compression", [*COMPRESSIONS, "group3", "group4"])
def test_tiff_with_half_of_each_strip_is_refused(compression: str) -> None:
    assert_refused(
        edit_tags(save_tiff(compression), lambda tag, values: [n // 2 for n in values] if tag == 279 else values)
    )


def test_tiff_in_tiles_and_planes_is_checked_by_these() -> None:
    def make(tiles: int) -> bytes:
        """Three planes of 4x3 tiles of 32x32 pixels, or fewer tiles."""
        pixels = b"".join(
            NOISE[y : y + 32, x : x + 32, plane].tobytes() for plane in range(3) for y in range(0, 128, 32)
            for x in range(0, 96, 32)
        )  # fmt: skip
        offsets = [8 + 1024 * number for number in range(tiles)]
        arrays = 8 + len(pixels)
        tags = {256: (4, 1, 96), 257: (4, 1, 128), 258: (3, 3, arrays + 400), 259: (3, 1, 1), 262: (3, 1, 2),
                277: (3, 1, 3), 284: (3, 1, 2), 322: (4, 1, 32), 323: (4, 1, 32), 324: (4, tiles, arrays),
                325: (4, tiles, arrays + 200)}  # fmt: skip
        extra = bytearray(406)
        struct.pack_into(f"<{tiles}I", extra, 0, *offsets)
        struct.pack_into(f"<{tiles}I", extra, 200, *[1024] * tiles)
        struct.pack_into("<3H", extra, 400, 8, 8, 8)
        entries = b"".join(struct.pack("<HHII", tag, *values) for tag, values in tags.items())
        start = struct.pack("<2sHI", b"II", 42, arrays + len(extra))
        return start + pixels + extra + struct.pack("<H", len(tags)) + entries + bytes(4)

    np.testing.assert_array_equal(decode(make(36), 256).pixels, NOISE)
    assert_refused(make(35))
    assert_refused(make(12))


# Other formats


def test_png_with_fewer_rows_is_refused() -> None:
    rows = [b"\0" + row.tobytes() for row in NOISE]
    np.testing.assert_array_equal(decode(make_png(b"".join(rows)), 256).pixels, NOISE)
    for count in (0, 1, 64, 127):
        assert_refused(make_png(b"".join(rows[:count])))
    assert_refused(make_png(b"".join(rows)[:-1]))


def test_png_whose_last_row_is_black_is_decoded() -> None:
    rows = [b"\0" + row.tobytes() for row in NOISE[:-1]]
    decode(make_png(b"".join([*rows, bytes(1 + 96 * 3)])), 256)


def test_interlaced_png_with_fewer_passes_is_refused() -> None:
    np.testing.assert_array_equal(decode(make_png(interlace(7), 1), 256).pixels, NOISE)
    for passes in (1, 3, 6):
        assert_refused(make_png(interlace(passes), 1))


def test_progressive_jpeg_with_fewer_scans_is_refused() -> None:
    jpeg = save(PHOTO, "JPEG", progressive=True)
    decode(jpeg, 256)
    scans = [place for place in range(len(jpeg)) if jpeg[place : place + 2] == b"\xff\xda"]
    for scan in scans[1:]:
        assert_refused(jpeg[:scan] + b"\xff\xd9")


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("is_progressive", [False, True])
def test_complete_jpeg_is_decoded(mode: str, is_progressive: bool) -> None:
    decode(save(PHOTO.convert(mode), "JPEG", progressive=is_progressive, restart_marker_rows=1), 256)


def test_gif_whose_frame_is_smaller_is_refused() -> None:
    gif = bytearray(save(PHOTO, "GIF"))
    decode(bytes(gif), 256)
    gif[8:10] = struct.pack("<H", 500)
    assert_refused(bytes(gif))
