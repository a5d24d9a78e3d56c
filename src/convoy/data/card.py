"""Data card: a Markdown description of a data set, with tables, plots and sample images."""

import contextlib
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from convoy.data.fonts import font_families, missing_letters
from convoy.data.image_io import as_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# If there are more than `ALL` classes, only the `EXTREMES` largest and the `EXTREMES` smallest are shown.
ALL = 200
EXTREMES = 50
# A table of classes with more rows is at the end of the card.
SHORT = 20
# Images with a larger aspect ratio are cropped to it where they are shown.
LONG = 4
# Rows of a list in the card; the stage writes the complete list to a CSV file beside it.
LISTED = 50
# Classes on one contact sheet.
SHEET = 20
# Images of each class on a contact sheet.
ACROSS = 10
# Pairs of near-duplicates in one plot.
PAIRS = 12
# Characters of a name in the card; the middle of a longer one is left out.
LONGEST = 80

# Width of a plot in pixels, which a page on GitHub shows without shrinking it.
WIDTH = 860
# Pixels per inch.
DPI = 100
INK, PALE, BACKDROP = "#24292f", "#6e7781", (240, 242, 244)
COLOURS = {"train": "#4c78a8", "val": "#f2b56b", "test": "#6bb3a6", "no split": "#9fb3c8", "images": "#4c78a8"}

# Function from a row number to an image (H, W, 1 or 3) uint8.
Images = Callable[[int], np.ndarray]


@dataclass(frozen=True)
class FetchSummary:
    """Result of the fetch stage, as shown in its card."""

    name: str
    classes: list[str]  # K names; some classes may have no images (any more)
    # A row for each image: path, label, split ("", train, val or test, as the source gives it), group, height, width,
    # channels (as stored), source_height, source_width (as found).
    table: pd.DataFrame
    images: Images
    quarantine: pd.DataFrame  # path, label, reason
    merged: pd.DataFrame  # path, kept: an exact copy, and the path of the image that is kept instead
    changes: list[str]  # sentences: the changes since the last version of the data; [] for the first version
    notes: list[str]  # sentences


@contextlib.contextmanager
def _plain_style() -> Iterator[None]:
    """Use matplotlib's default style instead of the user's, because the plots are part of a stage's output."""
    from matplotlib import style

    with style.context("default"):
        yield


@_plain_style()
def write_fetch_card(found: FetchSummary, folder: Path) -> None:
    """Write `card.md` of the fetch stage, and its plots.

    Where the card truncates a list, it refers to `quarantine.csv` or `merged.csv`.

    Args:
        found: Result of the fetch stage.
        folder: Folder to write to.
    """
    table, labels = found.table, _labels(found.table)
    counts = _counts(table, found.classes)
    headline = {
        "images": len(table),
        "classes": len(found.classes),
        "in quarantine": len(found.quarantine),
        "merged copies": len(found.merged),
    }
    if groups := len(set(table["group"].unique()) - {""}):
        headline["groups"] = groups
    sections = [
        ("", _table(pd.DataFrame([headline]))),
        ("Worth knowing", _bullets(found.notes)),
        ("What changed", _bullets(found.changes) or "This is the first version of the data."),
        ("Classes", _paragraphs(_balance(counts["images"]), _class_bars(counts, folder))),
        ("Size and colour", _sizes(table, folder)),
        ("What the images look like", _contact_sheets(_shown(counts), found.classes, labels, found.images, folder)),
        ("In quarantine", _quarantine(found.quarantine)),
        ("Merged copies", _merged(found.merged)),
        ("Images of each class", _class_numbers(counts) if len(counts) > SHORT else ""),
    ]
    _write(f"{_text(found.name)}: the images as found", sections, folder)


@dataclass(frozen=True)
class PreprocessSummary:
    """Result of the preprocess stage, as shown in its card."""

    name: str
    classes: list[str]  # K names
    size: int  # height and width of an image, in pixels
    channels: int  # 1 grey or 3 RGB
    mean: list[float]  # of each channel, in [0, 1]
    std: list[float]  # of each channel, in (0, 1]
    table: pd.DataFrame  # path, label, split; a row for each image, in the order of the arrays
    images: Images  # (size, size, channels) uint8; the inputs of the networks
    found: Callable[[str], np.ndarray]  # path -> (H, W, 1 or 3) uint8, for any image that has a near-duplicate
    near: pd.DataFrame  # path, other, label, other_label: near-duplicates; pairs with two different labels first
    pairs: int  # number of pairs in total, of which `near` may list only the first
    doubtful: int  # number of pairs with two different labels
    withheld: pd.DataFrame  # path, label, reason: images excluded because they would leak between splits
    notes: list[str]  # sentences


