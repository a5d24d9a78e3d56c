"""Images: from the bytes of a file to pixels, and from pixels to the shape that a network wants."""

import contextlib
import dataclasses
import io
import math
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"]  # only these decoders ever see a file
MAX_PIXELS = 100_000_000  # read from the header; a larger image is taken for a decompression bomb
JPEG = b"\xff\xd8\xff"  # how its files begin
EXIF, XMP = b"Exif\0\0", b"tiff:Orientation"  # one of these is in a JPEG that may lie on its side


class BadImage(Exception):
    """Why an image can't be used, in a few words."""


@dataclasses.dataclass(frozen=True, slots=True)
class Decoded:
    """A file's image."""

    pixels: np.ndarray  # (H, W, 1) grey or (H, W, 3) RGB uint8: upright, transparent parts white
    height: int  # pixels, as the file has them, before turning and reducing
    width: int


def decode(data: bytes, longest_side: int) -> Decoded:
    """The image in a file's bytes, no side above `longest_side` pixels. Of an animation, the first frame.

    Raises BadImage for what is not a whole image of a known format: an early end, a checksum that does not agree
    (PNG), and whatever a decoder only warns of (JPEG).
    """
    if not data:
        raise BadImage("is empty")
    try:
        return (_decode_jpeg if data.startswith(JPEG) else _decode_other)(data, longest_side)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"is not an image in {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise BadImage(f"has more than the limit of {MAX_PIXELS} pixels") from None
    except Exception as error:  # of broken bytes Pillow's decoders raise whatever comes up, even OverflowError
        raise BadImage(f"can't be decoded: {str(error) or type(error).__name__}") from None


def _decode_jpeg(data: bytes, longest_side: int) -> Decoded:
    """By libjpeg-turbo, six times as fast as by way of Pillow, and what it warns of is an error."""
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)  # which comes again
    _check_size(height, width)
    if colours in ("CMYK", "YCCK"):
        simplejpeg.decode_jpeg(data, "CMYK")  # for its strictness: these colours are for Pillow to translate
        return _decode_other(data, longest_side)
    space = "GRAY" if colours == "Gray" else "RGB"
    if height <= longest_side and width <= longest_side:
        pixels = simplejpeg.decode_jpeg(data, space)
        if not (EXIF in data or XMP in data):
            return Decoded(pixels, height, width)
    else:
        scale = longest_side / max(height, width)
        least = {"min_height": math.ceil(height * scale), "min_width": math.ceil(width * scale)}
        # it can decode at a half, a quarter, an eighth for less
        pixels = simplejpeg.decode_jpeg(data, space, **least, min_factor=2)
    image = as_image(pixels)
    image.info = _open(data).info  # EXIF and XMP, where the orientation stands
    return Decoded(plain(image, longest_side), height, width)


def _decode_other(data: bytes, longest_side: int) -> Decoded:
    image = _open(data)
    height, width = image.height, image.width
    _check_size(height, width)
    if image.format == "PNG":  # whose checksums Pillow looks at only when asked to
        image.verify()
        image = _open(data)
    with _quiet():
        image.draft(None, (longest_side, longest_side))
        image.load()
        return Decoded(plain(image, longest_side), height, width)


def _open(data: bytes) -> Image.Image:
    with _quiet():
        return Image.open(io.BytesIO(data), formats=FORMATS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings: what it only warns of is decided here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImage(f"has {width}x{height} pixels, over the limit of {MAX_PIXELS}")


def plain(image: Image.Image, longest_side: int | None = None) -> np.ndarray:
    """(H, W, 1) grey or (H, W, 3) RGB uint8: upright, transparent parts white, no side above `longest_side` pixels."""
    image = _grey_or_rgb(ImageOps.exif_transpose(image))
    if longest_side and max(image.size) > longest_side:
        image.thumbnail((longest_side, longest_side))
    return _pixels(image)


def fit(pixels: np.ndarray, size: int, channels: int) -> np.ndarray:
    """(H, W, 1 or 3) uint8 -> (size, size, channels) uint8: the middle square, resized with anti-aliasing."""
    if pixels.shape == (size, size, channels):
        return pixels
    image = as_image(pixels)
    if pixels.shape[2] != channels:
        image = image.convert("L" if channels == 1 else "RGB")
    return _pixels(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))


def as_image(pixels: np.ndarray) -> Image.Image:
    """(H, W, 1 or 3) uint8 -> an image, grey or RGB."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _grey_or_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise BadImage(f"has {image.mode} pixels (32 bits), whose range is unknown: save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip nearly all of it to white
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("L" if grey else "RGB")
