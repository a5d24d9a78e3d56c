"""One way to prepare a folder of labelled images: `python benchmarks/preparing.py <way> <folder> <size> [<memory>]`.

Prints the number of images, and the seconds that passed and those of processors, without the imports. A process of
its own for each run, so that no way finds anything warm that another one left. `data.py` and `growth.py` run it.
"""

import functools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

OURS = "convoy"


def torchvision(folder: Path, size: int, workers: int) -> int:
    """What is usually written: every image through a DataLoader, into one array."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    change = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()])
    return _load(ImageFolder(str(folder), change), np.float32, size, workers)


def torchvision_v2(folder: Path, size: int, workers: int) -> int:
    """The same on tensors of uint8, as torchvision advises now."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    change = v2.Compose([v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    return _load(ImageFolder(str(folder), change), np.uint8, size, workers)


def _load(images: "torch.utils.data.Dataset", dtype: type, size: int, workers: int) -> int:  # type: ignore[name-defined]  # noqa: F821
    from torch.utils.data import DataLoader

    pixels = np.empty((len(images), 3, size, size), dtype)
    start = 0
    batch_size = min(256, len(images) // 16)  # enough of them for two workers
    for batch, _ in DataLoader(images, batch_size, num_workers=workers):
        pixels[start : start + len(batch)] = batch.numpy()
        start += len(batch)
    return start


def simplejpeg_loop(folder: Path, size: int, workers: int) -> int:
    """The least that prepares JPEG files: decoded at a fraction of their size where they are large, then resized."""
    import simplejpeg
    from PIL import Image, ImageOps

    files = sorted(folder.glob("*/*.jpg"))
    pixels = np.empty((len(files), size, size, 3), np.uint8)
    for number, file in enumerate(files):
        decoded = simplejpeg.decode_jpeg(file.read_bytes(), min_height=size, min_width=size)
        if decoded.shape[:2] != (size, size):
            decoded = np.asarray(ImageOps.fit(Image.fromarray(decoded), (size, size), Image.Resampling.BILINEAR))
        pixels[number] = decoded
    return len(files)


def convoy(folder: Path, size: int, workers: int, remembered: Path | None = None) -> int:
    """All of fetch and preprocess but the cards: judged, hashed, packed, near duplicates found, split, resized."""
    from convoy.data.cache import CacheDir
    from convoy.data.data_lock import DataLock
    from convoy.data.ingest import FetchConfig, ingest
    from convoy.data.preprocessing import PreprocessConfig, prepare
    from convoy.data.sources.base import DatasetConfig
    from convoy.data.sources.folder import read_folder

    dataset = DatasetConfig(
        name="benchmark", longest_side=256 if size <= 192 else 512, group=None
    )  # as conf/dataset/ says
    params = PreprocessConfig(size=size, channels=3, test_fraction=0.2, val_fraction=0.2, near_duplicate_threshold=0.98)
    with tempfile.TemporaryDirectory() as name:
        source = read_folder(folder)
        home = remembered or Path(name)
        made = {}
        for stage in ("fetch", "preprocess"):
            made[stage] = home / f"{stage}.new"
            made[stage].mkdir(parents=True)
        decoded = CacheDir(home / "decoded" / "benchmark" / "here", home / "fetch")
        resized = CacheDir(home / "resized", home / "preprocess")
        limits = FetchConfig(max_invalid_fraction=0.0)
        lock = DataLock(classes=[], versions=[])
        packed = ingest(source, dataset, limits, lock, made["fetch"], decoded).packed
        prepare(packed, params, 1, made["preprocess"], resized)
        for stage, folder in made.items():  # as a stage publishes them
            shutil.rmtree(home / stage, ignore_errors=True)
            folder.rename(home / stage)
        return source.count


WAYS: dict[str, tuple[Callable[[Path, int, int], int], int]] = {
    "torchvision v1, 0 workers": (torchvision, 0),
    "torchvision v1, 2 workers": (torchvision, 2),
    "torchvision v2, 0 workers": (torchvision_v2, 0),
    "torchvision v2, 2 workers": (torchvision_v2, 2),
    "simplejpeg loop": (simplejpeg_loop, 0),
    OURS: (convoy, 0),
}


def processor_seconds() -> float:
    """Of this process and of all that it started, those that ended among them."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(each.user + each.system + each.children_user + each.children_system for each in times)


def main(way: str, folder: str, size: str, remembered: str = "") -> None:
    prepare, workers = WAYS[way]
    if remembered:
        prepare = functools.partial(prepare, remembered=Path(remembered))
    if way == OURS:  # imports are not measured
        import convoy.data.ingest
        import convoy.data.preprocessing  # noqa: F401
        from convoy.data.decode_pool import start_fork_server

        # It starts when the fork server has done its imports.
        first = start_fork_server().Process(target=int)
        first.start()
        first.join()
    else:
        import simplejpeg  # noqa: F401
        import torch
        import torchvision.transforms.v2  # noqa: F401

        torch.set_num_threads(1)
    cpu, wall = processor_seconds(), time.perf_counter()
    images = prepare(Path(folder), int(size), workers)
    passed = time.perf_counter() - wall
    print(json.dumps({"images": images, "wall": passed, "cpu": processor_seconds() - cpu}))


if __name__ == "__main__":
    main(*sys.argv[1:])
