"""Image decoding and resizing: from the bytes of a file to pixels, and to the shape that a network expects."""

import contextlib
import dataclasses
import functools
import io
import math
import re
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffTags, UnidentifiedImageError

from convoy.core.errors import describe_error
from convoy.data.completeness import MISSING, find_missing_after_load, find_missing_before_load, is_complete_progressive

# Pillow may use only the decoders of these formats.
PILLOW_FORMATS = ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "TGA"]
FORMATS = [*PILLOW_FORMATS, "HEIC"]
# By its header, an image with more pixels is rejected as a decompression bomb; `fetch.max_pixels` sets another limit.
MAX_PIXELS = 100_000_000
# The kinds of ISO media files that are images in HEIF, with HEVC.
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# A JPEG may be decoded to this fraction of the longest side: for 256 pixels, an image of 500 is decoded to 250.
MIN_SIZE_FRACTION = 0.95
# The first bytes of a JPEG file.
JPEG_START = b"\xff\xd8\xff"
# The byte of a JPEG with the major revision of its format, which should be 1.
JFIF_REVISION = re.compile(rb"(?<=\xff\xe0..JFIF\0).", re.DOTALL)
# A JPEG with an orientation contains one of these.
EXIF, XMP = b"Exif\0\0", b"tiff:Orientation"
# EXIF orientation -> the transposition that turns the image upright.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The ends of Pillow's names for raw modes with two bytes a channel, by byte order.
RAW_MODES_16_BIT = (";16B", ";16L", ";16N")
# The TIFF tag PhotometricInterpretation; its value is 0 if 0 is white.
PHOTOMETRIC_TAG = 262


class InvalidImageError(Exception):
    """Error for an image that can't be used; its message is the reason, in a few words."""


@dataclasses.dataclass(frozen=True, slots=True)
class Decoded:
    """Decoded image of a file."""

    pixels: np.ndarray  # (H, W, 1) grey or (H, W, 3) RGB uint8; upright, on a white background
    height: int  # pixels, in the file, before the image is turned and reduced
    width: int
    frames: int = 1  # frames of an animation or pages, of which the first is decoded
    is_bilevel: bool = False  # whether the file has one bit per pixel


