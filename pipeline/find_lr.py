"""Suggestion of a learning rate for an architecture on the prepared images, without changing any setting."""

import json
from pathlib import Path

from convoy.cluster import uses_cluster
from convoy.core.artifact_names import DATASET_INFO
from convoy.core.errors import ConvoyError, suggest
from pipeline.stage import Stage


def find_lr(root: Path, architecture: str, *, as_json: bool = False) -> None:
    """Print a suggested learning rate for an architecture, and plot the loss over the learning rate.

    Args:
        root: The project folder.
        architecture: The architecture; params.yaml has its settings.
        as_json: Whether to print a JSON object instead of a message.

    Raises:
        ConvoyError: If the architecture is unknown, or there are no prepared images.
    """
    stage = Stage(root, "train", architecture)
    if architecture not in (known := list(stage.params["model"])):
        raise ConvoyError(f"params.yaml has no model.{architecture}; {suggest(architecture, known)}")
    if uses_cluster(stage.section("trainer")):
        raise ConvoyError("convoy find-lr trains on this machine: choose another trainer than ray in conf/config.yaml")
    prepared = stage.images()

    # torch takes seconds to import.
    import torch

    from convoy import models
    from convoy.data.packed.arrays import Images
    from convoy.data.packed.dataset_info import DatasetInfo
    from convoy.recipe import TrainConfig
    from convoy.reporting import report
    from convoy.search.lr_finder import suggest_learning_rate, sweep_learning_rates
    from convoy.training.datamodule import ImageDataModule
    from convoy.training.determinism import resolve_determinism
    from convoy.training.hardware import TrainerConfig, resolve_trainer

    seed = stage.validate(TrainConfig, "train").seed
    torch.manual_seed(seed)
    settings, info = stage.section(f"model.{architecture}"), DatasetInfo.load(prepared / DATASET_INFO)
    classifier = models.build(architecture, settings, info)
    images = Images.load(prepared, "train")
    classifier.init_from_images(images.pixels)
    data = ImageDataModule(images, Images.load(prepared, "val"), classifier.recipe, seed)
    hardware = resolve_trainer(stage.validate(TrainerConfig, "trainer"), classifier)
    table = sweep_learning_rates(classifier, data, resolve_determinism(hardware, classifier))

    steepest = suggest_learning_rate(table)
    plot = stage.root / "artifacts" / "lr" / f"{architecture}.png"
    plot.parent.mkdir(parents=True, exist_ok=True)
    report.draw_lr_curve(table, steepest, architecture, plot)
    lowest = float(table["lr"].to_numpy()[table["loss"].argmin()])
    if as_json:
        print(json.dumps({"architecture": architecture, "steepest": steepest, "lowest": lowest, "plot": str(plot)}))
        return
    print(
        f"{architecture}: the loss falls fastest at a learning rate of {steepest:.2g}, and is lowest at {lowest:.2g}. "
        f"Set model.{architecture}.recipe.lr to a value between them."
    )
    print(f"See {plot.relative_to(stage.root)}")
