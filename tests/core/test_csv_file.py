"""CSV files: no field is a formula, and all else is as pandas writes it."""

import csv
from pathlib import Path

import pandas as pd
import pytest

from convoy.core.csv_file import write_csv


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t"])
@pytest.mark.parametrize("kind", ["str", "object", "category"])
def test_text_that_a_spreadsheet_would_run_is_escaped(start: str, kind: str, tmp_path: Path) -> None:
    texts = [f"{start}HYPERLINK(1)", "a-b", "", "1=1"]
    table = pd.DataFrame({"path": pd.Series(texts, dtype=kind), "loss": [-1.5, 0.0, 1.0, 2.0], "count": [-1, 0, 1, 2]})
    write_csv(table, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["path", f"'{texts[0]}", *texts[1:]]
    assert [row[1:] for row in rows[1:]] == [["-1.5", "-1"], ["0.0", "0"], ["1.0", "1"], ["2.0", "2"]]


def test_table_without_formulas_is_written_as_by_pandas(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {"path": ["a,b", 'c"d', "é\n"], "share": [0.1, float("nan"), 1 / 3], "is_new": [True, False, True]}
    )
    write_csv(table, tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == table.to_csv(index=False)
    write_csv(table.head(0), tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == "path,share,is_new\n"