@_plain_style()
def write_preprocess_card(prepared: PreprocessSummary, folder: Path) -> None:
    """Write `card.md` of the preprocess stage, and its plots.

    Where the card truncates a list, it refers to `near.csv` or `withheld.csv`.

    Args:
        prepared: Result of the preprocess stage.
        folder: Folder to write to.
    """
    table, labels = prepared.table, _labels(prepared.table)
    counts = _counts(table, prepared.classes)
    headline = {
        "images": len(table),
        **{split: int((table["split"] == split).sum()) for split in ("train", "val", "test")},
        "classes": len(prepared.classes),
        "withheld": len(prepared.withheld),
        "near duplicates": prepared.pairs,
    }
    near = prepared.near.astype(str)
    agree = near["label"] == near["other_label"]
    seen = _contact_sheets(_spread(_shown(counts), SHEET), prepared.classes, labels, prepared.images, folder)
    sections = [
        ("", _table(pd.DataFrame([headline]))),
        ("Worth knowing", _bullets(prepared.notes)),
        ("Splits", _paragraphs(_split_shares(table), _class_bars(counts, folder))),
        ("What the networks see", _paragraphs(_measures(prepared), seen)),
        (
            "Nearly equal, with different labels",
            _near(near[~agree], prepared.doubtful, LISTED, prepared, folder / "doubtful.png"),
        ),
        (
            "Nearly equal, with the same label",
            _near(near[agree], prepared.pairs - prepared.doubtful, PAIRS, prepared, folder / "near.png"),
        ),
        ("Withheld", _withheld(prepared.withheld)),
        ("Images of each class", _class_numbers(counts) if len(counts) > SHORT else ""),
    ]
    _write(f"{_text(prepared.name)}: the images as prepared", sections, folder)


# Sections


def _write(title: str, sections: Sequence[tuple[str, str]], folder: Path) -> None:
    """Write the sections that are not empty to `card.md`, each under its heading."""
    written = [f"## {heading}\n\n{body}" if heading else body for heading, body in sections if body]
    text = _paragraphs(f"# {title}", *written) + "\n"
    (folder / "card.md").write_text(text, encoding="utf-8", newline="\n")


def _balance(counts: pd.Series) -> str:
    """Describe the class balance in a few sentences.

    Args:
        counts: Number of images by class, the largest first.
    """
    some = counts[counts > 0]
    if some.empty:
        return ""
    first, last = _name(str(some.index[0])), _name(str(some.index[-1]))
    largest, smallest = int(some.iloc[0]), int(some.iloc[-1])
    share, ratio = f"{largest / some.sum():.1%} of the images", largest / smallest
    if largest == smallest:
        said = f"Every class has {_count(largest, 'image')}; to answer always the same would be right for {share}."
    else:
        times = f"{ratio:.2f}" if ratio < 2 else f"{ratio:,.1f}"
        said = (
            f"The largest class, {first}, has {_count(largest, 'image')}: {times} times as many as the smallest,"
            f" {last}, with {smallest:,}. To answer always {first} would be right for {share}."
        )
    empty = [_name(label) for label in counts.index[counts == 0]]
    if empty:
        rest = f" and {len(empty) - SHORT:,} more" if len(empty) > SHORT else ""
        said += f" No image at all: {', '.join(empty[:SHORT])}{rest}."
    return said


def _class_bars(counts: pd.DataFrame, folder: Path) -> str:
    """Draw a bar chart of the classes, the largest first, and add a table if there are few of them."""
    shown = counts.loc[_shown(counts)]
    said = ""
    if len(shown) < len(counts):
        said = f"Of {len(counts):,} classes these are the {EXTREMES} largest and the {EXTREMES} smallest."
    _draw_bars(shown, folder / "classes.png")
    numbers = _class_numbers(counts) if len(shown) <= SHORT else ""
    return _paragraphs(said, "![Number of images of each class](classes.png)", numbers)


def _class_numbers(counts: pd.DataFrame) -> str:
    shown = counts.loc[_shown(counts)]
    table = shown.assign(share=shown["images"] / max(1, counts["images"].sum()))
    table.insert(0, "class", shown.index)
    return _table(table)


