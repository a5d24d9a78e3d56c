"""Sections of a data card, as Markdown with links to the plots that they draw."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from convoy.data.card import plots
from convoy.data.card.markdown import MAX_LISTED_ROWS, format_count, format_table, join_paragraphs, quote
from convoy.data.card.summary import PreprocessSummary, ReadImage

# If there are more classes, only the largest and the smallest are shown, `EXTREME_CLASSES` each.
MAX_SHOWN_CLASSES = 200
EXTREME_CLASSES = 50
# A table of classes with more rows is at the end of the card.
MAX_SHORT_TABLE_ROWS = 20
CLASSES_PER_SHEET = 20
# Pairs of near-duplicates in one plot.
MAX_DRAWN_PAIRS = 12


def describe_balance(counts: pd.Series) -> str:
    """Describe the class balance in a few sentences.

    Args:
        counts: Number of images by class, the largest first.
    """
    present = counts[counts > 0]
    if present.empty:
        return ""
    first, last = quote(str(present.index[0])), quote(str(present.index[-1]))
    largest, smallest = int(present.iloc[0]), int(present.iloc[-1])
    fraction, ratio = f"{largest / present.sum():.1%} of the images", largest / smallest
    if largest == smallest:
        text = (
            f"Every class has {format_count(largest, 'image')}; always predicting the same is correct for {fraction}."
        )
    else:
        times = f"{ratio:.2f}" if ratio < 2 else f"{ratio:,.1f}"
        text = (
            f"The largest class, {first}, has {format_count(largest, 'image')}: {times} times as many as the smallest,"
            f" {last}, with {smallest:,}. Always predicting {first} is correct for {fraction}."
        )
    empty = [quote(label) for label in counts.index[counts == 0]]
    if empty:
        shown = ", ".join(empty[:MAX_SHORT_TABLE_ROWS])
        rest = f" and {len(empty) - MAX_SHORT_TABLE_ROWS:,} more" if len(empty) > MAX_SHORT_TABLE_ROWS else ""
        text += f" Classes without images: {shown}{rest}."
    return text


def describe_classes(counts: pd.DataFrame, folder: Path) -> str:
    """Draw a bar chart of the classes, the largest first, and add a table if there are few of them."""
    shown = counts.loc[select_classes(counts)]
    text = ""
    if len(shown) < len(counts):
        text = f"Of {len(counts):,} classes these are the {EXTREME_CLASSES} largest and the {EXTREME_CLASSES} smallest."
    plots.draw_class_counts(shown, folder / "classes.png")
    table = _format_class_table(counts) if len(shown) <= MAX_SHORT_TABLE_ROWS else ""
    return join_paragraphs(text, "![Number of images of each class](classes.png)", table)


def format_long_class_table(counts: pd.DataFrame) -> str:
    """Format the table of the classes if it is too long for `describe_classes`."""
    return _format_class_table(counts) if len(counts) > MAX_SHORT_TABLE_ROWS else ""


def _format_class_table(counts: pd.DataFrame) -> str:
    shown = counts.loc[select_classes(counts)]
    table = shown.assign(fraction=shown["images"] / max(1, counts["images"].sum()))
    table.insert(0, "class", shown.index)
    return format_table(table)


def describe_splits(table: pd.DataFrame) -> str:
    """Describe which fraction of the images each split has."""
    fractions = table["split"].value_counts(normalize=True).reindex(["train", "val", "test"], fill_value=0)
    return "Of the images " + ", ".join(f"{fraction:.1%} {split}" for split, fraction in fractions.items()) + "."


def describe_channels(summary: PreprocessSummary) -> str:
    """Describe the shape of the images, and mean and standard deviation of their channels."""
    colour, names = ("grey", ["grey"]) if summary.channels == 1 else ("RGB", ["red", "green", "blue"])
    statistics = pd.DataFrame({"channel": names, "mean": summary.mean, "standard deviation": summary.std})
    return join_paragraphs(
        f"Every image has {summary.size}x{summary.size} pixels, {colour}. Measured on the training images, in units of"
        " [0, 1]:",
        format_table(statistics),
    )


def describe_sizes(table: pd.DataFrame, folder: Path) -> str:
    """Describe the sizes of the files, the images that were reduced, and the fraction of grey images."""
    if table.empty:
        return ""
    sizes = table[["source_width", "source_height"]].value_counts().sort_index().reset_index(name="images")
    area = sizes["source_width"] * sizes["source_height"]
    by_area = sizes.assign(area=area).sort_values("area", kind="stable")
    names = [
        f"{width}x{height}" for width, height in zip(by_area["source_width"], by_area["source_height"], strict=True)
    ]
    median = int(np.searchsorted(by_area["images"].cumsum(), len(table) / 2))
    if len(sizes) == 1:
        text = f"Every image has {names[0]} pixels."
    else:
        text = (
            f"Width x height in pixels: the smallest image has {names[0]}, the median {names[median]}, the largest"
            f" {names[-1]}."
        )
    stored, original = table[["height", "width"]].max(axis=1), table[["source_height", "source_width"]].max(axis=1)
    if reduced := int((stored < original).sum()):
        text += f" Reduced: {format_count(reduced, 'image')}, no side above {stored.max():,} pixels."
    grey = int((table["channels"] == 1).sum())
    if grey in (0, len(table)):
        text += " All are grey." if grey else " All are RGB."
    else:
        text += f" {grey:,} ({grey / len(table):.1%}) are grey, {len(table) - grey:,} are RGB."
    if len(sizes) == 1:
        return text
    plots.draw_sizes(sizes, folder / "sizes.png")
    return join_paragraphs(text, "![Width and height of the images](sizes.png)")


def draw_samples(
    selected: Sequence[str], classes: Sequence[str], table: pd.DataFrame, read_image: ReadImage, folder: Path
) -> str:
    """Draw a row of images for each selected class that has any, in the order of `classes`."""
    indices = table.groupby("label", observed=True).indices
    rows_by_label = {str(label): np.asarray(rows) for label, rows in indices.items()}
    names = [label for label in classes if label in set(selected) and label in rows_by_label]
    if not names:
        return ""
    which = "each class" if len(names) == len(classes) else f"{len(names):,} of the {len(classes):,} classes"
    texts = [f"A row for {which}: up to {plots.IMAGES_PER_CLASS} of its images, evenly spaced over all of them."]
    margin = plots.sheet_margin(names)
    for number, start in enumerate(range(0, len(names), CLASSES_PER_SHEET), start=1):
        on_sheet = names[start : start + CLASSES_PER_SHEET]
        file = folder / f"contact_{number}.png"
        plots.draw_contact_sheet({label: rows_by_label[label] for label in on_sheet}, read_image, margin, file)
        texts.append(f"![Images of {format_count(len(on_sheet), 'class', 'classes')}]({file.name})")
        if not all(plots.is_label_drawable(label) for label in on_sheet):
            texts.append("From top to bottom: " + ", ".join(quote(label) for label in on_sheet) + ".")
    return join_paragraphs(*texts)


def list_quarantine(quarantine: pd.DataFrame) -> str:
    """Count the quarantined images by reason, and list them."""
    if quarantine.empty:
        return ""
    reasons = quarantine["reason"].value_counts(sort=False).sort_index().sort_values(ascending=False, kind="stable")
    counts = reasons.head(MAX_SHORT_TABLE_ROWS).rename_axis("reason").reset_index(name="images")
    others = reasons.iloc[MAX_SHORT_TABLE_ROWS:]
    if len(others):
        rest = {"reason": f"{len(others):,} other reasons", "images": int(others.sum())}
        counts = pd.concat([counts, pd.DataFrame([rest])], ignore_index=True)
    text = f"Excluded as invalid or in conflict with another image: {format_count(len(quarantine), 'image')}."
    rows = _list_rows(quarantine[["path", "label", "reason"]], "quarantine.csv")
    return join_paragraphs(text, format_table(counts), rows)


def list_merged(merged: pd.DataFrame) -> str:
    """List the exact copies of other images."""
    if merged.empty:
        return ""
    text = f"Exact copies of another image, of which only that one is kept: {format_count(len(merged), 'file')}."
    return join_paragraphs(text, _list_rows(merged[["path", "kept"]], "merged.csv"))


def list_excluded(excluded: pd.DataFrame) -> str:
    """List the images that are excluded because they would leak between splits."""
    if excluded.empty:
        return ""
    text = (
        f"Excluded, because they would leak between splits and make the metrics too good:"
        f" {format_count(len(excluded), 'image')}. preprocess.near_duplicate_threshold in conf/config.yaml sets how"
        " similar near-duplicates are."
    )
    return join_paragraphs(text, _list_rows(excluded[["path", "label", "reason"]], "excluded.csv"))


def list_label_conflicts(summary: PreprocessSummary, folder: Path) -> str:
    """List the near-duplicates with two different labels, and draw some of them side by side."""
    pairs = summary.near_duplicates.astype(str)
    pairs = pairs[pairs["label"] != pairs["other_label"]]
    if pairs.empty:
        return ""
    text = f"{format_count(summary.conflict_count, 'pair')}. One of the two labels may be wrong."
    drawn = _draw_pairs(pairs, pairs["label"] + " / " + pairs["other_label"], summary, folder / "label_conflicts.png")
    rows = _list_pairs(pairs, MAX_LISTED_ROWS).rename(columns={"other_label": "other label"})
    return join_paragraphs(text, drawn, _list_rows(rows, "near_duplicates.csv", summary.conflict_count))


def list_near_duplicates(summary: PreprocessSummary, folder: Path) -> str:
    """List some near-duplicates with the same label, and draw them side by side."""
    pairs = summary.near_duplicates.astype(str)
    pairs = pairs[pairs["label"] == pairs["other_label"]]
    if pairs.empty:
        return ""
    count = summary.pair_count - summary.conflict_count
    drawn = _draw_pairs(pairs, pairs["label"], summary, folder / "near_duplicates.png")
    rows = _list_pairs(pairs, MAX_DRAWN_PAIRS).drop(columns="other_label")
    return join_paragraphs(f"{format_count(count, 'pair')}.", drawn, _list_rows(rows, "near_duplicates.csv", count))


def _draw_pairs(pairs: pd.DataFrame, names: pd.Series, summary: PreprocessSummary, file: Path) -> str:
    drawn = plots.space_evenly(pairs.index.to_numpy(), MAX_DRAWN_PAIRS)
    paths = pairs.loc[drawn, ["path", "other"]].itertuples(index=False)
    images = [tuple(map(summary.read_original, pair)) for pair in paths]
    plots.draw_pairs(images, names.loc[drawn].tolist(), file)
    return f"![Pairs of near-duplicates]({file.name})"


def _list_pairs(pairs: pd.DataFrame, max_rows: int) -> pd.DataFrame:
    """Select and number at most `max_rows` pairs, first those that are drawn."""
    drawn = plots.space_evenly(pairs.index.to_numpy(), MAX_DRAWN_PAIRS)
    listed = pd.concat([pairs.loc[drawn], pairs.drop(drawn)]).head(max_rows)
    listed.insert(0, "pair", range(1, len(listed) + 1))
    return listed[["pair", "path", "other", "label", "other_label"]]


def _list_rows(table: pd.DataFrame, file: str, total: int = 0) -> str:
    """Format the first rows of a table, and refer to `file` for the rest.

    Args:
        table: The rows.
        file: Name of the file with all rows.
        total: Total number of rows, if `table` does not contain all of them.
    """
    shown, total = table.head(MAX_LISTED_ROWS), total or len(table)
    note = f"{len(shown)} of {total:,}; all are in {file}:" if len(shown) < total else ""
    return join_paragraphs(note, format_table(shown))


def count_images(table: pd.DataFrame, classes: list[str]) -> pd.DataFrame:
    """Count the images of each class, the largest first, with a column for each split and "images" for the total."""
    counts = table.groupby(["label", "split"], observed=True).size().unstack(fill_value=0)
    counts = counts.set_axis(counts.columns.astype(str), axis=1).rename(columns={"": "no split"})
    counts = counts.set_axis(counts.index.astype(str)).reindex(classes, fill_value=0)
    splits = [split for split in ("train", "val", "test", "no split") if split in counts]
    counts = counts[splits].assign(images=counts[splits].sum(axis=1))
    counts = counts.sort_values("images", ascending=False, kind="stable")
    return counts[["images"]] if splits == ["no split"] else counts


def select_classes(counts: pd.DataFrame) -> list[str]:
    """Return all classes, or the largest and the smallest if there are very many."""
    labels = list(counts.index)
    return labels if len(labels) <= MAX_SHOWN_CLASSES else labels[:EXTREME_CLASSES] + labels[-EXTREME_CLASSES:]


def select_sheet_classes(counts: pd.DataFrame) -> list[str]:
    """Return as many classes as one contact sheet has rows for, from the largest to the smallest."""
    return plots.space_evenly(select_classes(counts), CLASSES_PER_SHEET)
