"""What preparing data and feeding a classifier cost, beside what is usually written: `python benchmarks/data.py`.

CONVOY_REAL_DATA names the folder with cifar10-jpeg.zip (train/<class>/<number>.jpg). Preparing goes from image files
to arrays of one size; feeding from there to shuffled batches (N, C, H, W) float32, moved, flipped and normalised. All
ways take turns, so that what else the machine does falls on each of them, and a ratio is of two figures from the same
round.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from growth import draw
from PIL import Image
from preparing import OURS, WAYS
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from convoy.data.packed.arrays import Images
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models.base import Classifier
from convoy.recipe import AugmentConfig, RecipeConfig
from convoy.training.augmentation import augment
from convoy.training.datamodule import ImageDataModule

IMAGES = 50_000  # the training images of CIFAR-10
FED = 25_000  # of them, the same number of each class
PHOTOGRAPHS = 240  # of 4000x3000 pixels
WEB = 2_000  # drawn pictures of 500x375, as photographs on the web are large
BATCH = 256
SHIFT = 4  # pixels
ROUNDS = 3
RECIPE = RecipeConfig(
    batch_size=BATCH, accumulate_grad_batches=1, optimizer="sgd", schedule="cosine", lr=0.1, backbone_lr_scale=1.0,
    momentum=0.9, weight_decay=0.0, warmup_fraction=0.0, label_smoothing=0.0, grad_clip_norm=0.0, ema_decay=0.0,
    class_balance="none",
    augment=AugmentConfig(max_shift=SHIFT, hflip=True, auto_augment="none", random_erasing=0.0, mixup=0.0, cutmix=0.0),
)  # fmt: skip
CROP = {"size": 32, "padding": SHIFT, "padding_mode": "edge"}

MEMORY = "tensors in memory"
Epoch = Callable[[], Iterator[Tensor]]  # batches (N, C, H, W) float32, normalised


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(Path(os.environ["CONVOY_REAL_DATA"]) / "cifar10-jpeg.zip", folder / "train")
        photograph(folder / "photographs")
        show(f"Preparing: {IMAGES} images of 32x32, {ROUNDS} rounds", preparing(folder / "train", 32))
        show(f"Preparing: {PHOTOGRAPHS} photographs, {ROUNDS} rounds", preparing(folder / "photographs", 224))
        draw(folder / "web", range(WEB), 500, 375)
        show(f"Preparing: {WEB} images of 500x375, {ROUNDS} rounds", preparing(folder / "web", 224))
        show(f"Feeding: {FED} images, batches of {BATCH}, {ROUNDS} rounds", feeding(folder))


def unpack(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        names = sorted(name for name in packed.namelist() if name.startswith("train/") and name.endswith(".jpg"))
        for name in names:
            file = folder / name.removeprefix("train/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(packed.read(name))


def photograph(folder: Path) -> None:
    """As a telephone takes them: parts of scikit-learn's two sample photographs, enlarged, in two classes."""
    for label, picture in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / label).mkdir(parents=True)
        for number in range(PHOTOGRAPHS // 2):
            top, left = 5 * (number % 12), 15 * (number // 12)
            part = Image.fromarray(picture[top : top + 360, left : left + 480])
            part.resize((4000, 3000), Image.Resampling.BICUBIC).save(folder / label / f"{number}.jpg", quality=90)


# Preparing


def preparing(folder: Path, size: int) -> pd.DataFrame:
    """Columns way, round, images, wall and cpu (seconds). Each run is a process of its own."""
    rows = []
    for number in range(ROUNDS):
        for way in WAYS:
            command = [sys.executable, str(Path(__file__).with_name("preparing.py")), way, str(folder), str(size)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"way": way, "round": number, **json.loads(done.stdout.splitlines()[-1])})
    return pd.DataFrame(rows)


# Feeding


def feeding(folder: Path) -> pd.DataFrame:
    """Columns way, round, images, wall and cpu (seconds, with those of child processes)."""
    info = decode(folder)
    changes = {
        "torchvision v1": transforms.Compose([
            transforms.RandomCrop(**CROP), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize(info.mean, info.std),
        ]),
        "torchvision v2": v2.Compose([
            v2.PILToTensor(), v2.RandomCrop(**CROP), v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(info.mean, info.std),
        ]),
    }  # fmt: skip
    ways = {
        f"{name}, {workers} workers": image_folder(folder, change, workers)
        for name, change in changes.items()
        for workers in (0, 2)
    }
    ways[MEMORY] = in_memory(folder, info)
    ways[OURS] = ours(folder, info)
    check_alike(folder, info)
    return measure(ways)


def decode(folder: Path) -> DatasetInfo:
    """The images as one array beside their files, which is what the preprocess stage leaves behind."""
    for file in sorted((folder / "train").glob("*/*.jpg"))[:: IMAGES // FED]:
        (folder / "fed" / file.parent.name).mkdir(parents=True, exist_ok=True)
        file.rename(folder / "fed" / file.parent.name / file.name)
    files = ImageFolder(str(folder / "fed"))
    pixels = np.stack([np.asarray(image) for image, _ in files])  # (N, 32, 32, 3)
    np.save(folder / "train_pixels.npy", pixels)
    np.save(folder / "train_labels.npy", np.array(files.targets))
    mean, std = pixels.mean((0, 1, 2)) / 255, pixels.std((0, 1, 2)) / 255
    return DatasetInfo("cifar10", files.classes, 32, 3, mean.tolist(), std.tolist())


def image_folder(folder: Path, change: Callable[[Any], Tensor], workers: int) -> Epoch:
    files = ImageFolder(str(folder / "fed"), change)
    loader = DataLoader(files, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)
    return lambda: (pixels for pixels, _ in loader)


def in_memory(folder: Path, info: DatasetInfo) -> Epoch:
    """All images resident as uint8: a slice is copied from each, and the batch is flipped and normalised at once.

    Indexing the pixels of all windows of a batch takes 1.4 times as long, and one copy for each offset 1.8 times.
    """
    pixels = np.load(folder / "train_pixels.npy")  # (N, 32, 32, 3)
    wide = np.pad(pixels, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    mean, std = torch.tensor(info.mean) * 255, torch.tensor(info.std) * 255
    size = info.size

    def epoch() -> Iterator[Tensor]:
        for index in torch.randperm(len(wide)).split(BATCH)[: len(wide) // BATCH]:
            moved = np.empty((BATCH, size, size, 3), np.uint8)
            corners = torch.randint(2 * SHIFT + 1, (BATCH, 2)).tolist()
            for number, (row, (down, right)) in enumerate(zip(index.tolist(), corners, strict=True)):
                moved[number] = wide[row, down : down + size, right : right + size]
            batch = torch.from_numpy(moved)
            batch = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, batch.flip(2), batch)
            yield ((batch - mean) / std).permute(0, 3, 1, 2)

    return epoch


def ours(folder: Path, info: DatasetInfo) -> Epoch:
    images = Images.load(folder, "train")
    data = ImageDataModule(images, images, RECIPE, seed=0)
    data.setup()
    classifier = Still(info)

    def epoch() -> Iterator[Tensor]:
        for pixels, _ in data.train_dataloader():
            yield classifier.normalise(augment(pixels, RECIPE.augment))

    return epoch


class Still(Classifier):
    """A classifier of which only the normalisation is used."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info, RECIPE)

    def logits(self, x: Tensor) -> Tensor:
        return x


def check_alike(folder: Path, info: DatasetInfo) -> None:
    """Raises AssertionError where the two sides, with nothing drawn at random, feed different numbers."""
    plain = transforms.Compose([transforms.ToTensor(), transforms.Normalize(info.mean, info.std)])
    files = ImageFolder(str(folder / "fed"), plain)
    images = Images.load(folder, "train")
    rows = list(range(0, len(files), 97))
    pixels = torch.from_numpy(images.pixels[rows])
    torch.testing.assert_close(Still(info).normalise(pixels), torch.stack([files[row][0] for row in rows]))
    assert images.labels[rows].tolist() == [files.targets[row] for row in rows]


# Measuring


def measure(ways: dict[str, Epoch]) -> pd.DataFrame:
    for epoch in ways.values():  # workers start, files come into memory
        sum(1 for _ in epoch())
    rows = []
    for number in range(ROUNDS):
        for way, epoch in ways.items():
            # what is quick is repeated, or it would be measured in a moment that is not like the others
            for _ in range(8 if way in (MEMORY, OURS) else 1):
                wall, cpu = time.perf_counter(), processor_seconds()
                images = sum(len(batch) for batch in epoch())
                rows.append((way, number, images, time.perf_counter() - wall, processor_seconds() - cpu))
    table = pd.DataFrame(rows, columns=["way", "round", "images", "wall", "cpu"])
    return table.groupby(["way", "round"], sort=False).sum().reset_index()


def processor_seconds() -> float:
    """Of this process and of the workers that it keeps."""
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def show(title: str, measured: pd.DataFrame) -> None:
    """Medians over the rounds, and the lowest and the highest."""
    measured = measured.set_index(["round", "way"])
    rate = (measured.images / measured.wall).unstack()
    cost = (measured.cpu / measured.images * 1e6).unstack()
    table = Table("", "images / s", "us of processor / image", f"{OURS}: images / s", f"{OURS}: processor", title=title)
    for way in measured.index.unique("way"):
        faster, cheaper = rate[OURS] / rate[way], cost[way] / cost[OURS]
        table.add_row(way, spread(rate[way], 0), spread(cost[way], 1), spread(faster, 1, "x"), spread(cheaper, 1, "x"))
    Console(width=140).print(table)


def spread(values: pd.Series, digits: int, unit: str = "") -> str:
    return f"{values.median():,.{digits}f}{unit} ({values.min():,.{digits}f} to {values.max():,.{digits}f})"


if __name__ == "__main__":
    main()