def _split_shares(table: pd.DataFrame) -> str:
    shares = table["split"].value_counts(normalize=True).reindex(["train", "val", "test"], fill_value=0)
    return "Of the images " + ", ".join(f"{share:.1%} {split}" for split, share in shares.items()) + "."


def _measures(prepared: PreprocessSummary) -> str:
    colour = "grey" if prepared.channels == 1 else "RGB"
    size = f"{prepared.size}x{prepared.size}"
    names = ["grey"] if prepared.channels == 1 else ["red", "green", "blue"]
    measured = pd.DataFrame({"channel": names, "mean": prepared.mean, "standard deviation": prepared.std})
    return _paragraphs(
        f"Every image has {size} pixels, {colour}. Measured on the training images, in units of [0, 1]:",
        _table(measured),
    )


def _sizes(table: pd.DataFrame, folder: Path) -> str:
    """Describe the sizes as found, the images that were reduced, and the fraction of grey images."""
    if table.empty:
        return ""
    sizes = table[["source_width", "source_height"]].value_counts().sort_index().reset_index(name="images")
    area = sizes["source_width"] * sizes["source_height"]
    by_area = sizes.assign(area=area).sort_values("area", kind="stable")
    named = [
        f"{width}x{height}" for width, height in zip(by_area["source_width"], by_area["source_height"], strict=True)
    ]
    middle = int(np.searchsorted(by_area["images"].cumsum(), len(table) / 2))
    if len(sizes) == 1:
        said = f"Every image has {named[0]} pixels."
    else:
        said = (
            f"Width x height in pixels: the smallest image has {named[0]}, the median {named[middle]}, the largest"
            f" {named[-1]}."
        )
    stored, found = table[["height", "width"]].max(axis=1), table[["source_height", "source_width"]].max(axis=1)
    if reduced := int((stored < found).sum()):
        said += f" Stored smaller than found: {_count(reduced, 'image')}, no side above {stored.max():,} pixels."
    grey = int((table["channels"] == 1).sum())
    if grey in (0, len(table)):
        said += " All are grey." if grey else " All are RGB."
    else:
        said += f" {grey:,} ({grey / len(table):.1%}) are grey, {len(table) - grey:,} are RGB."
    if len(sizes) == 1:
        return said
    _draw_sizes(sizes, folder / "sizes.png")
    return _paragraphs(said, "![Width and height of the images](sizes.png)")


def _contact_sheets(
    chosen: Sequence[str], classes: Sequence[str], labels: Mapping[str, np.ndarray], images: Images, folder: Path
) -> str:
    """Draw a row of images for each chosen class that has any, in the order of `classes`."""
    rows = {label: labels[label] for label in classes if label in set(chosen) and label in labels}
    if not rows:
        return ""
    of = "each class" if len(rows) == len(classes) else f"{len(rows):,} of the {len(classes):,} classes"
    said = [f"A row for {of}: up to {ACROSS} of its images, spread evenly over all of them."]
    names = list(rows)
    # Width of the class names, in pixels.
    margin = 30 + 7 * max(_columns(_line(label, 22)) for label in names)
    for number, start in enumerate(range(0, len(names), SHEET), start=1):
        part = names[start : start + SHEET]
        _draw_contact_sheet({label: rows[label] for label in part}, images, margin, folder / f"contact_{number}.png")
        said.append(f"![Images of {_count(len(part), 'class', 'classes')}](contact_{number}.png)")
        if not all(_can_be_drawn(label) for label in part):
            said.append("From top to bottom: " + ", ".join(_name(label) for label in part) + ".")
    return _paragraphs(*said)


def _quarantine(quarantine: pd.DataFrame) -> str:
    if quarantine.empty:
        return ""
    reasons = quarantine["reason"].value_counts(sort=False).sort_index().sort_values(ascending=False, kind="stable")
    counted = reasons.head(SHORT).rename_axis("reason").reset_index(name="images")
    if len(reasons) > SHORT:
        rest = {"reason": f"{len(reasons) - SHORT:,} other reasons", "images": int(reasons.iloc[SHORT:].sum())}
        counted = pd.concat([counted, pd.DataFrame([rest])], ignore_index=True)
    said = f"Unusable, or in conflict with another image, and left out: {_count(len(quarantine), 'image')}."
    return _paragraphs(said, _table(counted), _listed(quarantine[["path", "label", "reason"]], "quarantine.csv"))


