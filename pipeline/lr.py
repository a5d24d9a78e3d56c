"""lr: a first guess of an architecture's learning rate on the prepared images; no stage, and nothing is changed."""

import argparse
import sys
from pathlib import Path

import torch

from convoy import models, report
from convoy.batches import Images
from convoy.config import ConvoyError, Seed
from convoy.datamodule import ImageData
from convoy.finder import suggest, try_rates
from convoy.hardware import Trainer, choose
from convoy.task import Task
from pipeline.stage import Stage


def lr(stage: Stage) -> None:
    """Print the guess, and draw how the loss went with the learning rate."""
    seed = stage.typed(Seed, "seed")
    prepared = stage.input("preprocess")
    torch.manual_seed(seed)
    classifier = models.build(stage.item, stage.section(f"model.{stage.item}"), Task.load(prepared / "task.json"))
    data = ImageData(Images.load(prepared, "train"), Images.load(prepared, "val"), classifier.recipe, seed)
    table = try_rates(classifier, data, choose(stage.typed(Trainer, "trainer"), classifier))

    guess = suggest(table)
    picture = stage.root / "artifacts" / "lr" / f"{stage.item}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    report.draw_rates(table, guess, stage.item, picture)
    lowest = float(table["lr"].to_numpy()[table["loss"].argmin()])
    print(
        f"{stage.item}: the loss falls fastest at a learning rate of {guess:.2g}, and is lowest at {lowest:.2g}. "
        f"A first guess for model.{stage.item}.recipe.lr lies between."
    )
    print(f"See {picture.relative_to(stage.root)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m pipeline.lr", description=lr.__doc__)
    parser.add_argument("architecture")
    try:
        lr(Stage(Path.cwd(), "train", parser.parse_args().architecture))
    except ConvoyError as error:
        sys.exit(f"convoy: lr: {error}")
