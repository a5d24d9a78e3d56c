"""What weights from other classes are worth where images are few: `python benchmarks/transfer.py [convnext]`.

CONVOY_REAL_DATA names the folder with cifar10-jpeg.zip (train/<class>/<number>.jpg, test/...). ResNet as in
params.yaml, or a small ConvNeXt of timm, learns five classes of CIFAR-10 from all of their images, then the other five
from 50 images a class. Of those 50 ten choose the epoch, as validation does in the pipeline; the test images are seen
once, at the end. Each seed draws a donor, the images and the first weights anew. All ways take as many steps.
"""

import contextlib
import io
import os
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from simplejpeg import decode_jpeg

from convoy import models
from convoy.core import config
from convoy.core.artifact_names import RECORD, WEIGHTS
from convoy.data.packed.arrays import Images
from convoy.data.packed.dataset_info import ChannelMoments, DatasetInfo
from convoy.models.base import Classifier, predict
from convoy.recipe import TrainConfig
from convoy.training import init_weights
from convoy.training.datamodule import ImageDataModule
from convoy.training.hardware import TrainerConfig, resolve_trainer
from convoy.training.record import DatasetVersion, InitialWeights, TrainingRecord
from convoy.training.trainer import fit

LEFT = ["airplane", "automobile", "bird", "cat", "deer"]  # learned first, from 5,000 images each
NEW = ["dog", "frog", "horse", "ship", "truck"]
FEW = 50  # images of each new class
CHOOSING = 10  # of them
EPOCHS_LEFT = 3 if sys.argv[1:] == ["convnext"] else 6
EPOCHS_NEW = 50  # of 250 images less those that choose
SEEDS = (1, 2, 3)
PARAMS = config.load(Path(__file__).parents[1] / "params.yaml")
RESNET = PARAMS["model"]["resnet"]
# Two pixels a patch instead of four, for small images.
CONVNEXT = {
    **{"module": "builders", "size": 32, "builder": "timm/convnext_tiny", "weights": "DEFAULT", "init": "scratch"},
    "arguments": {"depths": [1, 1, 2, 1], "dims": [16, 32, 64, 128], "patch_size": 2},
    "recipe": RESNET["recipe"] | {"optimizer": "adamw", "lr": 0.002, "weight_decay": 0.05},
}
NETWORK = CONVNEXT if sys.argv[1:] == ["convnext"] else RESNET
NAME = "convnext" if NETWORK is CONVNEXT else "resnet"
BATCH = 32  # images; with lr 0.1 the best for scratch among batches of 32 and 64 and rates of 0.1, 0.03 and 0.01
AUGMENT = {"max_shift": 4, "hflip": True}  # as photographs want it
TRAINER = config.validate(TrainerConfig, PARAMS["trainer"] | {"accelerator": "cpu", "threads": 1}, "trainer")
WAYS: dict[str, dict[str, Any]] = {  # the recipe of each, but for what params.yaml says
    "scratch": {},
    "transfer, all layers alike": {"backbone_lr_scale": 1.0},
    "transfer, backbone_lr_scale 0.1": {"backbone_lr_scale": 0.1},
    "transfer, body frozen": {"backbone_lr_scale": 0.0},
}


def main() -> None:
    start = time.perf_counter()
    archive = Path(os.environ["CONVOY_REAL_DATA"]) / "cifar10-jpeg.zip"
    left, new, test = read(archive, "train", LEFT), read(archive, "train", NEW), read(archive, "test", NEW)
    rows = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as name:
            donor = Path(name)
            accuracy = leave(donor, left, seed)
            few = draw(new, FEW, seed)
            for way, recipe in WAYS.items():
                init = "scratch" if way == "scratch" else str(donor / WEIGHTS)
                rows.append({"way": way, "seed": seed, "donor": accuracy, **learn(few, test, init, recipe, seed)})
                print(rows[-1], file=sys.stderr, flush=True)
    show(pd.DataFrame(rows))
    print(f"\n{time.perf_counter() - start:.0f} s")


def read(archive: Path, split: str, classes: list[str]) -> Images:
    pixels, labels = [], []
    with zipfile.ZipFile(archive) as packed:
        for name in sorted(packed.namelist()):
            folder, _, label = name.rpartition("/")[0].partition("/")
            if folder == split and label in classes:
                pixels.append(decode_jpeg(packed.read(name)))
                labels.append(classes.index(label))
    return Images(np.stack(pixels), np.array(labels))