def decode(data: bytes, longest_side: int, max_pixels: int = MAX_PIXELS, first_page: bool = True) -> Decoded:
    """Decode the bytes of an image file.

    Of an animation, the first frame is decoded.

    Args:
        data: Bytes of the file.
        longest_side: Larger images are reduced to this many pixels on their longest side.
        max_pixels: Images with more pixels are refused.
        first_page: Whether the first page is taken of a TIFF that has several, which is refused otherwise.

    Returns:
        The image, upright and on a white background.

    Raises:
        InvalidImageError: If the bytes are not a complete image of a supported format. This includes truncated files,
            wrong checksums (PNG), and everything that the decoder only warns of (JPEG), except for an unknown revision
            of the format.
    """
    if not data:
        raise InvalidImageError("is empty")
    try:
        if data.startswith(JPEG_START):
            return _decode_jpeg(data, longest_side, max_pixels)
        return _decode_other(data, longest_side, max_pixels, first_page)
    except InvalidImageError:
        raise
    except UnidentifiedImageError:
        raise InvalidImageError(f"is not an image in {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise InvalidImageError(f"has more than the limit of {max_pixels} pixels") from None
    # For broken bytes, Pillow's decoders raise all kinds of errors, even OverflowError.
    except Exception as error:
        # Cats vs Dogs has files with the revisions 0 and 2, which mean the same as 1.
        if "unknown JFIF revision" in str(error) and data != (standard := JFIF_REVISION.sub(b"\1", data)):
            return decode(standard, longest_side, max_pixels)
        raise InvalidImageError(f"can't be decoded: {describe_error(error)}") from None


def _decode_jpeg(data: bytes, longest_side: int, max_pixels: int) -> Decoded:
    """Decode a JPEG with libjpeg-turbo, six times as fast as with Pillow, treating warnings as errors."""
    try:
        # Not strict, because decoding the pixels repeats the same checks.
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    # simplejpeg raises KeyError if it can't find the colour space.
    except KeyError:
        raise InvalidImageError("can't be decoded: its header is incomplete") from None
    _check_size(height, width, max_pixels)
    if not is_complete_progressive(data):
        raise InvalidImageError(f"{MISSING}: scans of its details are missing")
    if colours in ("CMYK", "YCCK"):
        # Decoding checks the file strictly; the pixels come from Pillow, which converts these colours.
        simplejpeg.decode_jpeg(data, "CMYK")
        return _decode_other(data, longest_side, max_pixels, first_page=True)
    space = "GRAY" if colours == "Gray" else "RGB"
    if height <= longest_side and width <= longest_side:
        pixels = simplejpeg.decode_jpeg(data, space)
        if not (EXIF in data or XMP in data):
            return Decoded(pixels, height, width)
    else:
        scale = MIN_SIZE_FRACTION * longest_side / max(height, width)
        min_size = {"min_height": math.ceil(height * scale), "min_width": math.ceil(width * scale)}
        # Decoding to a half, a quarter or an eighth of the size is cheaper.
        pixels = simplejpeg.decode_jpeg(data, space, **min_size, min_factor=2)
    image = as_image(pixels)
    with _ignore_warnings():
        # Pillow raises for some broken EXIF although the pixels are complete.
        with contextlib.suppress(Exception):
            # EXIF and XMP contain the orientation.
            image.info = _open(data, max_pixels).info
        return Decoded(to_grey_or_rgb(image, longest_side), height, width)


def _decode_other(data: bytes, longest_side: int, max_pixels: int, first_page: bool) -> Decoded:
    image = _open(data, max_pixels)
    height, width = image.height, image.width
    _check_size(height, width, max_pixels)
    # Pillow checks the checksums of a PNG only in `verify`.
    if image.format == "PNG":
        image.verify()
        image = _open(data, max_pixels)
    frames = _count_frames(image, data, max_pixels)
    if image.format == "TIFF" and frames > 1 and not first_page:
        raise InvalidImageError(f"has {frames} pages: to use the first of each TIFF, set dataset.first_page=true")
    with _ignore_warnings():
        # When it loads a TIFF, Pillow follows the tags that point to other directories, and raises if one is broken.
        if image.format == "TIFF":
            with contextlib.suppress(Exception):
                exif = image.getexif()
                for tag in exif.keys() & TiffTags.TAGS_V2_GROUPS.keys():
                    del exif[tag]
        # Loading the image drops its raw mode.
        raw_mode = _raw_mode(image)
        missing = find_missing_before_load(image, data)
        image.draft(None, (longest_side, longest_side))
        image.load()
        if missing := missing or find_missing_after_load(image, data):
            raise InvalidImageError(missing)
        is_bilevel = image.mode == "1"
        loaded: Image.Image = image
        if raw_mode.endswith(RAW_MODES_16_BIT) and not image.mode.startswith("I;16"):
            loaded = _adapt_16_bit(image, raw_mode)
        return Decoded(to_grey_or_rgb(loaded, longest_side), height, width, frames, is_bilevel)


def _count_frames(image: ImageFile.ImageFile, data: bytes, max_pixels: int) -> int:
    """Return the number of frames or pages, without those after the first broken one."""
    if not getattr(image, "is_animated", False):
        return 1
    # Counting moves the position in some formats, so that it is done in an image of its own.
    with _open(data, max_pixels) as other:
        try:
            return int(getattr(other, "n_frames", 1))
        # For a broken frame, Pillow raises all kinds of errors; the first frame can still be used.
        except Exception:
            return 2


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Return Pillow's name for the format of the pixels in the file, "" for WebP."""
    # Images in WebP have no tiles, and only one format of pixels.
    if not image.tile:
        return ""
    args = image.tile[0].args or ("",)
    return args if isinstance(args, str) else str(args[0])


def _adapt_16_bit(image: Image.Image, raw_mode: str) -> Image.Image:
    """Adapt an image with 16 bits a channel, of which Pillow has kept the higher 8.

    Grey images with an alpha channel, which Pillow loads as RGBA, become LA again.

    Raises:
        InvalidImageError: If all values are so small that the image would be nearly black.
    """
    bands = zip(image.getbands(), np.reshape(image.getextrema(), (-1, 2)), strict=True)
    # An opaque alpha channel does not count.
    if max(high for band, (low, high) in bands if (band, low) != ("A", 255)) < 16:
        raise InvalidImageError("has 16 bits a channel and uses few of them: save it with 8")
    # The transparent colour still has 16 bits, and Pillow would compare its lower 8.
    if "transparency" in image.info:
        image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
    return image.convert("LA") if raw_mode.startswith("LA") else image


def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    # Pillow refuses more than twice this number; `_check_size` refuses what is above it.
    Image.MAX_IMAGE_PIXELS = max_pixels
    is_heif = data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS
    if is_heif:
        _register_heif()
    with _ignore_warnings():
        return Image.open(io.BytesIO(data), formats=["HEIF"] if is_heif else PILLOW_FORMATS)


def read_size(data: bytes) -> tuple[int, int, bool]:
    """Return height and width in pixels, and whether the image is grey, from the header of an image file.

    For broken files, Pillow raises all kinds of errors.
    """
    with _open(data, MAX_PIXELS) as image:
        return image.height, image.width, image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I;16")


@functools.cache
def _register_heif() -> None:
    """Let Pillow open HEIC, which costs 60 ms, in the processes that come across one."""
    import pi_heif

    pi_heif.register_heif_opener(thumbnails=False)


@contextlib.contextmanager
def _ignore_warnings() -> Iterator[None]:
    """Suppress Pillow's warnings, because this module decides what makes an image invalid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise InvalidImageError(f"has {width}x{height} pixels, over the limit of {max_pixels} (fetch.max_pixels)")


def to_grey_or_rgb(image: Image.Image, longest_side: int | None = None) -> np.ndarray:
    """Convert an image to grey or RGB pixels, upright and on a white background.

    Args:
        image: Image of any mode, with 8 or 16 bits a channel.
        longest_side: Larger images are reduced to this many pixels on their longest side.

    Returns:
        (H, W, 1) grey or (H, W, 3) RGB uint8.

    Raises:
        InvalidImageError: If the pixels have 32 bits.
    """
    transposition = _find_transposition(image)
    image = _convert_mode(image)
    if transposition is not None:
        image = image.transpose(transposition)
    if longest_side and max(image.size) > longest_side:
        # Bilinear, as in `center_crop_resize`, takes 0.6 of the time of bicubic.
        image.thumbnail((longest_side, longest_side), Image.Resampling.BILINEAR)
    return _to_pixels(image)


def _find_transposition(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that turns an image upright, None if there is none or the EXIF is broken."""
    try:
        return TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    # For broken EXIF, Pillow raises all kinds of errors, even TypeError; the image itself can still be used.
    except Exception:
        return None


def center_crop_resize(pixels: np.ndarray, size: int, channels: int) -> np.ndarray:
    """Crop the central square of an image and resize it with anti-aliasing.

    Args:
        pixels: (H, W, 1 or 3) uint8.
        size: Height and width of the result, in pixels.
        channels: 1 for grey or 3 for RGB.

    Returns:
        (size, size, channels) uint8; `pixels` itself if it already has this shape.
    """
    if pixels.shape == (size, size, channels):
        return pixels
    image = as_image(pixels)
    if pixels.shape[2] != channels:
        image = image.convert("L" if channels == 1 else "RGB")
    return _to_pixels(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))