def _merged(merged: pd.DataFrame) -> str:
    if merged.empty:
        return ""
    said = f"Exact copies of another image, which stands for them all: {_count(len(merged), 'file')}."
    return _paragraphs(said, _listed(merged[["path", "kept"]], "merged.csv"))


def _withheld(withheld: pd.DataFrame) -> str:
    if withheld.empty:
        return ""
    said = (
        f"{_count(len(withheld), 'image')} would have made the figures too good, and take no part."
        " preprocess.near_duplicate in conf/config.yaml says from where on images nearly equal each other."
    )
    return _paragraphs(said, _listed(withheld[["path", "label", "reason"]], "withheld.csv"))


def _near(near: pd.DataFrame, count: int, listed: int, prepared: PreprocessSummary, picture: Path) -> str:
    """Draw some of the `count` near-duplicates side by side, and list them first in a table of pairs."""
    if near.empty:
        return ""
    near = near.reset_index(drop=True)
    pictured = near.loc[_spread(range(len(near)), PAIRS)]
    listing = pd.concat([pictured, near.drop(pictured.index)]).head(listed).reset_index(drop=True)
    listing.insert(0, "pair", range(1, len(listing) + 1))

    doubtful = bool((near["label"] != near["other_label"]).any())
    said = [f"{_count(count, 'pair')}." + (" Worth a look: one of the two labels may be wrong." if doubtful else "")]
    pairs = [tuple(map(prepared.found, pair)) for pair in zip(pictured["path"], pictured["other"], strict=True)]
    labels = zip(pictured["label"], pictured["other_label"], strict=True)
    _draw_pairs(pairs, [f"{label} / {other}" if doubtful else label for label, other in labels], picture)
    said.append(f"![Pairs of images that are nearly equal]({picture.name})")
    columns = ["pair", "path", "other", "label", *(["other_label"] if doubtful else [])]
    shown = listing[columns].rename(columns={"other_label": "other label"})
    return _paragraphs(*said, _listed(shown, "near.csv", of=count))


def _listed(table: pd.DataFrame, file: str, of: int = 0) -> str:
    """Format the first rows of a table, and refer to `file` for the rest.

    Args:
        table: The rows.
        file: Name of the file with all rows.
        of: Total number of rows, if `table` does not contain all of them.
    """
    shown, of = table.head(LISTED), of or len(table)
    return _paragraphs(f"{len(shown)} of {of:,}; more are in {file}:" if len(shown) < of else "", _table(shown))


def _labels(table: pd.DataFrame) -> Mapping[str, np.ndarray]:
    """Return the row positions of each label."""
    return {str(label): np.asarray(rows) for label, rows in table.groupby("label", observed=True).indices.items()}


def _counts(table: pd.DataFrame, classes: list[str]) -> pd.DataFrame:
    """Count the images of each class, the largest first, with a column for each split and "images" for the total."""
    counts = table.groupby(["label", "split"], observed=True).size().unstack(fill_value=0)
    counts = counts.set_axis(counts.columns.astype(str), axis=1).rename(columns={"": "no split"})
    counts = counts.set_axis(counts.index.astype(str)).reindex(classes, fill_value=0)
    splits = [split for split in ("train", "val", "test", "no split") if split in counts]
    counts = counts[splits].assign(images=counts[splits].sum(axis=1))
    counts = counts.sort_values("images", ascending=False, kind="stable")
    return counts[["images"]] if splits == ["no split"] else counts


def _shown(counts: pd.DataFrame) -> list[str]:
    labels = list(counts.index)
    return labels if len(labels) <= ALL else labels[:EXTREMES] + labels[-EXTREMES:]


def _spread(items: Sequence[Any] | np.ndarray, most: int) -> list[Any]:
    """Select at most `most` items, evenly spaced from the first to the last."""
    positions = np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)
    return [items[position] for position in positions]


# Markdown


def _paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def _bullets(sentences: Sequence[str]) -> str:
    more = [f"- {len(sentences) - LISTED:,} more"] if len(sentences) > LISTED else []
    return "\n".join([*(f"- {_text(sentence, longest=500)}" for sentence in sentences[:LISTED]), *more])


