"""CSV files that people open in a spreadsheet, in which no label and no path is a formula."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# A spreadsheet takes a field that begins with one of these for a formula, which may read other files or the network.
FORMULA_STARTS = ("=", "+", "-", "@", "\t")


def escape_formula(value: object) -> object:
    """Put an apostrophe before a text that a spreadsheet would take for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value


def format_csv(table: "pd.DataFrame") -> str:
    """Return a table as CSV without its index and without formulas."""
    texts = table.select_dtypes(exclude="number").astype(object)
    return table.assign(**{str(name): column.map(escape_formula) for name, column in texts.items()}).to_csv(index=False)


def write_csv(table: "pd.DataFrame", file: Path) -> None:
    """Write a table as CSV without its index and without formulas."""
    file.write_text(format_csv(table), encoding="utf-8", newline="")
