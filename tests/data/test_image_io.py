"""Reading images: files decode to the pixels that they show, or are refused with a short reason."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, TiffImagePlugin

from convoy.data import image_io
from convoy.data.image_io import MAX_PIXELS, InvalidImageError, center_crop_resize

# A picture that no flip or turn maps onto itself: 24 wide, 16 high
PICTURE = np.kron(
    np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [255, 255, 255], [255, 255, 0]]], np.uint8),
    np.ones((8, 8, 1), np.uint8),
)

FORMATS = ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"]
LOSSLESS = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **(LOSSLESS.get(form, {}) | options))
    return file.getvalue()


def make_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def make_png(header: bytes, lines: bytes, more: bytes = b"") -> bytes:
    data = make_chunk(b"IHDR", header) + more + make_chunk(b"IDAT", zlib.compress(lines)) + make_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def make_png16(values: np.ndarray, more: bytes = b"") -> bytes:
    """Of (H, W, 2 to 4); Pillow writes no such files."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return make_png(header, b"".join(b"\0" + line.astype(">u2").tobytes() for line in values), more)


def make_tiff16(values: np.ndarray) -> bytes:
    """Of (H, W, 3 or 4); Pillow writes no such files."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    height, width, channels = values.shape
    tags[256], tags[257], tags[258], tags[262], tags[277] = width, height, (16,) * channels, 2, channels
    tags[273], tags[278], tags[279] = 0, height, values.nbytes  # they begin where the tags end
    if channels == 4:
        tags[338] = 2  # the fourth is alpha
    return b"II*\0\x08\0\0\0" + tags.tobytes(8) + values.astype("<u2").tobytes()


def decode(data: bytes, longest_side: int) -> np.ndarray:
    return image_io.decode(data, longest_side).pixels


def make_image(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(PICTURE).convert(mode)


def assert_looks_like(found: np.ndarray, expected: np.ndarray, tolerance: int = 0) -> None:
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= tolerance


# What comes out


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_decodes_to_the_expected_pixels(form: str) -> None:
    assert_looks_like(decode(encode(make_image(), form), 512), PICTURE, tolerance=6 if form == "JPEG" else 0)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "GIF"])
def test_grey_stays_grey_with_one_channel(form: str) -> None:
    grey = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    pixels = decode(encode(Image.fromarray(grey), form), 512)
    if form == "GIF":  # which has palettes only
        pixels = pixels[:, :, :1]
    assert_looks_like(pixels, grey[:, :, None], tolerance=2 if form == "JPEG" else 0)


@pytest.mark.parametrize(
    ("mode", "form", "channels"),
    [
        ("1", "PNG", 1),
        ("1", "TIFF", 1),
        ("L", "PNG", 1),
        ("LA", "PNG", 1),
        ("P", "PNG", 3),
        ("P", "BMP", 3),
        ("RGB", "PNG", 3),
        ("RGBA", "PNG", 3),
        ("RGBA", "WEBP", 3),
        ("RGBA", "TIFF", 3),
        ("CMYK", "TIFF", 3),
        ("CMYK", "JPEG", 3),
        ("YCbCr", "TIFF", 3),
    ],
)
def test_every_mode_becomes_grey_or_rgb(mode: str, form: str, channels: int) -> None:
    image = make_image(mode)
    pixels = decode(encode(image, form), 512)
    expected = np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(16, 24, channels)
    assert_looks_like(pixels, expected, tolerance=12 if form == "JPEG" else 1)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_grey16_keeps_its_gradation(form: str) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = decode(encode(Image.fromarray(ramp), form), 512)
    assert_looks_like(pixels, (ramp >> 8).astype(np.uint8)[:, :, None])


RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)  # every value of 12 bits


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    ("largest", "bits"), [(1, 8), (255, 8), (256, 12), (4095, 12), (4096, 16), (16383, 16), (65535, 16)]
)
def test_grey16_range_is_8_12_or_16_bits_by_its_maximum(form: str, largest: int, bits: int) -> None:
    values = (RAMP.astype(int) * largest // 4095).astype(np.uint16)
    assert_looks_like(
        decode(encode(Image.fromarray(values), form), 512), (values >> bits - 8).astype(np.uint8)[:, :, None]
    )


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_inverted_grey16_is_decoded_as_it_looks(bits: int, orientation: int, compression: str | None) -> None:
    values = RAMP >> 12 - bits if bits < 12 else RAMP << bits - 12
    values[0, 0] = 2**bits - 1
    tags = {262: 0, 274: orientation}  # WhiteIsZero, and on its side
    pixels = decode(encode(Image.fromarray(values), "TIFF", tiffinfo=tags, compression=compression), 512)
    black = (255 - (values >> bits - 8)).astype(np.uint8)
    assert_looks_like(pixels, (np.rot90(black, -1) if orientation == 6 else black)[:, :, None])


def test_transparent_grey16_pixels_are_white_and_set_no_maximum() -> None:
    values = RAMP.copy()
    values[10:20] = 50_000
    pixels = decode(encode(Image.fromarray(values), "PNG", transparency=50_000), 512)
    expected = (RAMP >> 4).astype(np.uint8)
    expected[10:20] = 255
    assert_looks_like(pixels, expected[:, :, None])
    hidden = encode(Image.new("I;16", (8, 8), 0), "PNG", transparency=0)
    assert_looks_like(decode(hidden, 512), np.full((8, 8, 1), 255, np.uint8))


def test_grey16_with_transparency_stays_grey() -> None:
    values = np.stack([RAMP << 4, np.full_like(RAMP, 65535)], axis=2)
    values[:32, :, 1] = 0
    expected = (RAMP >> 4).astype(np.uint8)
    expected[:32] = 255
    assert_looks_like(decode(make_png16(values), 512), expected[:, :, None])


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_rgb16_keeps_the_upper_8_bits(form: str, channels: int) -> None:
    values = np.stack([RAMP << 4, RAMP.T << 4, RAMP << 2, np.full_like(RAMP, 65535)], axis=2)[:, :, :channels]
    pixels = decode(make_png16(values) if form == "PNG" else make_tiff16(values), 512)
    assert_looks_like(pixels, (values[:, :, :3] >> 8).astype(np.uint8))


def test_transparent_color_of_rgb16_is_white() -> None:
    values = np.full((8, 8, 3), 0x3456, np.uint16)
    values[:4] = 0x1234
    data = make_png16(values, make_chunk(b"tRNS", b"\x12\x34" * 3))
    expected = np.full((8, 8, 3), 0x34, np.uint8)
    expected[:4] = 255
    assert_looks_like(decode(data, 512), expected)


def test_black_on_a_transparent_16_bit_image_shows_on_white() -> None:
    values = np.zeros((8, 8, 4), np.uint16)
    values[2:6, 2:6, 3] = 65535
    expected = np.full((8, 8, 3), 255, np.uint8)
    expected[2:6, 2:6] = 0
    assert_looks_like(decode(make_png16(values), 512), expected)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_refused(kind: type) -> None:
    with pytest.raises(InvalidImageError, match=r"32 bits.*8 or 16 bits"):
        decode(encode(Image.fromarray(-PICTURE[:, :, 0].astype(kind)), "TIFF"), 512)


def test_animation_shows_its_first_frame() -> None:
    file = io.BytesIO()
    make_image().save(file, "GIF", save_all=True, append_images=[Image.new("RGB", (24, 16), "black")])
    assert_looks_like(decode(file.getvalue(), 512), PICTURE)


TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # EXIF orientation -> how the camera turned the upright picture


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_orientation_is_applied(orientation: int, form: str) -> None:
    turn, block = TURNS[orientation], Image.Exif()
    block[0x0112] = orientation
    stored = make_image() if turn is None else make_image().transpose(turn)
    assert_looks_like(decode(encode(stored, form, exif=block), 512), PICTURE, tolerance=6 if form == "JPEG" else 0)


def make_exif(*entries: bytes) -> bytes:
    """Each of 12 bytes: tag, type, count, value."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + b"\0\0\0\0"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0garbage and more of it",
        b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01",  # cut short
        b"Exif\0\0II*\0\xff\xff\xff\x7f",  # leads to nowhere
        make_exif(struct.pack("<HHII", 0x0112, 3, 1, 9)),  # none of the eight
        make_exif(struct.pack("<HHI4s", 0x0112, 2, 2, b"6\0")),  # a text
    ],
)
def test_unreadable_orientation_counts_as_upright(block: bytes, form: str) -> None:
    data = encode(make_image(), form, exif=block)
    assert_looks_like(decode(data, 512), PICTURE, tolerance=6 if form == "JPEG" else 0)
    assert_looks_like(decode(data, 12), decode(encode(make_image(), form), 12))