def as_image(pixels: np.ndarray) -> Image.Image:
    """Convert pixels (H, W, 1 or 3) uint8 to a grey or RGB Pillow image."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _to_pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _convert_mode(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        image = _reduce_32_bit_grey(image)
    # Pillow's own conversion would clip nearly all of the image to white.
    if image.mode.startswith("I;16"):
        return _reduce_16_bit_grey(image)
    is_grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("L" if is_grey else "RGB")


def _reduce_32_bit_grey(image: Image.Image) -> Image.Image:
    """Reduce a grey image of 32 bits to 16, if its values are integers that fit, or fractions in [0, 1]."""
    values = np.asarray(image)
    low, high = values.min(initial=0), values.max(initial=0)
    if not (low >= 0 and np.isfinite(values).all()):
        raise InvalidImageError("has 32 bits per pixel and negative or infinite values: save it with 8 or 16 bits")
    if image.mode == "F" and high <= 1:
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if high >= 2**16 or (image.mode == "F" and (values % 1).any()):
        raise InvalidImageError(
            f"has 32 bits per pixel and values up to {high:g}, which are neither fractions from 0 to 1 nor integers of"
            " 16 bits: save it with 8 or 16 bits"
        )
    return Image.fromarray(values.astype(np.uint16))


def _reduce_16_bit_grey(image: Image.Image) -> Image.Image:
    """Reduce a grey image of 16 bits to the highest 8 of the bits that it uses.

    A file does not say how many bits it uses, so the fewest of 8, 12 and 16 that hold the largest value are assumed.
    Many cameras and scanners use 12 bits, and some tools save 8 bits as 16: with the highest 8 of 16 bits, such images
    would be nearly black and all similar. Images of 14 bits are treated as 16 bits, and keep 6.
    """
    values = np.asarray(image).astype(np.uint16)
    is_transparent = values == image.info.get("transparency", -1)
    largest = values.max(initial=0, where=~is_transparent)
    bits = next(bits for bits in (8, 12, 16) if largest < 2**bits)
    # Pillow inverts images in which 0 is white only if they have 8 bits.
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC_TAG) == 0:
        values = 2**bits - 1 - values
    pixels = (values >> bits - 8).astype(np.uint8)
    pixels[is_transparent] = 255
    return Image.fromarray(pixels)
