"""What preparing costs as the data grow: `python benchmarks/growth.py`.

Small JPEG files that are drawn here, 10,000 to 200,000 of them, go through all of fetch and preprocess but the cards;
then once more with a hundredth of new ones. Each run is a process of its own, and its memory is that of all its
processes together.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import simplejpeg
from preparing import OURS
from rich.console import Console
from rich.table import Table

COUNTS = (10_000, 50_000, 200_000)
SIDE = 32  # pixels


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder, drawn = Path(name), 0
        for count in COUNTS:
            draw(folder / "data", drawn, count)
            draw(folder / "data", count, drawn := count + count // 100)
            for number in range(count, drawn):  # the newest come only in the second run
                (folder / "data" / str(number % 10) / f"{number}.jpg").rename(folder / f"{number}.jpg")
            rows.append({"run": "first", **run(folder, count)})
            for number in range(count, drawn):
                (folder / f"{number}.jpg").rename(folder / "data" / str(number % 10) / f"{number}.jpg")
            rows.append({"run": "1% new", **run(folder, count)})
    show(pd.DataFrame(rows))


def draw(folder: Path, first: int, last: int) -> None:
    """Ten classes of pictures, of 64 areas of any colour each."""
    for number in range(first, last):
        random = np.random.default_rng(number)
        areas = random.integers(0, 256, (8, 8, 3), np.uint8).repeat(SIDE // 8, 0).repeat(SIDE // 8, 1)
        file = folder / str(number % 10) / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(areas), quality=85))


def run(folder: Path, count: int) -> dict[str, float]:
    """Images, seconds and peaks of memory (MB) of one run; of a count the second remembers what the first decoded."""
    script = str(Path(__file__).with_name("preparing.py"))
    command = [
        sys.executable,
        script,
        OURS,
        str(folder / "data"),
        str(SIDE),
        str(folder / f"remembered-{count}" / "here"),
    ]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peaks = {"main": 0.0, "all": 0.0}
    watching = threading.Thread(target=watch, args=(running, peaks))
    watching.start()
    out, _ = running.communicate()
    watching.join()
    return json.loads(out.splitlines()[-1]) | peaks


def watch(running: subprocess.Popen, peaks: dict[str, float]) -> None:
    """Private memory, in MB: pages that processes share, and files that are mapped, count for none of them."""
    this = psutil.Process(running.pid)
    while running.poll() is None:
        try:
            used = [each.memory_full_info().uss / 1e6 for each in (this, *this.children(recursive=True))]
            peaks["main"], peaks["all"] = max(peaks["main"], used[0]), max(peaks["all"], sum(used))
        except psutil.Error:  # it ended meanwhile
            pass
        time.sleep(0.1)


def show(measured: pd.DataFrame) -> None:
    table = Table("images", "run", "seconds", "images / s", "us of processor / image", "MB, main process", "MB, all")
    for row in measured.itertuples():
        rate, cost = row.images / row.wall, row.cpu / row.images * 1e6
        table.add_row(
            f"{row.images:,}", row.run, f"{row.wall:.1f}", f"{rate:,.0f}", f"{cost:.0f}", f"{row.main:.0f}",
            f"{row.all:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
