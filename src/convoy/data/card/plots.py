"""Plots of a data card: class counts, image sizes, contact sheets and pairs of images."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from convoy.data.card.fonts import find_font_families, find_missing_characters
from convoy.data.card.markdown import measure_width, shorten
from convoy.data.card.summary import ReadImage
from convoy.data.image_io import as_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Width of a plot in pixels, which a page on GitHub shows without shrinking it.
PLOT_WIDTH = 860
# Pixels per inch.
DPI = 100
TEXT_COLOUR, FAINT_COLOUR, AXIS_COLOUR, TILE_BACKGROUND = "#24292f", "#6e7781", "#d0d7de", (240, 242, 244)
SPLIT_COLOURS = {"train": "#4c78a8", "val": "#f2b56b", "test": "#6bb3a6", "no split": "#9fb3c8", "images": "#4c78a8"}
# Classes in one column of a bar chart.
BARS_PER_COLUMN = 50
# Images of each class on a contact sheet.
IMAGES_PER_CLASS = 10
# Columns of a class name on a contact sheet.
SHEET_NAME_WIDTH = 22
# Images with a larger aspect ratio are cropped to it.
MAX_ASPECT_RATIO = 4


def draw_class_counts(counts: pd.DataFrame, file: Path) -> None:
    """Draw a bar for each class, stacked by split, with many classes in several columns.

    Args:
        counts: Number of images by class, with a column for each split and "images" for the total.
        file: File to write.
    """
    columns = math.ceil(len(counts) / BARS_PER_COLUMN)
    rows = math.ceil(len(counts) / columns)
    splits = [split for split in counts if split != "images"] or ["images"]
    median, longest_bar = counts["images"].median(), max(1, counts["images"].max())
    # Cut very long bars, because all others would be invisible beside them.
    if longest_bar > 20 * median > 0:
        longest_bar = 5 * median
    edge = 1.02 * longest_bar
    figure = _create_figure(PLOT_WIDTH, 70 + 20 * max(rows, 3))
    figure.suptitle("Images of each class", x=0.01, ha="left", color=TEXT_COLOUR, fontsize=11)
    for axes, start in zip(
        np.ravel(figure.subplots(1, columns, sharex=True)), range(0, len(counts), rows), strict=True
    ):
        shown = counts.iloc[start : start + rows]
        left = np.zeros(len(shown))
        for split in splits:
            axes.barh(range(len(shown)), shown[split], 0.72, left, color=SPLIT_COLOURS[str(split)], label=str(split))
            left += shown[split].to_numpy()
        for row, count in enumerate(shown["images"]):
            is_cut = count > longest_bar
            axes.annotate(
                f"{count:,}, the bar is cut" if is_cut else f"{count:,}",
                (edge if is_cut else count, row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=FAINT_COLOUR,
                fontsize=8,
            )
        name_width = {1: 30, 2: 22, 3: 18}.get(columns, 14)
        names = [shorten(label, name_width) for label in shown.index]
        axes.set_yticks(range(len(shown)), names, parse_math=False, fontfamily=find_font_families(names))
        axes.set(ylim=(rows - 0.5, -0.5), xlim=(0, edge))
        axes.set_xticks([])
        axes.tick_params(length=0, labelsize=9, labelcolor=TEXT_COLOUR)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.spines["left"].set_color(AXIS_COLOUR)
    if len(splits) > 1:
        handles = axes.get_legend_handles_labels()
        figure.legend(
            *handles, loc="outside upper right", ncols=len(splits), frameon=False, fontsize=9, labelcolor=TEXT_COLOUR
        )
    _save(figure, file)


def draw_sizes(sizes: pd.DataFrame, file: Path) -> None:
    """Draw a histogram of the image sizes on logarithmic axes.

    Args:
        sizes: Columns source_width and source_height (pixels), and images (number of images of this size).
        file: File to write.
    """
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    sides = sizes[["source_width", "source_height"]].to_numpy()
    lowest, highest = math.floor(math.log2(sides.min())), math.ceil(math.log2(sides.max()))
    powers = [2**power for power in range(lowest, highest + 1)]
    figure = _create_figure(PLOT_WIDTH // 2, PLOT_WIDTH // 2)
    axes = figure.subplots()
    # Square images are on the diagonal.
    axes.plot(powers, powers, color=AXIS_COLOUR, linewidth=1, zorder=0)
    axes.hist2d(
        sides[:, 0],
        sides[:, 1],
        bins=np.geomspace(powers[0], powers[-1], 60),
        weights=sizes["images"],
        cmin=1,
        cmap=LinearSegmentedColormap.from_list("blues", ["#a9c1de", "#14355c"]),
        norm=LogNorm(),
    )
    axes.set(xscale="log", yscale="log", aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(powers, [str(power) for power in powers])
        axis.set_ticks([], minor=True)
    axes.set_xlabel("width in pixels", color=TEXT_COLOUR, fontsize=9)
    axes.set_ylabel("height in pixels", color=TEXT_COLOUR, fontsize=9)
    axes.set_title("Sizes of the files (the darker, the more images)", loc="left", color=TEXT_COLOUR, fontsize=11)
    axes.tick_params(color=AXIS_COLOUR, labelsize=8, labelcolor=FAINT_COLOUR)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(AXIS_COLOUR)
    _save(figure, file)


def draw_contact_sheet(rows_by_label: Mapping[str, np.ndarray], read_image: ReadImage, margin: int, file: Path) -> None:
    """Draw a row for each class, with its name, its number of images and some of them.

    Args:
        rows_by_label: Row numbers of the images of each class.
        read_image: Function from a row number to an image.
        margin: Width of the names, in pixels, see `sheet_margin`.
        file: File to write.
    """
    side, gap = 64, 3
    height, width = len(rows_by_label) * (side + gap) - gap, margin + IMAGES_PER_CLASS * (side + gap) - gap
    canvas = np.full((height, width, 3), 255, np.uint8)
    figure = _create_figure(width, height, layout=None)
    for line, (label, rows) in enumerate(rows_by_label.items()):
        top = line * (side + gap)
        for column, row in enumerate(space_evenly(rows, IMAGES_PER_CLASS)):
            left = margin + column * (side + gap)
            canvas[top : top + side, left : left + side] = make_tile(read_image(int(row)), side)
        name = shorten(label, SHEET_NAME_WIDTH)
        _write_text(figure, margin - 12, top + side / 2 - 8, name, TEXT_COLOUR, ha="right")
        _write_text(figure, margin - 12, top + side / 2 + 9, f"{len(rows):,}", FAINT_COLOUR, ha="right")
    figure.figimage(canvas)
    _save(figure, file)


def sheet_margin(labels: Sequence[str]) -> int:
    """Return the width of the class names on a contact sheet, in pixels."""
    return 30 + 7 * max(measure_width(shorten(label, SHEET_NAME_WIDTH)) for label in labels)


def is_label_drawable(label: str) -> bool:
    """Check whether a contact sheet can show the complete name of a class."""
    return label == shorten(label, SHEET_NAME_WIDTH) and not find_missing_characters([label])


def draw_pairs(pairs: Sequence[tuple[np.ndarray, ...]], names: Sequence[str], file: Path) -> None:
    """Draw the two images of each pair side by side, with the number and name of the pair below."""
    pairs_per_line, side, gap, text_height, pair_gap = 4, 96, 3, 32, 21
    pair_width, pair_height = 2 * side + gap + pair_gap, side + text_height
    height, width = math.ceil(len(pairs) / pairs_per_line) * pair_height, pairs_per_line * pair_width - pair_gap
    canvas = np.full((height, width, 3), 255, np.uint8)
    figure = _create_figure(width, height, layout=None)
    for number, (pair, name) in enumerate(zip(pairs, names, strict=True)):
        top, left = number // pairs_per_line * pair_height, number % pairs_per_line * pair_width
        for column, pixels in enumerate(pair):
            start = left + column * (side + gap)
            canvas[top : top + side, start : start + side] = make_tile(pixels, side)
        _write_text(figure, left, top + side + 11, f"pair {number + 1}: {shorten(name, 23)}", TEXT_COLOUR, ha="left")
    figure.figimage(canvas)
    _save(figure, file)


def space_evenly(items: Sequence[Any] | np.ndarray, max_count: int) -> list[Any]:
    """Select at most `max_count` items, evenly spaced from the first to the last."""
    positions = np.linspace(0, len(items) - 1, min(max_count, len(items))).round().astype(int)
    return [items[position] for position in positions]


def make_tile(pixels: np.ndarray, side: int) -> np.ndarray:
    """Fit an image (H, W, 1 or 3) uint8 into a tile (side, side, 3) uint8.

    Small images are enlarged by an integer factor so that their pixels are visible, and large ones are reduced. Very
    long ones are cropped to their middle, because they would be only a line.
    """
    image = as_image(pixels).convert("RGB")
    max_length = MAX_ASPECT_RATIO * min(image.size)
    if max(image.size) > max_length:
        image = ImageOps.fit(image, (min(image.width, max_length), min(image.height, max_length)))
    if max(image.size) > side:
        image.thumbnail((side, side))
    else:
        image = ImageOps.scale(image, side // max(image.size), Image.Resampling.NEAREST)
    tile = Image.new("RGB", (side, side), TILE_BACKGROUND)
    tile.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    # With 32 levels a channel, the PNG has a third of the bytes.
    return np.asarray(tile.point([level // 8 * 255 // 31 for level in range(256)] * 3))


def _create_figure(width: int, height: int, layout: Literal["constrained"] | None = "constrained") -> "Figure":
    """Create a figure of the given size in pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout=layout, facecolor="white")


def _write_text(figure: "Figure", left: float, top: float, text: str, colour: str, ha: str) -> None:
    """Write text at a position in pixels from the upper left corner."""
    width, height = figure.get_size_inches() * DPI
    position = {"x": left / width, "y": 1 - top / height, "ha": ha, "va": "center"}
    figure.text(**position, s=text, color=colour, fontsize=9, parse_math=False, fontfamily=find_font_families([text]))


def _save(figure: "Figure", file: Path) -> None:
    """Save a figure as a PNG without metadata, so that the same plot gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A missing glyph is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3]).save(file)
