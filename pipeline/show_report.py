"""The report with the verdict of the gate, opened in a browser."""

import os
import sys
import webbrowser
from pathlib import Path

from convoy.core.errors import ConvoyError

PAGE = Path("artifacts/report/index.html")
# The verdict depends on the champion in MLflow, so the page with it is not an output of a stage.
PAGE_WITH_VERDICT = Path("artifacts/report.html")


def show_report(root: Path) -> None:
    """Write the report with the verdict and the commit, and open it where there is a display.

    Args:
        root: The project folder.

    Raises:
        ConvoyError: If there is no report yet.
    """
    from convoy.reporting import page
    from convoy.tracking.provenance import git_commit

    if not (root / PAGE).is_file():
        raise ConvoyError("there is no report yet: run `convoy run`")
    verdict = root / "artifacts/verdict.md"
    text = verdict.read_text(encoding="utf-8") if verdict.is_file() else ""
    commit = git_commit(root)
    facts = [f"Shown in a clone at commit {commit}."] if commit else []
    html = page.fill_verdict((root / PAGE).read_text(encoding="utf-8"), text, facts)
    (root / PAGE_WITH_VERDICT).write_text(html, encoding="utf-8", newline="\n")
    print(PAGE_WITH_VERDICT)
    if has_display():
        webbrowser.open((root / PAGE_WITH_VERDICT).resolve().as_uri())


def has_display() -> bool:
    """Return whether a browser can open a window here."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
