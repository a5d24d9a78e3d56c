"""The report with the verdict of the gate and the measured latencies, opened in a browser."""

import os
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from convoy.core.artifact_names import INTERVALS, LATENCIES, RECORD
from convoy.core.errors import ConvoyError

# It takes half a second to import.
if TYPE_CHECKING:
    import pandas as pd

PAGE = Path("artifacts/report/index.html")
# The verdict depends on the champion in MLflow, and latencies differ in each measurement, so the page with both is no
# output of a stage.
PAGE_WITH_VERDICT = Path("artifacts/report.html")


def show_report(root: Path) -> None:
    """Write the report with the verdict, the latencies and the commit, and open it where there is a display.

    Args:
        root: The project folder.

    Raises:
        ConvoyError: If there is no report yet.
    """
    from convoy.reporting import comparison_section, page
    from convoy.tracking.provenance import git_commit

    if not (root / PAGE).is_file():
        raise ConvoyError("there is no report yet: run `convoy run`")
    verdict = root / "artifacts/verdict.md"
    text = verdict.read_text(encoding="utf-8") if verdict.is_file() else ""
    commit = git_commit(root)
    facts = [f"Shown in a clone at commit {commit}."] if commit else []
    html = page.fill_verdict((root / PAGE).read_text(encoding="utf-8"), text, facts)
    html = page.fill_latencies(html, comparison_section.describe_latencies(load_latencies(root)))
    (root / PAGE_WITH_VERDICT).write_text(html, encoding="utf-8", newline="\n")
    print(PAGE_WITH_VERDICT)
    if has_display():
        webbrowser.open((root / PAGE_WITH_VERDICT).resolve().as_uri())


def load_latencies(root: Path) -> "pd.DataFrame":
    """Load the latencies of the current networks beside their test accuracy.

    Returns:
        A table as for `describe_latencies`, empty if the latencies are missing or of earlier training runs.
    """
    import pandas as pd

    from convoy.training.record import TrainingRecord

    columns = ["model", "test_accuracy", "low", "high", "image_ms_median", "image_ms_p95", "hardware"]
    file = root / "artifacts" / LATENCIES
    rows = []
    for row in pd.read_csv(file).to_dict("records") if file.is_file() else []:
        trained, evaluated = (root / "artifacts" / stage / row["model"] for stage in ("train", "evaluate"))
        if (
            not (evaluated / INTERVALS).is_file()
            or TrainingRecord.load(trained / RECORD).fingerprint != row["training"]
        ):
            continue
        accuracy = pd.read_csv(evaluated / INTERVALS).set_index("metric").loc["accuracy"]
        rows.append({**row, "test_accuracy": accuracy["value"], "low": accuracy["low"], "high": accuracy["high"]})
    return pd.DataFrame(rows, columns=columns)


def has_display() -> bool:
    """Return whether a browser can open a window here."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