def test_tiff_with_dangling_tags_is_accepted() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[0x8769], tags[0x8769] = 9, -5  # where its EXIF block begins
    assert_looks_like(decode(encode(make_image(), "TIFF", tiffinfo=tags), 512), PICTURE)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_applied_despite_other_exif_tags(form: str) -> None:
    block = make_exif(
        struct.pack("<HHIf", 0x010F, 11, 1, 0.5),  # the maker: a number
        struct.pack("<HHII", 0x0112, 3, 1, 6),
        struct.pack("<HHII", 0x8825, 4, 1, 0x7FFFFFFF),  # the place: out of the file
    )
    stored = make_image().transpose(TURNS[6])
    assert_looks_like(decode(encode(stored, form, exif=block), 512), PICTURE, tolerance=6 if form == "JPEG" else 0)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("revision", [b"\0\0", b"\2\1"])
@pytest.mark.parametrize("turned", [False, True])
def test_jpeg_of_unknown_revision_decodes_to_the_same_pixels(mode: str, revision: bytes, turned: bool) -> None:
    data = encode(
        make_image(mode), "JPEG", **({"exif": make_exif(struct.pack("<HHII", 0x0112, 3, 1, 6))} if turned else {})
    )
    assert data.count(b"JFIF\0\1\1") == 1
    other = data.replace(b"JFIF\0\1\1", b"JFIF\0" + revision)
    for longest_side in (512, 12):
        assert_looks_like(decode(other, longest_side), decode(data, longest_side))