def _table(table: pd.DataFrame) -> str:
    """Format a table as Markdown, with numbers right-aligned and with thousands separators."""
    numeric = {column: pd.api.types.is_numeric_dtype(values) for column, values in table.items()}
    cells = {
        column: [_number(value, str(column)) if numeric[column] else _text(value) for value in values]
        for column, values in table.items()
    }
    align = ["right" if right else "left" for right in numeric.values()]
    # Without disable_numparse, a class called 007 would become 7.
    return pd.DataFrame(cells).to_markdown(index=False, disable_numparse=True, colalign=align)


def _number(value: float, column: str) -> str:
    return f"{value:.1%}" if column == "share" else f"{value:,}"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _name(label: str) -> str:
    """Format a label as part of a sentence."""
    return f"'{_text(label)}'"


def _text(value: object, longest: int = LONGEST) -> str:
    """Format any value as one line of text in which nothing is interpreted as Markdown, HTML or a formula."""
    # Underscores inside a word need no escape.
    special = r"[&<>|`*\[\]~$\\#]|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(special, lambda found: f"&#{ord(found[0])};", _line(value, longest))


def _line(value: object, longest: int) -> str:
    """Format a value as one line, with unprintable characters escaped (\\n) and the middle of long texts left out."""
    # Zero-width characters inside words of some scripts, and inside emoji.
    joiners = "\u200c\u200d"
    text = "".join(
        letter if letter.isprintable() or letter in joiners else letter.encode("unicode_escape").decode()
        for letter in str(value)
    )
    longest = longest * len(text) // max(1, _columns(text))
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[len(text) - (longest - 1) // 2 :]}"


def _columns(text: str) -> int:
    """Return the width of a text in columns of a terminal."""
    return len(text) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)


# Plots


def _draw_bars(counts: pd.DataFrame, file: Path) -> None:
    """Draw a bar for each class, stacked by split, with many classes in several columns."""
    columns = math.ceil(len(counts) / EXTREMES)
    rows = math.ceil(len(counts) / columns)
    parts = [split for split in counts if split != "images"] or ["images"]
    usual, end = counts["images"].median(), max(1, counts["images"].max())
    # Cut very long bars, because all others would be invisible beside them.
    if end > 20 * usual > 0:
        end = 5 * usual
    edge = 1.02 * end
    figure = _figure(WIDTH, 70 + 20 * max(rows, 3))
    figure.suptitle("Images of each class", x=0.01, ha="left", color=INK, fontsize=11)
    for axes, start in zip(
        np.ravel(figure.subplots(1, columns, sharex=True)), range(0, len(counts), rows), strict=True
    ):
        shown = counts.iloc[start : start + rows]
        left = np.zeros(len(shown))
        for part in parts:
            axes.barh(range(len(shown)), shown[part], 0.72, left, color=COLOURS[str(part)], label=str(part))
            left += shown[part].to_numpy()
        for row, count in enumerate(shown["images"]):
            said = f"{count:,}" if count <= end else f"{count:,}, the bar is cut"
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(said, (count if count <= end else edge, row), color=PALE, fontsize=8, **place)
        longest = {1: 30, 2: 22, 3: 18}.get(columns, 14)
        names = [_line(label, longest) for label in shown.index]
        axes.set_yticks(range(len(shown)), names, parse_math=False, fontfamily=font_families(names))
        axes.set(ylim=(rows - 0.5, -0.5), xlim=(0, edge))
        axes.set_xticks([])
        axes.tick_params(length=0, labelsize=9, labelcolor=INK)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.spines["left"].set_color("#d0d7de")
    if len(parts) > 1:
        handles = axes.get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper right", ncols=len(parts), frameon=False, fontsize=9, labelcolor=INK)
    _save(figure, file)


