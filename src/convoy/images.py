"""Images: from the bytes of a file to pixels, and from pixels to the shape that a network wants."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"]  # only these decoders ever see a file
MAX_PIXELS = 100_000_000  # read from the header; a larger image is taken for a decompression bomb


class BadImage(Exception):
    """Why an image can't be used, in a few words."""


def decode(data: bytes, longest_side: int) -> np.ndarray:
    """The image in a file's bytes, as `plain` gives it. Of an animation, the first frame.

    Raises BadImage for what is not a whole image of a known format.
    """
    if not data:
        raise BadImage("is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow: what it only warns of is decided here
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"has {image.width}x{image.height} pixels, over the limit of {MAX_PIXELS}")
            image.draft(None, (longest_side, longest_side))  # a JPEG decodes faster at a half, a quarter, an eighth
            image.load()
            return plain(image, longest_side)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"is not an image in {', '.join(FORMATS)}") from None
    except Exception as error:  # of broken bytes Pillow's decoders raise whatever comes up, even OverflowError
        raise BadImage(f"can't be decoded: {str(error) or type(error).__name__}") from None


def plain(image: Image.Image, longest_side: int) -> np.ndarray:
    """(H, W, 1) grey or (H, W, 3) RGB uint8: upright, transparent parts white, no side above `longest_side` pixels."""
    image = _grey_or_rgb(ImageOps.exif_transpose(image))
    if max(image.size) > longest_side:
        image.thumbnail((longest_side, longest_side))
    return _pixels(image)


def fit(pixels: np.ndarray, size: int, channels: int) -> np.ndarray:
    """(H, W, 1 or 3) uint8 -> (size, size, channels) uint8: the middle square, resized with anti-aliasing."""
    if pixels.shape == (size, size, channels):
        return pixels
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image = image.convert("L" if channels == 1 else "RGB")
    return _pixels(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))


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
