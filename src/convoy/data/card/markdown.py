"""Markdown formatting, in which no label or file name is interpreted as Markdown."""

import re
import unicodedata
from collections.abc import Sequence

import pandas as pd

# Rows or sentences of a list in the card; the stage writes the complete list to a CSV file beside it.
MAX_LISTED_ROWS = 50
# Characters of a name in the card; the middle of a longer one is left out.
MAX_NAME_LENGTH = 80
MAX_SENTENCE_LENGTH = 500


def join_paragraphs(*parts: str) -> str:
    """Join the parts that are not empty as paragraphs."""
    return "\n\n".join(part for part in parts if part)


def format_bullets(sentences: Sequence[str]) -> str:
    """Format sentences as a bullet list."""
    more = [f"- {len(sentences) - MAX_LISTED_ROWS:,} more"] if len(sentences) > MAX_LISTED_ROWS else []
    return "\n".join(
        [*(f"- {escape(sentence, MAX_SENTENCE_LENGTH)}" for sentence in sentences[:MAX_LISTED_ROWS]), *more]
    )


def format_table(table: pd.DataFrame) -> str:
    """Format a table as Markdown, with numbers right-aligned and with thousands separators."""
    is_numeric = {column: pd.api.types.is_numeric_dtype(values) for column, values in table.items()}
    cells = {
        column: [_format_number(value, str(column)) if is_numeric[column] else escape(value) for value in values]
        for column, values in table.items()
    }
    align = ["right" if numeric else "left" for numeric in is_numeric.values()]
    # Without disable_numparse, a class called 007 would become 7.
    return pd.DataFrame(cells).to_markdown(index=False, disable_numparse=True, colalign=align)


def _format_number(value: float, column: str) -> str:
    return f"{value:.1%}" if column == "fraction" else f"{value:,}"


def format_count(number: int, singular: str, plural: str = "") -> str:
    """Format a number with its noun; the plural ends with s unless it is given."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def quote(label: str) -> str:
    """Format a label as part of a sentence."""
    return f"'{escape(label)}'"


def escape(value: object, max_length: int = MAX_NAME_LENGTH) -> str:
    """Format any value as one line of text in which nothing is interpreted as Markdown, HTML or a formula."""
    # Underscores inside a word need no escape.
    special = r"[&<>|`*\[\]~$\\#]|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(special, lambda found: f"&#{ord(found[0])};", shorten(value, max_length))


def shorten(value: object, max_length: int) -> str:
    r"""Format a value as one line, with unprintable characters escaped (\n) and the middle of long texts left out."""
    # Zero-width characters inside words of some scripts, and inside emoji.
    joiners = "\u200c\u200d"
    text = "".join(
        letter if letter.isprintable() or letter in joiners else letter.encode("unicode_escape").decode()
        for letter in str(value)
    )
    max_length = max_length * len(text) // max(1, measure_width(text))
    return text if len(text) <= max_length else f"{text[: max_length // 2]}…{text[len(text) - (max_length - 1) // 2 :]}"


def measure_width(text: str) -> int:
    """Return the width of a text in columns of a terminal."""
    return len(text) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