def _draw_sizes(sizes: pd.DataFrame, file: Path) -> None:
    """Draw a histogram of the image sizes on logarithmic axes.

    Args:
        sizes: Columns source_width and source_height (pixels), and images (number of images of this size).
        file: File to write.
    """
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    sides = sizes[["source_width", "source_height"]].to_numpy()
    lowest, highest = math.floor(math.log2(sides.min())), math.ceil(math.log2(sides.max()))
    powers = [2**power for power in range(lowest, highest + 1)]
    figure = _figure(WIDTH // 2, WIDTH // 2)
    axes = figure.subplots()
    # Square images are on the diagonal.
    axes.plot(powers, powers, color="#d0d7de", linewidth=1, zorder=0)
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
    axes.set_xlabel("width in pixels", color=INK, fontsize=9)
    axes.set_ylabel("height in pixels", color=INK, fontsize=9)
    axes.set_title("Sizes as found (the darker, the more images)", loc="left", color=INK, fontsize=11)
    axes.tick_params(color="#d0d7de", labelsize=8, labelcolor=PALE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#d0d7de")
    _save(figure, file)


def _draw_contact_sheet(rows: Mapping[str, np.ndarray], images: Images, margin: int, file: Path) -> None:
    """Draw a row for each class, with its name, its number of images and some of them.

    Args:
        rows: Positions of the images of each class.
        images: Function from a position to an image.
        margin: Width of the names, in pixels.
        file: File to write.
    """
    side, gap = 64, 3
    canvas = np.full((len(rows) * (side + gap) - gap, margin + ACROSS * (side + gap) - gap, 3), 255, np.uint8)
    figure = _figure(canvas.shape[1], canvas.shape[0], layout=None)
    for line, (label, positions) in enumerate(rows.items()):
        top = line * (side + gap)
        for place, position in enumerate(_spread(positions, ACROSS)):
            left = margin + place * (side + gap)
            canvas[top : top + side, left : left + side] = _tile(images(int(position)), side)
        _write_at(figure, margin - 12, top + side / 2 - 8, _line(label, 22), INK, ha="right")
        _write_at(figure, margin - 12, top + side / 2 + 9, f"{len(positions):,}", PALE, ha="right")
    figure.figimage(canvas)
    _save(figure, file)


def _draw_pairs(pairs: Sequence[tuple[np.ndarray, ...]], names: Sequence[str], file: Path) -> None:
    """Draw the two images of each pair side by side, with the number and name of the pair below."""
    across, side, gap, below, between = 4, 96, 3, 32, 21
    width, height = 2 * side + gap + between, side + below
    lines = math.ceil(len(pairs) / across)
    canvas = np.full((lines * height, across * width - between, 3), 255, np.uint8)
    figure = _figure(canvas.shape[1], canvas.shape[0], layout=None)
    for number, (pair, name) in enumerate(zip(pairs, names, strict=True)):
        top, left = number // across * height, number % across * width
        for place, pixels in enumerate(pair):
            start = left + place * (side + gap)
            canvas[top : top + side, start : start + side] = _tile(pixels, side)
        _write_at(figure, left, top + side + 11, f"pair {number + 1}: {_line(name, 23)}", INK, ha="left")
    figure.figimage(canvas)
    _save(figure, file)


def _tile(pixels: np.ndarray, side: int) -> np.ndarray:
    """Fit an image (H, W, 1 or 3) uint8 into a tile (side, side, 3) uint8.

    Small images are enlarged by an integer factor so that their pixels are visible, and large ones are reduced. Very
    long ones are cropped to their middle, because they would be only a line.
    """
    image = as_image(pixels).convert("RGB")
    longest = LONG * min(image.size)
    if max(image.size) > longest:
        image = ImageOps.fit(image, (min(image.width, longest), min(image.height, longest)))
    if max(image.size) > side:
        image.thumbnail((side, side))
    else:
        image = ImageOps.scale(image, side // max(image.size), Image.Resampling.NEAREST)
    tile = Image.new("RGB", (side, side), BACKDROP)
    tile.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    # With 32 levels a channel, the PNG has a third of the bytes.
    return np.asarray(tile.point([level // 8 * 255 // 31 for level in range(256)] * 3))


def _figure(width: int, height: int, layout: Literal["constrained"] | None = "constrained") -> "Figure":
    """Create a figure of the given size in pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout=layout, facecolor="white")


def _write_at(figure: "Figure", left: float, top: float, text: str, colour: str, ha: str) -> None:
    """Write text at a position in pixels from the upper left corner."""
    width, height = figure.get_size_inches() * DPI
    place = {"x": left / width, "y": 1 - top / height, "ha": ha, "va": "center"}
    figure.text(**place, s=text, color=colour, fontsize=9, parse_math=False, fontfamily=font_families([text]))


def _save(figure: "Figure", file: Path) -> None:
    """Save a figure as a PNG without metadata, so that the same plot gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # A missing glyph is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3]).save(file)


def _can_be_drawn(label: str) -> bool:
    """Check whether a plot can show the complete name of a class."""
    return label == _line(label, 22) and not missing_letters([label])
