"""Progress: what a training prints on a terminal and into a log."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

TRAINING = """
import sys, time
from convoy.training.progress import Progress
name, epochs = sys.argv[1], 16
progress = Progress(name, 1600 * epochs, epochs, 0)
for epoch in range(1, epochs + 1):
    progress.advance(epoch, 1600, lambda: 0.5)
    time.sleep(0.02)
    progress.end_epoch({"epoch": epoch, "train_loss": 0.0194, "val_loss": 0.2, "val_accuracy": 0.98765})
progress.close()
"""


def train_on_terminal(name: str, columns: int, log: Path) -> list[str]:
    """What a terminal showed on one line, one after the other; standard output goes into `log`."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, columns, 0, 0))
    with log.open("w") as out:
        subprocess.run([sys.executable, "-c", TRAINING, name], stdout=out, stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # nobody writes to it any more
        pass
    os.close(ours)
    return [line.strip() for line in shown.decode().replace("\n", "\r").split("\r") if line.strip()]


@pytest.mark.parametrize("name", ["lenet", "googlenet"])
def test_progress_bar_fits_into_80_columns(name: str, tmp_path: Path) -> None:
    last = train_on_terminal(name, 80, tmp_path / "log")[-1]
    assert last.startswith(f"{name} 16/16: 100% loss=0.0194 val_accuracy=0.9877 00:00 left ")
    assert last.endswith(" images/s")
    assert len(last) <= 80


def test_log_beside_a_terminal_gets_its_line_for_each_epoch(tmp_path: Path) -> None:
    assert train_on_terminal("lenet", 80, tmp_path / "log")
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split("  loss")[0] for line in lines] == [f"lenet  epoch {number}/16" for number in range(1, 17)]


def test_wide_terminal_gets_a_bar_too(tmp_path: Path) -> None:
    last = train_on_terminal("lenet", 120, tmp_path / "log")[-1]
    assert last.startswith("lenet 16/16: 100%|█████")
    assert last.endswith(" images/s")
