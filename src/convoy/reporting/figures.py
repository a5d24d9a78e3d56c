"""The parts of a report: charts, tables and sheets of images, each with a title, a note and alternative text."""

import base64
import dataclasses
import io
import re
import sys
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from markupsafe import Markup
from PIL import Image

from convoy.core.errors import describe_error
from convoy.data.image_io import as_image

# Images are stored with this side at most; a page shows them no larger.
MAX_TILE_SIDE = 96  # pixels
# Between two maps of a strip.
GAP = 4  # pixels
# Larger images are stored as JPEG, which needs a quarter of the bytes of PNG.
MAX_PNG_SIDE = 64  # pixels


@dataclasses.dataclass(frozen=True)
class Tile:
    """An image with its caption."""

    source: str  # data: URL
    lines: tuple[str, ...]  # of the caption
    alt: str
    path: str = ""  # of the image's file
    is_wide: bool = False  # whether it is a strip of many maps
    is_pair: bool = False  # whether it is two images beside each other


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart, a sheet of images or a table."""

    title: str
    alt: str = ""
    note: str = ""
    svg: Markup | None = None
    tiles: Sequence[Tile] = ()
    table: pd.DataFrame | None = None
    digits: int = 4  # after the decimal point, of floats in the table
    error: str = ""  # why it could not be drawn
    is_wide: bool = False  # whether it needs the width of the page
    is_tall: bool = False  # whether others fit beside it
    is_folded: bool = False  # whether it is shown on request


def draw_safely(title: str, draw: Callable[[], Figure]) -> Figure:
    """Return the figure that a function draws, or one line that says why it could not be drawn.

    A report must not fail because one of its figures does.

    Args:
        title: Title of the figure.
        draw: Function that draws it.
    """
    try:
        return draw()
    except Exception as error:
        reason = f"{type(error).__name__}: {describe_error(error, 200)}"
        print(f"report: {title!r} could not be drawn ({reason})", file=sys.stderr)
        return Figure(title, error=reason)


def make_chart(title: str, svg: str, alt: str, note: str = "", *, is_wide: bool = False) -> Figure:
    """Create a figure from a chart."""
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    is_tall = size is not None and float(size[2]) > 1.3 * float(size[1])
    return Figure(title, alt, note, svg=Markup(svg), is_wide=is_wide, is_tall=is_tall)


def encode_image(pixels: np.ndarray) -> str:
    """Encode an image (H, W, 1 or 3) uint8 as a data: URL, reduced to `MAX_TILE_SIDE`."""
    image = as_image(pixels)
    if max(image.size) > MAX_TILE_SIDE:
        image.thumbnail((MAX_TILE_SIDE, MAX_TILE_SIDE))
    return _encode(image, "PNG" if max(image.size) <= MAX_PNG_SIDE else "JPEG")


def encode_strip(maps: np.ndarray, side: int, columns: int, colours: str) -> str:
    """Encode maps side by side as a data: URL, each scaled to its own range.

    Args:
        maps: (N, h, w) values, or (N, h, w, 3) colours in [0, 1].
        side: Height and width of each map in the strip, in pixels.
        columns: Number of maps in a line.
        colours: Name of a colour map of matplotlib.
    """
    from matplotlib import colormaps

    lines = -(-len(maps) // columns)
    strip = np.zeros((lines * (side + GAP) - GAP, min(columns, len(maps)) * (side + GAP) - GAP, 4), np.uint8)
    for number, values in enumerate(maps):
        rgb = values[..., :3] if values.ndim == 3 else colormaps[colours](values)[..., :3]
        image = Image.fromarray((rgb * 255).round().astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
        top, left = number // columns * (side + GAP), number % columns * (side + GAP)
        strip[top : top + side, left : left + side, :3] = np.asarray(image)
        strip[top : top + side, left : left + side, 3] = 255
    return _encode(Image.fromarray(strip), "PNG")


def overlay_evidence(pixels: np.ndarray, evidence: np.ndarray, side: int = MAX_TILE_SIDE) -> str:
    """Encode an image beside the same image with evidence over it, as a data: URL.

    Args:
        pixels: (H, W, 1 or 3) uint8.
        evidence: (h, w) in [0, 1].
        side: Height and width of each, in pixels.
    """
    from matplotlib import colormaps

    image = as_image(pixels).convert("RGB").resize((side, side), Image.Resampling.NEAREST)
    large = Image.fromarray((evidence * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    heat = np.asarray(large)[..., None] / 255
    grey = np.asarray(image.convert("L").convert("RGB")) * 0.55
    mixed = grey * (1 - 0.65 * heat) + colormaps["inferno"](heat[..., 0])[..., :3] * 255 * 0.65 * heat
    pair = np.concatenate([np.asarray(image), np.clip(mixed, 0, 255).astype(np.uint8)], axis=1)
    return _encode(Image.fromarray(pair), "JPEG")


def scale_to_unit(values: np.ndarray) -> np.ndarray:
    """Scale each of several maps (N, ...) to the range from 0 to 1; a constant map becomes 0."""
    axes = tuple(range(1, values.ndim))
    low, high = values.min(axis=axes, keepdims=True), values.max(axis=axes, keepdims=True)
    return (values - low) / np.maximum(high - low, 1e-12)


def _encode(image: Image.Image, form: str) -> str:
    written = io.BytesIO()
    if form == "PNG":
        image.save(written, "PNG", optimize=True)
    else:
        image.save(written, "JPEG", quality=88)
    return f"data:image/{form.lower()};base64,{base64.b64encode(written.getvalue()).decode()}"
