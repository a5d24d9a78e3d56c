"""Command that suggests a learning rate for an architecture on the prepared images, without changing any setting."""

import argparse
from pathlib import Path

import torch

from convoy import models
from convoy.core.artifact_names import DATASET_INFO
from convoy.core.config import Seed
from convoy.data.packed.arrays import Images
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.reporting import report
from convoy.search.lr_finder import suggest_learning_rate, sweep_learning_rates
from convoy.training.datamodule import ImageData
from convoy.training.hardware import TrainerConfig, resolve_trainer
from pipeline.errors import exit_on_error
from pipeline.stage import Stage


def find_lr(stage: Stage) -> None:
    """Print a suggested learning rate for ARCHITECTURE, and plot the loss over the learning rate."""
    seed = stage.validate(Seed, "seed")
    prepared = stage.input("preprocess")
    torch.manual_seed(seed)
    name = stage.foreach_key
    classifier = models.build(name, stage.section(f"model.{name}"), DatasetInfo.load(prepared / DATASET_INFO))
    data = ImageData(Images.load(prepared, "train"), Images.load(prepared, "val"), classifier.recipe, seed)
    table = sweep_learning_rates(
        classifier, data, resolve_trainer(stage.validate(TrainerConfig, "trainer"), classifier)
    )

    steepest = suggest_learning_rate(table)
    plot = stage.root / "artifacts" / "lr" / f"{name}.png"
    plot.parent.mkdir(parents=True, exist_ok=True)
    report.draw_lr_curve(table, steepest, name, plot)
    lowest = float(table["lr"].to_numpy()[table["loss"].argmin()])
    print(
        f"{name}: the loss falls fastest at a learning rate of {steepest:.2g}, and is lowest at {lowest:.2g}. "
        f"Set model.{name}.recipe.lr to a value between them."
    )
    print(f"See {plot.relative_to(stage.root)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m pipeline.find_lr", description=find_lr.__doc__)
    parser.add_argument("architecture")
    with exit_on_error("find_lr"):
        find_lr(Stage(Path.cwd(), "train", parser.parse_args().architecture))