@pytest.mark.parametrize(
    ("mode", "form", "options"),
    [
        ("RGBA", "PNG", {}),
        ("RGBA", "WEBP", {"exact": True}),
        ("LA", "PNG", {}),
        ("P", "PNG", {"transparency": 0}),
        ("P", "GIF", {"transparency": 0}),
        ("L", "PNG", {"transparency": 0}),
        ("1", "PNG", {"transparency": 0}),
        ("RGB", "PNG", {"transparency": (0, 0, 0)}),
    ],
)
def test_transparent_pixels_are_white(mode: str, form: str, options: dict) -> None:
    image = Image.new(mode, (8, 8), 0)  # black, or the first colour of the palette, and with "A" quite transparent
    assert_looks_like(
        decode(encode(image, form, **options), 512),
        np.full((8, 8, 1 if mode in ("LA", "L", "1") else 3), 255, np.uint8),
    )


@given(alpha=st.integers(0, 255), ink=st.integers(0, 255))
def test_half_transparent_pixels_are_mixed_with_white(alpha: int, ink: int) -> None:
    pixels = decode(encode(Image.new("RGBA", (2, 2), (ink, ink, ink, alpha)), "PNG"), 512)
    mixed = round((ink * alpha + 255 * (255 - alpha)) / 255)
    assert_looks_like(pixels, np.full((2, 2, 3), mixed, np.uint8), tolerance=1)


