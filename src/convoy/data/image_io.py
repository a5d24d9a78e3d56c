"""Images: from the bytes of a file to pixels, and from pixels to the shape that a network wants."""

import contextlib
import dataclasses
import io
import math
import re
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffTags, UnidentifiedImageError

FORMATS = ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"]  # only these decoders ever see a file
MAX_PIXELS = 100_000_000  # read from the header; a larger image is taken for a decompression bomb
NEARLY = 0.95  # of the longest side: where 256 pixels are asked for, the half of an image of 500 will do, with its 250
JPEG = b"\xff\xd8\xff"  # how its files begin
REVISION = re.compile(rb"(?<=\xff\xe0..JFIF\0).", re.DOTALL)  # of the format, in a JPEG: a byte that should be 1
EXIF, XMP = b"Exif\0\0", b"tiff:Orientation"  # one of these is in a JPEG that may lie on its side
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what turns the picture upright
SIXTEEN = (";16B", ";16L", ";16N")  # how Pillow names an order of bytes in which a channel has two
PHOTOMETRIC = 262  # a TIFF's tag for what its numbers mean; 0 where they count from white down


class InvalidImageError(Exception):
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
    (PNG), and whatever a decoder only warns of (JPEG), but for the revision of the format.
    """
    if not data:
        raise InvalidImageError("is empty")
    try:
        return (_decode_jpeg if data.startswith(JPEG) else _decode_other)(data, longest_side)
    except InvalidImageError:
        raise
    except UnidentifiedImageError:
        raise InvalidImageError(f"is not an image in {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise InvalidImageError(f"has more than the limit of {MAX_PIXELS} pixels") from None
    except Exception as error:  # of broken bytes Pillow's decoders raise whatever comes up, even OverflowError
        if "unknown JFIF revision" in str(error) and data != (known := REVISION.sub(b"\1", data)):
            return decode(known, longest_side)  # Cats vs Dogs has files with 0 and 2, which mean the same
        raise InvalidImageError(f"can't be decoded: {str(error) or type(error).__name__}") from None


def _decode_jpeg(data: bytes, longest_side: int) -> Decoded:
    """By libjpeg-turbo, six times as fast as by way of Pillow, and what it warns of is an error."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)  # which comes again
    except KeyError:  # of colours that it does not find
        raise InvalidImageError("can't be decoded: its header is not whole") from None
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
        scale = NEARLY * longest_side / max(height, width)
        least = {"min_height": math.ceil(height * scale), "min_width": math.ceil(width * scale)}
        # it can decode at a half, a quarter, an eighth for less
        pixels = simplejpeg.decode_jpeg(data, space, **least, min_factor=2)
    image = as_image(pixels)
    with _quiet():
        with contextlib.suppress(Exception):  # Pillow stops at some broken EXIF; the picture is whole
            image.info = _open(data).info  # EXIF and XMP, where the orientation stands
        return Decoded(to_grey_or_rgb(image, longest_side), height, width)


def _decode_other(data: bytes, longest_side: int) -> Decoded:
    image = _open(data)
    height, width = image.height, image.width
    _check_size(height, width)
    if image.format == "PNG":  # whose checksums Pillow looks at only when asked to
        image.verify()
        image = _open(data)
    with _quiet():
        if image.format == "TIFF":  # Pillow follows these tags when it loads one, and stops where they lead to nowhere
            with contextlib.suppress(Exception):
                exif = image.getexif()
                for tag in exif.keys() & TiffTags.TAGS_V2_GROUPS.keys():
                    del exif[tag]
        rawmode = _rawmode(image)  # which is gone when it is loaded
        image.draft(None, (longest_side, longest_side))
        image.load()
        if rawmode.endswith(SIXTEEN) and not image.mode.startswith("I;16"):
            return Decoded(to_grey_or_rgb(_higher_8_bits(image, rawmode), longest_side), height, width)
        return Decoded(to_grey_or_rgb(image, longest_side), height, width)


def _rawmode(image: ImageFile.ImageFile) -> str:
    """What Pillow calls the pixels as the file has them."""
    if not image.tile:  # WebP, which has but one kind
        return ""
    args = image.tile[0].args or ("",)
    return args if isinstance(args, str) else str(args[0])


def _higher_8_bits(image: Image.Image, rawmode: str) -> Image.Image:
    """Of 16 bits a channel, of which Pillow has kept no others: grey as grey, which it makes RGBA."""
    bands = zip(image.getbands(), np.reshape(image.getextrema(), (-1, 2)), strict=True)
    if max(high for band, (low, high) in bands if (band, low) != ("A", 255)) < 16:  # all is as good as black
        raise InvalidImageError("has 16 bits a channel and uses few of them: save it with 8")
    if "transparency" in image.info:  # a colour with its 16 bits, of which Pillow would seek the lower 8
        image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
    return image.convert("LA") if rawmode.startswith("LA") else image


def _open(data: bytes) -> ImageFile.ImageFile:
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
        raise InvalidImageError(f"has {width}x{height} pixels, over the limit of {MAX_PIXELS}")


def to_grey_or_rgb(image: Image.Image, longest_side: int | None = None) -> np.ndarray:
    """(H, W, 1) grey or (H, W, 3) RGB uint8: upright, transparent parts white, no side above `longest_side` pixels."""
    turn = _turn(image)
    image = _grey_or_rgb(image)
    if turn is not None:
        image = image.transpose(turn)
    if longest_side and max(image.size) > longest_side:
        image.thumbnail(
            (longest_side, longest_side), Image.Resampling.BILINEAR
        )  # as `center_crop_resize`; 0.6 of the time of bicubic
    return _pixels(image)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns it upright; an orientation that can't be read is no reason to lose a sound picture."""
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of broken EXIF Pillow raises whatever comes up, even TypeError
        return None


def center_crop_resize(pixels: np.ndarray, size: int, channels: int) -> np.ndarray:
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
        raise InvalidImageError(f"has {image.mode} pixels (32 bits), whose range is unknown: save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip nearly all of it to white
        return _grey_of_16_bits(image)
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("L" if grey else "RGB")


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    """The highest 8 of the bits in use, taken for 8, 12 or 16: the fewest that hold the largest value.

    A file does not tell how many they are. Many cameras and scanners give 12 of them, and tools write 8 as 16: by the
    highest 8 of 16 such images would be nearly black, and all alike. 14 bits are taken for 16, and keep 6.
    """
    values = np.asarray(image).astype(np.uint16)
    hidden = values == image.info.get("transparency", -1)
    largest = values.max(initial=0, where=~hidden)
    bits = next(bits for bits in (8, 12, 16) if largest < 2**bits)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:  # which Pillow minds for 8 bits only
        values = 2**bits - 1 - values
    pixels = (values >> bits - 8).astype(np.uint8)
    pixels[hidden] = 255
    return Image.fromarray(pixels)
