"""All stages in a separate process, for tests that kill it."""

import os
from pathlib import Path

from small_project import run_stages


def run_remaining_stages(root: Path) -> None:
    """Run every stage whose output is not there yet, as DVC would, and the last one in any case."""
    os.chdir(root)
    os.setpgid(0, 0)  # so that what it starts can be killed with it
    for stage in ("fetch", "preprocess", "train", "evaluate"):
        if not list((root / "artifacts" / stage).rglob("manifest.json")):
            run_stages(root, since=stage, until=stage)
    run_stages(root, since="register")