@given(width=st.integers(1, 150), height=st.integers(1, 150), side=st.integers(1, 100), form=st.sampled_from(FORMATS))
def test_only_images_above_the_maximum_side_are_reduced(width: int, height: int, side: int, form: str) -> None:
    pixels = decode(encode(Image.new("RGB", (width, height), "red"), form), side)
    # A JPEG may be decoded to 0.95 of the longest side.
    least = math.ceil(0.95 * side) if form == "JPEG" else side
    assert min(least, max(width, height)) <= max(pixels.shape[:2]) <= min(side, max(width, height))
    if max(width, height) <= side:
        assert pixels.shape[:2] == (height, width)
    else:  # in proportion, to the pixel
        scale = max(pixels.shape[:2]) / max(width, height)
        assert abs(pixels.shape[0] - height * scale) <= 1
        assert abs(pixels.shape[1] - width * scale) <= 1


# What is refused


def make_bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be large."""
    return make_png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"\0")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"a note to myself\n", "is not an image in BMP, GIF, JPEG, PNG, TIFF, WEBP"),
        (POSTSCRIPT, "is not an image"),
        (encode(Image.new("RGB", (8, 8)), "PCX"), "is not an image"),
        (encode(make_image(), "PNG")[:60], "can't be decoded"),
        (encode(make_image(), "WEBP")[:60], "is not an image|can't be decoded"),
        (make_bomb(11_000, 11_000), "has 11000x11000 pixels, over the limit of 100000000"),
        (make_bomb(MAX_PIXELS + 1, 1), "pixels, over the limit"),
        (make_bomb(90_000, 90_000), "has more than the limit of 100000000 pixels"),
        (make_bomb(8, 8), "can't be decoded"),
    ],
)
def test_incomplete_image_is_refused_with_a_short_reason(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidImageError, match=reason) as refusal:
        decode(data, 512)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_truncated_file_is_refused(form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(Image.fromarray(noise), form)
    with pytest.raises(InvalidImageError):
        decode(data[: len(data) // 2], 512)


@pytest.mark.parametrize("revision", [b"\0\0", b"\1\1", b"\2\1"])
def test_jpeg_decoder_warning_is_an_error_in_any_revision(revision: bytes) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(Image.fromarray(noise), "JPEG").replace(b"JFIF\0\1\1", b"JFIF\0" + revision)
    for broken in (data[:-2], data[:-2] + bytes(99) + data[-2:], data[: len(data) // 2] + data[-2:]):
        with pytest.raises(InvalidImageError, match=r"can't be decoded: (Premature end|Corrupt JPEG data)"):
            decode(broken, 512)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_truncated_file_with_unreadable_orientation_is_refused(form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode(Image.fromarray(noise), form, exif=b"Exif\0\0garbage")
    with pytest.raises(InvalidImageError):
        decode(data[: len(data) // 2], 512)


@pytest.mark.parametrize("largest", [0, 255, 4095])
@pytest.mark.parametrize(("form", "channels"), [("PNG", 2), ("PNG", 3), ("PNG", 4), ("TIFF", 3), ("TIFF", 4)])
def test_rgb16_that_uses_only_its_lowest_bits_is_refused(form: str, channels: int, largest: int) -> None:
    values = np.random.default_rng(0).integers(0, largest + 1, (8, 8, channels)).astype(np.uint16)
    if channels in (2, 4):
        values[:, :, -1] = 65535
    with pytest.raises(InvalidImageError, match="has 16 bits a channel and uses few of them: save it with 8"):
        decode(make_png16(values) if form == "PNG" else make_tiff16(values), 512)


@pytest.mark.parametrize("error", [OverflowError, struct.error, TypeError, MemoryError, KeyError])
def test_any_decoder_error_rejects_the_image(error: type, monkeypatch: pytest.MonkeyPatch) -> None:
    # each but the last two was seen among 250,000 files with a few wrong bytes
    def load(self: Image.Image) -> None:
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(InvalidImageError, match=f"can't be decoded: {error.__name__}"):
        decode(encode(make_image(), "PNG"), 512)


@given(
    data=st.sampled_from([encode(make_image(), form) for form in FORMATS]),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=5),
)
def test_corrupt_file_is_decoded_or_refused(data: bytes, changes: list[tuple[float, int]]) -> None:
    broken = bytearray(data)
    for place, byte in changes:
        broken[int(place * len(data))] = byte
    try:
        pixels = decode(bytes(broken), 16)
    except InvalidImageError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] in (1, 3)
    assert max(pixels.shape) <= 16


# What a network is given


@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    source=st.sampled_from([1, 3]),
    size=st.integers(1, 64),
    channels=st.sampled_from([1, 3]),
    value=st.integers(0, 255),
)
def test_resize_returns_uint8_of_the_requested_shape(
    height: int, width: int, source: int, size: int, channels: int, value: int
) -> None:
    pixels = center_crop_resize(np.full((height, width, source), value, np.uint8), size, channels)
    assert_looks_like(pixels, np.full((size, size, channels), value, np.uint8))


def test_resize_leaves_an_image_of_the_requested_shape_unchanged() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert np.array_equal(center_crop_resize(pixels, 32, 3), pixels)


@pytest.mark.parametrize("upright", [True, False])
def test_resize_crops_the_central_square(upright: bool) -> None:
    columns = np.zeros((30, 90, 1), np.uint8)
    columns[:, 27:63] = 200  # the square from 30 to 60, and three pixels for the smoothing
    columns[:, 33:36] = 100
    found = center_crop_resize(columns.transpose(1, 0, 2) if upright else columns, 10, 1)[:, :, 0]
    found = found.T if upright else found
    assert (found[:, 3:] == 200).all()
    assert (found[:, :3].argmin(axis=1) == 1).all()


def test_resize_antialiases() -> None:
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)[:, :, None]
    middle = center_crop_resize(board, 8, 1)[1:-1, 1:-1]
    assert middle.min() > 118
    assert middle.max() < 138


def test_resize_converts_color_to_grey_by_luma() -> None:
    red, green, blue = (
        center_crop_resize(np.full((4, 4, 3), colour, np.uint8), 4, 1)[0, 0, 0] for colour in np.eye(3) * 255
    )
    assert blue < red < green


def test_cmyk_jpeg_decoder_warning_is_an_error() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    data = encode(Image.frombytes("CMYK", (64, 64), noise.tobytes()), "JPEG")
    assert decode(data, 512).shape == (64, 64, 3)
    with pytest.raises(InvalidImageError, match="can't be decoded: Corrupt JPEG data"):
        decode(data[:-2] + bytes(99) + data[-2:], 512)


def test_oversized_jpeg_is_refused_by_its_header() -> None:
    data = encode(Image.new("L", (8, 8)), "JPEG")
    start = data.index(b"\xff\xc0") + 5  # height and width
    data = data[:start] + struct.pack(">HH", 60_000, 50_000) + data[start + 4 :]
    with pytest.raises(InvalidImageError, match="has 50000x60000 pixels, over the limit of 100000000"):
        decode(data, 512)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP"])
def test_reduced_image_is_antialiased(form: str) -> None:
    stripes = np.zeros((240, 240), np.uint8)
    stripes[::2] = 255
    pixels = decode(encode(Image.fromarray(stripes), form, **({"quality": 100} if form == "JPEG" else {})), 20)
    assert np.abs(pixels.astype(int) - 128).max() < 32  # a mean of both, and nowhere one of them


def test_xmp_orientation_of_a_jpeg_is_applied() -> None:
    said = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encode(make_image().transpose(TURNS[6]), "JPEG", xmp=said)
    assert b"Exif\0\0" not in data
    assert_looks_like(decode(data, 512), PICTURE, tolerance=6)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("side", [512, 12])
def test_recorded_height_and_width_are_those_of_the_file(form: str, side: int) -> None:
    found = image_io.decode(encode(make_image(), form, exif=make_exif(struct.pack("<HHII", 0x0112, 3, 1, 6))), side)
    assert (found.height, found.width) == PICTURE.shape[:2]


@pytest.mark.parametrize("longest_side", [512, 12])
def test_jpeg_truncated_in_its_header_has_a_clear_message(longest_side: int) -> None:
    data = encode(make_image(), "JPEG")
    for end in range(3, data.index(b"\xff\xda"), 7):
        with pytest.raises(InvalidImageError, match=r"can't be decoded: .*[a-z]{3}"):
            decode(data[:end], longest_side)
