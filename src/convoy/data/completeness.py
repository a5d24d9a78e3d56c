"""Completeness checks: whether an image file has all the pixels that its header claims.

Where it has fewer, decoders fill in black, white or grey, mostly without an error. Each check was found necessary with
Pillow 13, libtiff 4.7 and libjpeg-turbo 3; truncated files, which these do report, need none.
"""

import contextlib
import io
import math
import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image, ImageChops, ImageFile, TiffImagePlugin

MISSING = "has fewer pixels than its header claims"
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# First column and row, and distance of columns and rows, of each pass of an interlaced PNG.
PNG_PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
# Markers of a JPEG; within the data of a scan are only zero bytes and restart markers after an FF.
PROGRESSIVE_FRAME, SCAN, END = 0xC2, 0xDA, 0xD9
NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
TIFF_JPEG = 7
# Compressions of faxes, whose decoder fills missing rows with white, and Pillow's names for them.
TIFF_FAX = {2: "tiff_ccitt", 3: "group3", 4: "group4"}
T4_OPTIONS = 292
# A fax may lack the code for its end, which has three bytes.
FAX_END_BYTES = 4


def find_missing_before_load(image: ImageFile.ImageFile, data: bytes) -> str:
    """Return why an image that is not loaded yet is incomplete, "" if this can't be seen yet."""
    if image.format == "GIF" and image.tile and "transparency" not in image.info:
        left, top, right, bottom = image.tile[0].extents or (0, 0, *image.size)
        if (right - left) * (bottom - top) < image.width * image.height:
            return "has a first frame that covers only a part of it"
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _find_missing_in_tiff(image.tag_v2, data)
    return ""


def find_missing_after_load(image: ImageFile.ImageFile, data: bytes) -> str:
    """Return why a loaded image is incomplete, "" if it is not."""
    is_complete = True
    if image.format == "PNG":
        is_complete = _is_complete_png(image, data)
    elif isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(259) in TIFF_FAX:
        is_complete = _is_complete_fax(image, image.tag_v2)
    return "" if is_complete else MISSING


# JPEG


def is_complete_progressive(data: bytes) -> bool:
    """Check that the scans of a progressive JPEG refine every coefficient to its last bit; True for another JPEG."""
    # Without this check, walking along the markers would take as long as decoding a small image.
    if bytes([0xFF, PROGRESSIVE_FRAME]) not in data:
        return True
    position, left = 2, {}
    while position + 4 <= len(data):
        marker, size = data[position + 1], int.from_bytes(data[position + 2 : position + 4])
        body = data[position + 4 : position + 2 + size]
        if marker in (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC)):
            if marker != PROGRESSIVE_FRAME:
                return True
            left = {component: set(range(64)) for component in body[6::3]}
        position += 2 + size
        if marker == SCAN:
            start, end, bits = body[-3:]
            for component in body[1:-3:2]:
                if bits & 15 == 0:
                    left.get(component, set()).difference_update(range(start, end + 1))
            found = NEXT_MARKER.search(data, position)
            if not found or data[found.start() + 1] == END:
                break
            position = found.start()
    return not any(left.values())


# PNG


def _is_complete_png(image: Image.Image, data: bytes) -> bool:
    """Check that the compressed data of a PNG have all rows.

    Only where the last row is zero, as a missing row is, or where rows are interlaced, the data are decompressed again.
    """
    width, height, depth, colour, _, _, is_interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if not is_interlaced and np.asarray(image.crop((0, height - 1, width, height))).any():
        return True
    bits = PNG_CHANNELS[colour] * depth
    sizes = [(width, height)]
    if is_interlaced:
        sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in PNG_PASSES]
    needed = sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns > 0 and rows > 0)
    stream, count = zlib.decompressobj(), 0
    for chunk in _iter_idat(data):
        while chunk and count < needed:
            count += len(stream.decompress(chunk, min(needed - count, 1 << 20)))
            chunk = stream.unconsumed_tail
    return count >= needed


def _iter_idat(data: bytes) -> Iterator[bytes]:
    position = 8
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IDAT":
            yield data[position + 8 : position + 8 + size]
        position += 12 + size


# TIFF


def _find_missing_in_tiff(tags: TiffImagePlugin.ImageFileDirectory_v2, data: bytes) -> str:
    width, height = int(tags[256]), int(tags[257])
    is_tiled = 324 in tags
    columns, rows = (tags[322], tags[323]) if is_tiled else (width, min(tags.get(278) or height, height))
    offsets, counts = tags.get(324 if is_tiled else 273, ()), tags.get(325 if is_tiled else 279, ())
    planes = int(tags.get(277, 1)) if tags.get(284) == 2 else 1
    down = math.ceil(height / rows)
    expected = math.ceil(width / columns) * down * planes
    kind = "tiles" if is_tiled else "strips"
    if len(offsets) < expected or (counts and len(counts) < expected):
        return f"{MISSING}: {min(len(offsets), len(counts) or len(offsets))} of {expected} {kind}"
    present = sum(bool(offset and count) for offset, count in zip(offsets, counts or offsets, strict=False))
    if present < expected:
        return f"{MISSING}: {present} of {expected} {kind}"
    if tags.get(259) == TIFF_JPEG:
        tables = bytes(tags.get(347, b""))
        for number, (offset, count) in enumerate(zip(offsets[:expected], counts, strict=False)):
            left = rows if is_tiled else min(rows, height - number % down * rows)
            if not _is_complete_jpeg(tables[:-2] + data[offset : offset + count][2 if tables else 0 :], left, columns):
                return MISSING
    return ""


def _is_complete_jpeg(data: bytes, rows: int, columns: int) -> bool:
    """Check a strip or tile in JPEG, of which libtiff's decoder only warns."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        simplejpeg.decode_jpeg(data, {"Gray": "GRAY", "CMYK": "CMYK", "YCCK": "CMYK"}.get(colours, "RGB"))
    except (ValueError, KeyError):
        return False
    return height >= rows and width >= columns


def _is_complete_fax(image: Image.Image, tags: TiffImagePlugin.ImageFileDirectory_v2) -> bool:
    """Check that the data of a fax are as long as if its pixels were compressed again; missing rows add to these."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag in (278, T4_OPTIONS):
        if tag in tags:
            info[tag] = tags[tag]
    again = io.BytesIO()
    # Pillow inverts an image in which 0 is white when it loads it, but not when it saves it.
    pixels = ImageChops.invert(image) if tags.get(262) == 0 else image
    with contextlib.suppress(OSError, ValueError):
        pixels.save(again, "TIFF", compression=TIFF_FAX[tags[259]], tiffinfo=info)
        with Image.open(again, formats=["TIFF"]) as written:
            assert isinstance(written, TiffImagePlugin.TiffImageFile)
            strips = written.tag_v2[279]
        return sum(tags[279]) >= sum(strips) - FAX_END_BYTES * len(strips)
    return True
