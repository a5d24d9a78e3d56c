"""What a training step costs, beside a hand-written loop and what is usually written: `python benchmarks/training.py`.

CONVOY_REAL_DATA names the folder with mnist/ (the four gzipped idx files) and cifar10-jpeg.zip. All ways take turns
with the same network, batch, number of threads, and random crops and flips:

* limit: a loop over tensors in memory, written by hand for this one purpose, in the precision that convoy chooses,
* convoy: `convoy.training.trainer.fit` with validation and checkpoints, as the train stage calls it,
* Lightning, minimal: the fewest lines of Lightning's own style over the batches of the limit, in its precision,
* Lightning: automatic optimization, torchvision's transforms image by image in a DataLoader, torchmetrics; in that
  precision, and in float32, as most write it.

Counted are the steps of an epoch, all of them, from asking for the first batch until the last step is done; what `fit`
does before and after them is a table of its own. With `--compile`, the limit and one more way of convoy's go through
torch.compile. Where there is a GPU, it trains.
"""

import argparse
import dataclasses
import functools
import gzip
import logging
import os
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as pipeline/__init__.py does, before torch is imported

import numpy as np
import pandas as pd
import psutil
import pytorch_lightning as lightning
import torch
import torchmetrics
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from convoy import models
from convoy.core import config
from convoy.core.config import validate
from convoy.core.malloc import keep_memory
from convoy.data.packed.arrays import Images
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models.base import Classifier
from convoy.recipe import RecipeConfig, TrainConfig
from convoy.training.datamodule import ImageDataModule
from convoy.training.hardware import TrainerConfig, resolve_trainer
from convoy.training.optimizers import make_optimizer
from convoy.training.record import ResolvedTrainer
from convoy.training.trainer import fit

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARM = 1 if DEVICE.type == "cuda" else 0  # epochs before the one that is counted: kernels are chosen and compiled there
VALIDATED = 64  # images at the end of an epoch, not counted
EVERY = 3  # rounds, of which the ways through a DataLoader take part in one
SHIFT = 2  # pixels
LIMIT, OURS, MINIMAL = "limit", "convoy", "Lightning, minimal"


@dataclasses.dataclass(frozen=True)
class Contest:
    """A network to train, and on what."""

    name: str
    build: Callable[[DatasetInfo, dict[str, Any]], Classifier]
    data: str
    batch_size: int
    steps: int  # counted, in each round
    rounds: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--compile", action="store_true", help="take minutes to compile the limit, and convoy once more"
    )
    parser.add_argument("--only", nargs="+", help="of the networks, those whose names begin so")
    parser.add_argument("--threads", type=int, help="1 where others use the machine; else as trainer.threads=auto")
    options = parser.parse_args()
    quiet()
    keep_memory()  # for all ways alike
    large = {"resnet": {"widths": [64, 128, 256, 512], "stem_kernel": 3, "stem_stride": 1, "stem_pool": False}}
    large["vgg"] = {"stacks": [[1, 64], [1, 128], [2, 256], [2, 512]]}
    lenet, resnet, vgg = (functools.partial(build, name, large.get(name, {})) for name in ("lenet", "resnet", "vgg"))
    if DEVICE.type == "cuda":
        contests = [
            Contest("LeNet", lenet, "mnist", 256, 200, 9),
            Contest("ResNet-18", resnet, "cifar10", 512, 40, 6),
            Contest("VGG", vgg, "cifar10", 512, 40, 6),
            Contest("784-128-10", Full, "mnist", 256, 200, 9),
        ]
    else:
        contests = [
            Contest("LeNet", lenet, "mnist", 256, 32, 24),
            Contest("ResNet-18", resnet, "cifar10", 64, 4, 15),
            Contest("VGG", vgg, "cifar10", 64, 6, 15),
            Contest("784-128-10", Full, "mnist", 256, 96, 18),
        ]
    chosen = [each for each in contests if not options.only or each.name.startswith(tuple(options.only))]
    measured = {contest.name: measure(contest, options.threads or "auto", options.compile) for contest in chosen}
    show({name: steps for name, (steps, _) in measured.items()})
    show_rest({name: rest for name, (_, rest) in measured.items()})


def quiet() -> None:
    """Of Lightning's advice none: few workers, few steps, no logger are as they are on purpose."""
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


# Networks and data


def build(name: str, changes: dict[str, Any], info: DatasetInfo, recipe: dict[str, Any]) -> Classifier:
    """One of convoy's, as params.yaml describes it but for `changes` and `recipe`."""
    values = config.load(ROOT / "params.yaml")["model"][name]
    return models.build(name, values | changes | {"recipe": values["recipe"] | recipe}, info)


