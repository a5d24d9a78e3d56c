"""train: one architecture on the prepared images, with the whole record of the run."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file

from convoy import models, transfer
from convoy.batches import Images
from convoy.checkpoint import Checkpoint
from convoy.config import ConvoyError, Whole
from convoy.datamodule import ImageData
from convoy.hardware import Trainer, choose, environment, multiply_adds
from convoy.task import Task
from convoy.training import COLUMNS, Train, fit
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
    start = transfer.start(classifier, architecture, settings, lambda init, folder: bring(stage, init, folder))
    choice = choose(stage.typed(Trainer, "trainer"), classifier)
    machine = environment(choice)
    data = ImageData(Images.load(prepared, "train"), Images.load(prepared, "val"), classifier.recipe, seed)
    identity = stage.identity(machine, start)
    checkpoint = Checkpoint(stage.home / "artifacts/.checkpoints" / stage.name / identity[:12] / "last.pt")
    trained = fit(classifier, data, params, choice, checkpoint)

    pd.DataFrame(trained.history, columns=COLUMNS).to_csv(stage.scratch / "history.csv", index=False)
    record = {
        "architecture": architecture,
        "settings": settings,
        "seed": seed,
        "train": stage.section("train"),
        "trainer": dataclasses.asdict(choice),
        "task": dataclasses.asdict(task),
        "data": json.loads((prepared / "data.json").read_text()) | {"digest": sha256(prepared / MARK)[:12]},
        "identity": identity,
        "init": start,
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
        "multiply_adds": multiply_adds(classifier),
        "best": trained.best,
        "stopped": trained.stopped,
        "failure": dataclasses.asdict(trained.failure) if trained.failure else None,
        "environment": machine,
    }
    (stage.scratch / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    if trained.failure is None:
        save_file(trained.weights, stage.scratch / "weights.safetensors")
    else:
        print(trained.failure.words(architecture), file=sys.stderr, flush=True)
    stage.afterwards.append(checkpoint.remove)


def bring(stage: Stage, init: str, folder: Path) -> str:
    """Have the champion's or a run's weights brought into `folder`; returns whose they are."""
    command = [sys.executable, "-m", "pipeline.weights", stage.item, init, str(folder)]
    asked = subprocess.run(command, cwd=stage.root, capture_output=True, text=True)
    if asked.returncode:
        raise ConvoyError(asked.stderr.strip().removeprefix("convoy: weights: "))
    return asked.stdout.strip()


if __name__ == "__main__":
    main("train", train, "architecture")
