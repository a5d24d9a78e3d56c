"""Cards of the fetch and preprocess stages."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from convoy.data.card import sections
from convoy.data.card.markdown import escape, format_bullets, format_table, join_paragraphs
from convoy.data.card.summary import FetchSummary, PreprocessSummary


@contextlib.contextmanager
def _default_style() -> Iterator[None]:
    """Use matplotlib's default style instead of the user's, because the plots are part of a stage's output."""
    from matplotlib import style

    with style.context("default"):
        yield


@_default_style()
def write_fetch_card(summary: FetchSummary, folder: Path) -> None:
    """Write `card.md` of the fetch stage, and its plots.

    Where the card truncates a list, it refers to `quarantine.csv` or `merged.csv`.

    Args:
        summary: Result of the fetch stage.
        folder: Folder to write to.
    """
    counts = sections.count_images(summary.table, summary.classes)
    headline = {
        "images": len(summary.table),
        "classes": len(summary.classes),
        "quarantined": len(summary.quarantine),
        "merged copies": len(summary.merged),
    }
    if groups := len(set(summary.table["group"].unique()) - {""}):
        headline["groups"] = groups
    bodies = {
        "": format_table(pd.DataFrame([headline])),
        "Notes": format_bullets(summary.notes),
        "Changes": format_bullets(summary.changes) or "This is the first version of the data.",
        "Classes": join_paragraphs(
            sections.describe_balance(counts["images"]), sections.describe_classes(counts, folder)
        ),
        "Size and colour": sections.describe_sizes(summary.table, folder),
        "Sample images": sections.draw_samples(
            sections.select_classes(counts), summary.classes, summary.table, summary.read_image, folder
        ),
        "Quarantine": sections.list_quarantine(summary.quarantine),
        "Merged copies": sections.list_merged(summary.merged),
        "Images of each class": sections.format_long_class_table(counts),
    }
    _write(f"{escape(summary.name)}: fetched images", bodies, folder)


@_default_style()
def write_preprocess_card(summary: PreprocessSummary, folder: Path) -> None:
    """Write `card.md` of the preprocess stage, and its plots.

    Where the card truncates a list, it refers to `near_duplicates.csv` or `excluded.csv`.

    Args:
        summary: Result of the preprocess stage.
        folder: Folder to write to.
    """
    table = summary.table
    counts = sections.count_images(table, summary.classes)
    headline = {
        "images": len(table),
        **{split: int((table["split"] == split).sum()) for split in ("train", "val", "test")},
        "classes": len(summary.classes),
        "excluded": len(summary.excluded),
        "near-duplicates": summary.pair_count,
    }
    samples = sections.draw_samples(
        sections.select_sheet_classes(counts), summary.classes, table, summary.read_image, folder
    )
    bodies = {
        "": format_table(pd.DataFrame([headline])),
        "Notes": format_bullets(summary.notes),
        "Splits": join_paragraphs(
            sections.describe_splits(table),
            summary.groups and f"{summary.groups}.",
            sections.describe_classes(counts, folder),
        ),
        "Network inputs": join_paragraphs(sections.describe_channels(summary), samples),
        "Near-duplicates with different labels": sections.list_label_conflicts(summary, folder),
        "Near-duplicates with the same label": sections.list_near_duplicates(summary, folder),
        "Excluded images": sections.list_excluded(summary.excluded),
        "Images of each class": sections.format_long_class_table(counts),
    }
    _write(f"{escape(summary.name)}: preprocessed images", bodies, folder)


def _write(title: str, bodies: dict[str, str], folder: Path) -> None:
    """Write the sections that are not empty to `card.md`, each under its heading."""
    written = [f"## {heading}\n\n{body}" if heading else body for heading, body in bodies.items() if body]
    text = join_paragraphs(f"# {title}", *written) + "\n"
    (folder / "card.md").write_text(text, encoding="utf-8", newline="\n")