class Full(Classifier):
    """A small fully connected network, of which a step is soon done."""

    def __init__(self, info: DatasetInfo, recipe: dict[str, Any]) -> None:
        values = config.load(ROOT / "params.yaml")["model"]["lenet"]["recipe"]
        super().__init__(info, validate(RecipeConfig, values | recipe, "recipe"))
        self.hidden = nn.Linear(info.channels * info.size**2, 128)
        self.classifier = nn.Linear(128, len(info.classes))

    def logits(self, x: Tensor) -> Tensor:
        return self.classifier(self.hidden(x.flatten(1)).relu())


def read(data: str, count: int) -> Images:
    """`count` training images, in the order they are in; from the first again where there are not as many."""
    pixels, labels = {"mnist": mnist, "cifar10": cifar10}[data](Path(os.environ["CONVOY_REAL_DATA"]), count)
    rows = np.arange(count) % len(labels)
    return Images(np.ascontiguousarray(pixels[rows]), labels[rows].astype(np.int64))


def mnist(folder: Path, _: int) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = (
        np.frombuffer(gzip.decompress((folder / f"mnist/train-{name}-ubyte.gz").read_bytes())[header:], np.uint8)
        for name, header in (("images-idx3", 16), ("labels-idx1", 8))
    )
    return np.pad(pixels.reshape(-1, 28, 28, 1), ((0, 0), (2, 2), (2, 2), (0, 0))), labels


def cifar10(folder: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    with zipfile.ZipFile(folder / "cifar10-jpeg.zip") as packed:
        names = [name for name in packed.namelist() if name.startswith("train/") and name.endswith(".jpg")]
        names = sorted(names, key=lambda name: name.rpartition("/")[::-1])[:count]  # all classes from the beginning
        pixels = np.stack([np.asarray(Image.open(BytesIO(packed.read(name)))) for name in names])
    classes = sorted({name.split("/")[1] for name in names})
    return pixels, np.array([classes.index(name.split("/")[1]) for name in names])


# The limit


class Store:
    """Images in the device's memory, their edges repeated and, where wanted, all of them flipped a second time.

    So a batch of crops and flips is one copy of whole rows.
    """

    def __init__(self, images: Images, flip: bool) -> None:
        edges = ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))
        wide = np.pad(images.pixels, edges, mode="edge")
        self.count, self.height, self.width, self.channels = images.pixels.shape
        stored = torch.from_numpy(np.concatenate([wide, wide[:, :, ::-1]]) if flip else wide).to(DEVICE)
        self.pieces = stored.flatten().unfold(0, self.width * self.channels, self.channels)
        self.rows = torch.arange(self.height, device=DEVICE) * wide.shape[2]
        self.wide = wide.shape[1:3]
        self.labels = torch.from_numpy(images.labels).to(DEVICE)
        self.flip = flip

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        down, right, flipped = torch.rand(3, len(index), device=DEVICE)
        image = index + self.count * (flipped < 0.5) if self.flip else index
        down, right = ((draw * (2 * SHIFT + 1)).long() for draw in (down, right))
        first = (image * self.wide[0] + down) * self.wide[1] + right
        pixels = self.pieces.index_select(0, (first[:, None] + self.rows).flatten())
        return pixels.view(-1, self.height, self.width, self.channels), self.labels.index_select(0, index)


