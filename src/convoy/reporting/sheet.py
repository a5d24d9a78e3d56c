"""Sheets of images as PNG files, which MLflow's viewer shows beside those of other runs."""

import base64
import functools
import io
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from convoy.core.errors import describe_error
from convoy.data.card.fonts import find_font_families
from convoy.data.card.markdown import shorten
from convoy.reporting.figures import Figure, Tile

# All lengths are in pixels.
TILE_SIDE = 128
GAP = 16
COLUMN_GAP = 28  # captions are wider than their images
TITLE_HEIGHT = 44
LINE_HEIGHT = 15
COLUMNS = 6
INK = "#24292f"
DPI = 100  # pixels of an inch
CHARACTER_WIDTH = 7.2  # of a bold one
POINT = 72 / DPI  # points of a pixel


def save_sheet(figure: Figure, architecture: str, folder: Path) -> None:
    """Write the images of a figure with their captions as a PNG file, named after the figure.

    If that fails, one line says so. A figure without images has no sheet.

    Args:
        figure: The figure.
        architecture: The network that it belongs to.
        folder: Folder to write into.
    """
    if not figure.tiles:
        return
    name = f"{figure.title.lower().replace(' ', '_')}.png"
    try:
        _draw_sheet(figure, f"{architecture}: {figure.title}", folder / name)
    # A report must not fail because one of its pictures does.
    except Exception as error:
        print(f"report: {architecture}/{name} could not be drawn ({describe_error(error, 200)})", file=sys.stderr)
        (folder / name).unlink(missing_ok=True)


def _draw_sheet(figure: Figure, title: str, file: Path) -> None:
    from matplotlib import style
    from matplotlib.figure import Figure as Canvas

    images = [_load_image(tile) for tile in figure.tiles]
    captions = [[*tile.lines, *([tile.path] if tile.path else [])] for tile in figure.tiles]
    places, width, height = _arrange(images, captions, [tile.is_wide for tile in figure.tiles])
    width = max(width, int(9 * len(title)) + 2 * GAP)
    settings = {"font.family": find_font_families([title, *itertools.chain(*captions)]), "text.parse_math": False}
    with style.context(["default", settings]):
        canvas = Canvas(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        write = functools.partial(canvas.text, transform=None, va="top", color=INK)
        write(GAP, height - GAP, title, fontsize=15 * POINT, weight="bold")
        for image, lines, (left, top) in zip(images, captions, places, strict=True):
            canvas.figimage(np.asarray(image), left, height - top - image.height, origin="upper")
            for number, line in enumerate(lines):
                below = top + image.height + 5 + number * LINE_HEIGHT
                text = shorten(line, int((image.width + COLUMN_GAP - 8) / CHARACTER_WIDTH))
                write(left, height - below, text, fontsize=11 * POINT, weight="normal" if number else "bold")
        canvas.savefig(file, metadata={"Software": None})


def _load_image(tile: Tile) -> Image.Image:
    """Return the image of a tile on white, as large as it is shown."""
    image = Image.open(io.BytesIO(base64.b64decode(tile.source.partition(",")[2]))).convert("RGBA")
    if not tile.is_wide:
        scale = TILE_SIDE / image.height
        image = image.resize((round(image.width * scale), TILE_SIDE), Image.Resampling.NEAREST)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _arrange(
    images: Sequence[Image.Image], captions: Sequence[Sequence[str]], is_wide: Sequence[bool]
) -> tuple[list[tuple[int, int]], int, int]:
    """Place images in rows of up to `COLUMNS`, and wide ones each in a row of its own.

    Returns:
        The left and top edge of each image, and the width and height of the sheet.
    """
    places: list[tuple[int, int]] = []
    limit = COLUMNS * (TILE_SIDE + COLUMN_GAP) + GAP
    left, top, bottom, right = GAP, TITLE_HEIGHT, TITLE_HEIGHT, 0
    for image, lines, wide in zip(images, captions, is_wide, strict=True):
        if left > GAP and (wide or left + image.width > limit):
            left, top = GAP, bottom
        places.append((left, top))
        right = max(right, left + image.width + COLUMN_GAP)
        bottom = max(bottom, top + image.height + len(lines) * LINE_HEIGHT + GAP)
        left = left + image.width + COLUMN_GAP if not wide else limit
    return places, right, bottom
