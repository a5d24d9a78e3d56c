"""train: one architecture on the prepared images, with the whole record of the run."""

import dataclasses
import json

import pandas as pd
import torch
from safetensors.torch import save_file

from convoy import models
from convoy.config import Whole
from convoy.datamodule import ImageData, Images
from convoy.task import Task
from convoy.training import Train, fit
from pipeline.stage import MARK, Stage, main, sha256


def train(stage: Stage) -> None:
    """Train one architecture."""
    params = stage.typed(Train, "train")
    seed = stage.typed(Whole, "seed")
    architecture = stage.item
    settings = stage.section(f"model.{architecture}")
    prepared = stage.input("preprocess")
    task = Task.load(prepared / "task.json")

    torch.manual_seed(seed)
    classifier = models.build(architecture, settings, task)
    train, val = Images.load(prepared, "train"), Images.load(prepared, "val")
    recipe = classifier.recipe
    data = ImageData(train, val, recipe.batch_size, recipe.augment, seed)
    trained = fit(classifier, data, params)

    save_file(trained.weights, stage.scratch / "weights.safetensors")
    pd.DataFrame(trained.history).to_csv(stage.scratch / "history.csv", index=False)
    record = {
        "architecture": architecture,
        "settings": settings,
        "seed": seed,
        "train": stage.section("train"),
        "task": dataclasses.asdict(task),
        "data": json.loads((prepared / "data.json").read_text()) | {"digest": sha256(prepared / MARK)[:12]},
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
        "best": trained.best,
        "environment": trained.environment,
    }
    (stage.scratch / "record.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main("train", train, "architecture")
