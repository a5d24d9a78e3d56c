"""The leaderboard of the last run, on the terminal and in MLflow."""

import json
from pathlib import Path

from convoy.core import config
from convoy.core.artifact_names import LEADERBOARD, LINKS
from convoy.core.errors import ConvoyError


def print_leaderboard(root: Path, *, as_json: bool = False) -> None:
    """Print the leaderboard that the register stage wrote.

    Args:
        root: The project folder.
        as_json: Whether to print all columns as a JSON list of objects instead of a table.

    Raises:
        ConvoyError: If there are no results yet.
    """
    # pandas takes half a second to import.
    import pandas as pd

    from convoy.reporting import report

    try:
        table = pd.read_csv(_leaderboard_file(root), dtype={"epoch": "Int64"})
    except FileNotFoundError:
        raise ConvoyError("there are no results yet: run `convoy run`") from None
    if as_json:
        print(table.to_json(orient="records", indent=2, double_precision=15))
    else:
        report.print_table(table.reindex(columns=report.TERMINAL_COLUMNS), "Leaderboard, best in validation first")


def print_summary(root: Path) -> None:
    """Print the leaderboard and the links to the MLflow views that the register stage saved."""
    print_leaderboard(root)
    leaderboard, curves = json.loads((root / "artifacts/.scratch" / LINKS).read_text())
    print(f"Next: `convoy ui` shows the runs side by side:\n  leaderboard  {leaderboard}\n  curves       {curves}")


def save_views(root: Path) -> tuple[str, str]:
    """Save the views of the leaderboard and of the curves in MLflow, and return their links."""
    # These modules import MLflow, which takes two seconds.
    from convoy.tracking import ui_views
    from convoy.tracking.store import open_store

    with open_store(root, config.load(root / "params.yaml")["register"]["name"]) as store:
        return ui_views.save_views(store)


def leaderboard_time(root: Path) -> int | None:
    """Return the modification time of the leaderboard in nanoseconds, or None if there is no leaderboard."""
    file = _leaderboard_file(root)
    return file.stat().st_mtime_ns if file.exists() else None


def _leaderboard_file(root: Path) -> Path:
    return root / "artifacts/register" / LEADERBOARD