def draw(images: Images, each: int, seed: int) -> Images:
    """`each` images of every class, one class after another."""
    random = np.random.default_rng(seed)
    rows = [random.permutation(np.flatnonzero(images.labels == label))[:each] for label in np.unique(images.labels)]
    return Images(images.pixels[np.concatenate(rows)], images.labels[np.concatenate(rows)])


def held_out(images: Images, share: int) -> tuple[Images, Images]:
    """All but every `share`-th image of each class to train with, those to validate."""
    order = np.argsort(images.labels, kind="stable")
    val = np.arange(len(order)) % share == 0
    train, rest = order[~val], order[val]
    return Images(images.pixels[train], images.labels[train]), Images(images.pixels[rest], images.labels[rest])


def settings(init: str, recipe: dict[str, Any]) -> dict[str, Any]:
    plain = NETWORK["recipe"] | {"augment": NETWORK["recipe"]["augment"] | AUGMENT}
    return NETWORK | {"init": init, "recipe": plain | recipe}


def train(values: dict[str, Any], classes: list[str], images: Images, share: int, epochs: int, seed: int) -> Classifier:
    """As the train stage does it: the weights of the epoch that is best in validation."""
    kept, val = held_out(images, share)
    sums = ChannelMoments(3)
    sums.add(kept.pixels)
    info = DatasetInfo("cifar10", classes, 32, 3, *sums.mean_and_std())
    torch.manual_seed(seed)
    classifier = models.build(NAME, values, info)
    init_weights.init_weights(classifier, NAME, values, lambda *_: "")
    params = TrainConfig(seed=seed, max_epochs=epochs, patience=0, checkpoint_minutes=60.0)
    with contextlib.redirect_stdout(io.StringIO()):
        trained = fit(
            classifier,
            ImageDataModule(kept, val, classifier.recipe, seed),
            params,
            resolve_trainer(TRAINER, classifier),
        )
    classifier.load_state_dict(trained.weights)
    return classifier


def leave(folder: Path, images: Images, seed: int) -> float:
    """The weights and the record of a training run on the first classes, and its accuracy in validation."""
    values = settings("scratch", {})
    classifier = train(values, LEFT, images, 10, EPOCHS_LEFT, seed)
    weights = {name: value.contiguous() for name, value in classifier.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    record = TrainingRecord(
        architecture=NAME,
        settings=values,
        train=TrainConfig(seed=seed, max_epochs=EPOCHS_LEFT, patience=0, checkpoint_minutes=5.0),
        trainer=resolve_trainer(TRAINER, classifier),
        dataset_info=classifier.info,
        data=DatasetVersion(classifier.info.dataset, "", "CIFAR-10", {}, split_seed=seed),
        fingerprint="",
        initial_weights=InitialWeights("scratch"),
        parameters=sum(each.numel() for each in classifier.parameters()),
        macs=0,
        environment={},
    )
    record.save(folder / RECORD)
    return accuracy(classifier, held_out(images, 10)[1])


def learn(few: Images, test: Images, init: str, recipe: dict[str, Any], seed: int) -> dict[str, float]:
    start = time.perf_counter()
    classifier = train(settings(init, recipe | {"batch_size": BATCH}), NEW, few, FEW // CHOOSING, EPOCHS_NEW, seed)
    return {"seconds": time.perf_counter() - start, "accuracy": accuracy(classifier, test)}


def accuracy(classifier: Classifier, images: Images) -> float:
    return float((predict(classifier, images.pixels, 512).argmax(axis=1) == images.labels).mean())


def show(rows: pd.DataFrame) -> None:
    """Medians over the seeds, and the lowest and the highest, as a Markdown table."""
    donors = rows.drop_duplicates("seed")["donor"]
    print(f"donor: {spread(donors)} on images of its own classes that it was not trained with\n")
    print(f"| {FEW} images a class | accuracy on {len(NEW)} x 1,000 test images | seconds |\n|---|---|---|")
    for way in WAYS:
        measured = rows[rows["way"] == way]
        print(f"| {way} | {spread(measured['accuracy'])} | {measured['seconds'].median():.0f} |")


def spread(values: pd.Series) -> str:
    return f"{values.median():.3f} ({values.min():.3f} to {values.max():.3f})"


if __name__ == "__main__":
    main()
