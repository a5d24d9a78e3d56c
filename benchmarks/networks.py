"""The networks in conf/model/ at their own sizes: `python benchmarks/networks.py [NAME ...]`.

Prints the table in docs/models.md: parameters and MACs for 10 classes of RGB images, and on this machine the processor
time to predict one image in float32, and to train on one, with the precision that `trainer: auto` chooses and in the
batches of the recipe, for large networks in smaller ones; both with one thread. Unlike wall time it hardly depends on
other load.
"""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning.callbacks import Callback

from convoy import models
from convoy.core import config
from convoy.data.packed.arrays import Images
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models.base import predict
from convoy.training.datamodule import ImageDataModule
from convoy.training.hardware import TrainerConfig, count_macs, resolve_trainer
from convoy.training.trainer import make_module, make_trainer

ROOT = Path(__file__).parents[1]
STEP_MACS = 40e9  # work in a step, at least 8 images
WARM_UP = 3  # steps, in which oneDNN chooses its kernels
MAX_STEPS, MIN_STEPS = 40, 6
CALLS = 8  # the first two are not measured
CLASSES = [str(label) for label in range(10)]


def main() -> None:
    names = sys.argv[1:] or sorted(file.stem for file in (ROOT / "conf/model").glob("*.yaml"))
    params = config.parse(config.compose_text(ROOT, [f"model=[{','.join(names)}]"]))
    trainer = params["trainer"] | {"accelerator": "cpu", "threads": 1}
    torch.set_num_threads(1)
    print("| network | parameters | MACs | size | ms to predict an image | ms to train on an image |")
    print("|---|---|---|---|---|---|")
    for name, settings in params["model"].items():
        settings["recipe"] |= {"class_balance": "none"}
        size = settings["size"]
        info = DatasetInfo("images", CLASSES, size, 3, [0.4] * 3, [0.2] * 3)
        classifier = models.build(name, settings, info)
        macs = count_macs(classifier)
        training_macs = 3 * macs
        batch_size = max(8, min(classifier.recipe.batch_size, int(STEP_MACS / training_macs)))
        classifier.recipe = dataclasses.replace(classifier.recipe, batch_size=batch_size)
        steps = max(MIN_STEPS, min(MAX_STEPS, int(10 * STEP_MACS / training_macs / batch_size)))
        hardware = resolve_trainer(config.validate(TrainerConfig, trainer, "trainer"), classifier)
        pixels = np.random.default_rng(0).integers(0, 256, (batch_size * steps, size, size, 3), np.uint8)
        images = Images(pixels, np.arange(len(pixels)) % len(CLASSES))
        data = ImageDataModule(images, Images(pixels[:1], images.labels[:1]), classifier.recipe, 1)
        clock = Clock()
        fitted = make_trainer(
            classifier, hardware, max_epochs=1, callbacks=[clock], limit_val_batches=0, enable_checkpointing=False
        )
        fitted.fit(make_module(classifier, data, hardware), data)
        measured = clock.times[WARM_UP - 1 :]
        training = 1e3 * (measured[-1] - measured[0]) / (len(measured) - 1) / batch_size
        times = []
        for _ in range(CALLS):
            start = time.process_time()
            predict(classifier, pixels[:1], 1)
            times.append(1e3 * (time.process_time() - start))
        predicting = float(np.median(times[2:]))
        count = sum(parameter.numel() for parameter in classifier.parameters())
        print(
            f"| {name} | {count / 1e6:.2f}M | {macs / 1e6:,.0f}M | {size} | {predicting:.1f} | "
            f"{training:.{2 if training < 10 else 0}f} |",
            flush=True,
        )


class Clock(Callback):
    """The time at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.process_time())


if __name__ == "__main__":
    main()
