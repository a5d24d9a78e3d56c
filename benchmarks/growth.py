"""What preparing costs as the data grow: `python benchmarks/growth.py`.

JPEG files that are drawn here, 10,000 to 200,000 small ones and 1,000 to 4,000 as large as photographs on the web, go
through all of fetch and preprocess but the cards; then once more with a hundredth of new ones. Each run is a process of
its own, and its memory is that of all its processes together.
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
from PIL import Image
from preparing import OURS
from rich.console import Console
from rich.table import Table

# width and height in pixels, the size that they are brought to, how many there are
KINDS = [((32, 32), 32, (10_000, 50_000, 200_000)), ((500, 375), 224, (1_000, 4_000))]
ROUGH = 8  # grey levels, of the noise in each pixel


def main() -> None:
    rows = []
    for (width, height), size, counts in KINDS:
        with tempfile.TemporaryDirectory() as name:
            folder, drawn = Path(name), 0
            for count in counts:
                draw(folder / "data", range(drawn, drawn := count + count // 100), width, height)
                for number in range(count, drawn):  # the newest come only in the second run
                    (folder / "data" / str(number % 10) / f"{number}.jpg").rename(folder / f"{number}.jpg")
                rows.append({"pixels": f"{width}x{height}", "run": "first", **run(folder, count, size)})
                for number in range(count, drawn):
                    (folder / f"{number}.jpg").rename(folder / "data" / str(number % 10) / f"{number}.jpg")
                rows.append({"pixels": f"{width}x{height}", "run": "1% new", **run(folder, count, size)})
    show(pd.DataFrame(rows))


def draw(folder: Path, numbers: range, width: int, height: int) -> None:
    """Ten classes of pictures: 64 areas of any colour that run into each other, and noise as a camera's."""
    for number in numbers:
        random = np.random.default_rng(number)
        areas = Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)).resize((width, height))
        noise = random.integers(-ROUGH, ROUGH + 1, (height, width, 3), np.int16)
        pixels = np.clip(np.asarray(areas) + noise, 0, 255).astype(np.uint8)
        file = folder / str(number % 10) / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(simplejpeg.encode_jpeg(pixels, quality=85))


def run(folder: Path, count: int, size: int) -> dict[str, float]:
    """Images, seconds and peaks of memory (MB) of one run; of a count the second remembers what the first decoded."""
    script = str(Path(__file__).with_name("preparing.py"))
    command = [
        sys.executable,
        script,
        OURS,
        str(folder / "data"),
        str(size),
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
    table = Table("pixels", "images", "run", "seconds", "images / s", "us of processor", "MB, main process", "MB, all")
    for row in measured.itertuples():
        rate, cost = row.images / row.wall, row.cpu / row.images * 1e6
        table.add_row(
            row.pixels, f"{row.images:,}", row.run, f"{row.wall:.1f}", f"{rate:,.0f}", f"{cost:.0f}", f"{row.main:.0f}",
            f"{row.all:.0f}",
        )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