def limit(classifier: Classifier, images: Images, hardware: ResolvedTrainer, compiled: bool) -> list["Mark"]:
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    torch.set_num_threads(hardware.threads)
    classifier.to(DEVICE, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = make_optimizer(classifier)
    size = classifier.recipe.batch_size
    store = Store(images, classifier.recipe.augment.hflip)
    width = images.pixels.shape[2]
    scale = (1 / (255 * classifier.std)).flatten().repeat(width)
    offset = (classifier.mean / classifier.std).flatten().repeat(width)

    def forward(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = pixels.flatten(2).float().mul_(scale).sub_(offset)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=hardware.precision == "bf16-mixed"):
            logits = classifier.logits(rows.unflatten(2, (width, -1)).permute(0, 3, 1, 2)).float()
        return functional.cross_entropy(logits, labels), (logits.detach().argmax(dim=1) == labels).sum()

    if compiled:
        forward = torch.compile(forward)
    sums = torch.zeros(2, device=DEVICE)
    marks = []
    for _ in range(WARM + 1):
        marks.append(Mark.now())
        for index in torch.randperm(store.count, device=DEVICE).split(size):
            loss, correct = forward(*store.take(index))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            sums += torch.stack([loss.detach() * size, correct])
    marks.append(Mark.now())
    assert torch.isfinite(sums).all()
    return marks[-2:]


# Ours


class Marked:
    """A loader that notes when it is first asked."""

    def __init__(self, loader: Any, marks: list["Mark"]) -> None:
        self.loader = loader
        self.marks = marks

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.marks.append(Mark.now())
        yield from self.loader


class MarkedData(ImageDataModule):
    """ImageDataModule that notes when each training and each validation begins, and is otherwise as it was."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.marks: list[Mark] = []

    def train_dataloader(self) -> Any:
        return Marked(super().train_dataloader(), self.marks)

    def val_dataloader(self) -> Any:
        return Marked(super().val_dataloader(), self.marks)


def ours(
    classifier: Classifier, images: Images, hardware: ResolvedTrainer, rest: list[dict[str, float]]
) -> list["Mark"]:
    """The two marks; how long `fit` took before and after them goes to `rest`."""
    data = MarkedData(images, Images(images.pixels[:VALIDATED], images.labels[:VALIDATED]), classifier.recipe, 0)
    params = TrainConfig(seed=0, max_epochs=WARM + 1, patience=0, checkpoint_minutes=5.0)
    with tempfile.TemporaryDirectory() as name, silence():
        called = Mark.now()
        trained = fit(classifier, data, params, hardware, Path(name, "last.ckpt"))
        ended = Mark.now()
    assert trained.failure is None
    first, last = data.marks[-2:]
    rest.append({"before": data.marks[0].wall - called.wall, "after": ended.wall - last.wall})
    return [first, last]


class silence:
    """No lines on standard output: there is one for each epoch."""

    def __enter__(self) -> None:
        self.shown, sys.stdout = sys.stdout, Path(os.devnull).open("w")

    def __exit__(self, *_: object) -> None:
        sys.stdout.close()
        sys.stdout = self.shown


# Lightning's own style, over the same batches


class StoreLoader:
    """The shuffled batches of the limit."""

    def __init__(self, store: Store, batch_size: int) -> None:
        self.store = store
        self.batch_size = batch_size

    def __len__(self) -> int:
        return self.store.count // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(self.store.count, device=DEVICE).split(self.batch_size):
            yield self.store.take(index)


class Minimal(lightning.LightningModule):
    def __init__(self, classifier: Classifier, marks: list["Mark"]) -> None:
        super().__init__()
        self.classifier = classifier
        self.marks = marks

    def on_train_epoch_start(self) -> None:
        self.marks.append(Mark.now())

    def on_train_epoch_end(self) -> None:
        self.marks.append(Mark.now())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        pixels, labels = batch
        return functional.cross_entropy(self.classifier(pixels), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.classifier)


def minimal(classifier: Classifier, images: Images, hardware: ResolvedTrainer) -> list["Mark"]:
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(hardware.threads)
    classifier.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    loader = StoreLoader(Store(images, classifier.recipe.augment.hflip), classifier.recipe.batch_size)
    marks: list[Mark] = []
    trainer = lightning.Trainer(
        accelerator=hardware.accelerator,
        devices=1,
        precision=hardware.precision,  # type: ignore[arg-type]
        max_epochs=WARM + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Minimal(classifier, marks), loader)
    return marks[-2:]


# What is usually written


class Pictures(Dataset):
    """As torchvision's own MNIST and CIFAR10: an array in memory, of which each image becomes a PIL image."""

    def __init__(self, images: Images, change: Callable[[Image.Image], Tensor]) -> None:
        self.pixels = images.pixels.squeeze(3) if images.pixels.shape[3] == 1 else images.pixels
        self.labels = images.labels.tolist()
        self.change = change

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.change(Image.fromarray(self.pixels[row])), self.labels[row]


class Usual(Minimal):
    def __init__(self, classifier: Classifier, marks: list["Mark"]) -> None:
        super().__init__(classifier, marks)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=len(classifier.info.classes))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self.classifier.logits(images)
        loss = functional.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        self.log("train/accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        recipe = self.classifier.recipe
        return torch.optim.SGD(
            self.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
        )


def usual(
    classifier: Classifier, images: Images, hardware: ResolvedTrainer, precision: str, workers: int
) -> list["Mark"]:
    """Without progress bar, checkpoints and a logger's file, which would only take more time."""
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(hardware.threads)
    info, recipe = classifier.info, classifier.recipe
    flip = [transforms.RandomHorizontalFlip()] if recipe.augment.hflip else []
    change = transforms.Compose([
        transforms.RandomCrop(info.size, padding=SHIFT), *flip,
        transforms.ToTensor(), transforms.Normalize(info.mean, info.std),
    ])  # fmt: skip
    loader = DataLoader(
        Pictures(images, change), recipe.batch_size, shuffle=True, drop_last=True, num_workers=workers,
        persistent_workers=workers > 0, pin_memory=DEVICE.type == "cuda",
    )  # fmt: skip
    marks: list[Mark] = []
    trainer = lightning.Trainer(
        accelerator="gpu" if DEVICE.type == "cuda" else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=WARM + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Usual(classifier, marks), loader)
    return marks[-2:]


# Measuring


@dataclasses.dataclass(frozen=True)
class Mark:
    """A moment: seconds that passed, and seconds of processors, of this process and of the workers it keeps."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Mark":
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        workers = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
        return cls(time.perf_counter(), time.process_time() + sum(each.user + each.system for each in workers))


def measure(contest: Contest, threads: Any, compiled: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Columns way, round, images, wall and cpu (seconds) of the counted steps; and before and after them, of `fit`."""
    images = read(contest.data, contest.batch_size * contest.steps)
    flip = contest.data != "mnist"
    augment = {
        "max_shift": SHIFT,
        "hflip": flip,
        "auto_augment": "none",
        "random_erasing": 0.0,
        "mixup": 0.0,
        "cutmix": 0.0,
    }
    mean, std = (getattr(images.pixels[:1000] / 255, of)((0, 1, 2)).tolist() for of in ("mean", "std"))
    size, channels = images.pixels.shape[2:]
    info = DatasetInfo(contest.data, [str(number) for number in range(10)], size, channels, mean, std)
    # a rate at which nothing diverges: it costs the same
    recipe = {"batch_size": contest.batch_size, "augment": augment, "lr": 0.001, "optimizer": "sgd"}

    def fresh() -> Classifier:
        torch.manual_seed(0)
        return contest.build(info, recipe)

    asked = validate(TrainerConfig, config.load(ROOT / "params.yaml")["trainer"] | {"threads": threads}, "trainer")
    hardware = resolve_trainer(asked, fresh())
    rest: list[dict[str, float]] = []
    ways: dict[str, Callable[[Classifier, Images], list[Mark]]] = {
        LIMIT: functools.partial(limit, hardware=hardware, compiled=compiled),
        OURS: functools.partial(ours, hardware=hardware, rest=rest),
        MINIMAL: functools.partial(minimal, hardware=hardware),
    }
    if compiled:
        ways[f"{OURS}, compiled"] = functools.partial(
            ours, hardware=dataclasses.replace(hardware, compile=True), rest=[]
        )
    for workers in (0, 2):
        way = functools.partial(usual, hardware=hardware, workers=workers)
        ways[f"Lightning, {workers} workers"] = functools.partial(way, precision=hardware.precision)
        if hardware.precision != "32-true":
            ways[f"Lightning, {workers} workers, float32"] = functools.partial(way, precision="32-true")
    few = Images(images.pixels[: contest.batch_size], images.labels[: contest.batch_size])
    for way in ways.values():  # what is loaded late, is loaded
        way(fresh(), few)
    rest.clear()

    rows = []
    for number in range(contest.rounds):
        order = list(ways.items())
        for name, way in order if number % 2 else reversed(order):
            if "workers" in name and number % EVERY:
                continue
            begin, end = way(fresh(), images)
            rows.append((name, number, len(images), end.wall - begin.wall, end.cpu - begin.cpu))
    table = pd.DataFrame(rows, columns=["way", "round", "images", "wall", "cpu"])
    words = f"batch {contest.batch_size}, {hardware.precision}, threads: {hardware.threads}"
    table.attrs = {"ways": list(ways), "words": words}
    return table, pd.DataFrame(rest)


def show(measured: dict[str, pd.DataFrame]) -> None:
    """Medians over the rounds, and in brackets the lowest and the highest; a ratio is of two figures from one round."""
    print("| | images / s | us of processor / image | convoy: images / s | convoy: processor |")
    print("|---|---|---|---|---|")
    for name, table in measured.items():
        print(f"| **{name}**, {table.attrs['words']} | | | | |")
        indexed = table.set_index(["round", "way"])
        rate = (indexed.images / indexed.wall).unstack()
        cost = (indexed.cpu / indexed.images * 1e6).unstack()
        for way in table.attrs["ways"]:
            faster, cheaper = rate[OURS] / rate[way], cost[way] / cost[OURS]
            figures = [spread(rate[way], 0), spread(cost[way], 0), spread(faster, 2, "x"), spread(cheaper, 2, "x")]
            print(f"| {way} | " + " | ".join(["1" if way == OURS and n > 1 else figures[n] for n in range(4)]) + " |")


def show_rest(measured: dict[str, pd.DataFrame]) -> None:
    print(f"\n| | ms before the first step | ms after the last, with {VALIDATED} images validated |\n|---|---|---|")
    for name, table in measured.items():
        print(f"| {name} | {spread(table.before * 1e3, 0)} | {spread(table.after * 1e3, 0)} |")


def spread(values: pd.Series, digits: int, unit: str = "") -> str:
    values = values.dropna()
    return f"{values.median():,.{digits}f}{unit} ({values.min():,.{digits}f} to {values.max():,.{digits}f})"


if __name__ == "__main__":
    main()
