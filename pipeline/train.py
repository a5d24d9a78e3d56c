"""train: one architecture on the prepared images, with the whole record of the run."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors.torch
import torch

from convoy import models
from convoy.config import Seed
from convoy.data.arrays import Images
from convoy.data.dataset_info import DatasetInfo
from convoy.errors import ConvoyError
from convoy.hashing import sha256
from convoy.recipe import TrainConfig
from convoy.training import init_weights
from convoy.training.checkpoint import Checkpoint
from convoy.training.datamodule import ImageData
from convoy.training.hardware import TrainerConfig, choose, count_macs, environment
from convoy.training.module import COLUMNS, fit
from pipeline.stage import MARK, Stage, main


def train(stage: Stage) -> None:
    """Train one architecture."""
    params = stage.typed(TrainConfig, "train")
    seed = stage.typed(Seed, "seed")
    architecture = stage.item
    settings = stage.section(f"model.{architecture}")
    prepared = stage.input("preprocess")
    task = DatasetInfo.load(prepared / "task.json")

    torch.manual_seed(seed)
    classifier = models.build(architecture, settings, task)
    start = init_weights.init_weights(
        classifier, architecture, settings, lambda init, folder: bring(stage, init, folder), stage.scratch
    )
    choice = choose(stage.typed(TrainerConfig, "trainer"), classifier)
    if choice.nodes > 1 and not {"RANK", "SLURM_PROCID"} & os.environ.keys():  # each would take itself for the first
        raise ConvoyError(f"trainer.nodes={choice.nodes}: start it on each machine by torchrun, as README.md shows")
    machine = environment(choice)
    data = ImageData(Images.load(prepared, "train"), Images.load(prepared, "val"), classifier.recipe, seed)
    identity = stage.identity(machine, start)
    checkpoint = Checkpoint(stage.home / "artifacts/.checkpoints" / stage.name / identity[:12] / "last.pt")
    record: dict[str, Any] = {
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
        "multiply_adds": count_macs(classifier),
        "environment": machine,
    }
    live = Live(stage, record)
    try:
        trained = fit(classifier, data, params, choice, checkpoint, live.tell)
    except Exception:
        live.end("FAILED")
        raise

    pd.DataFrame(trained.history, columns=COLUMNS).to_csv(stage.scratch / "history.csv", index=False)
    record |= {
        "best": trained.best,
        "stopped": trained.stopped,
        "failure": dataclasses.asdict(trained.failure) if trained.failure else None,
    }
    (stage.scratch / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    if trained.failure is None:
        # its save_file hides an OSError, and lets nobody else read the file
        (stage.scratch / "weights.safetensors").write_bytes(safetensors.torch.save(trained.weights))
    else:
        print(trained.failure.words(architecture), file=sys.stderr, flush=True)
    stage.afterwards += [checkpoint.remove, lambda: live.end("FAILED" if trained.failure else "FINISHED")]


class Live:
    """The training as a run in MLflow while it lasts: what `pipeline.live`, a process of its own, is told of it.

    The training never waits for that process, nor for MLflow: what it does not take is dropped. It ends when the
    training's process is gone; a training that is gone without a word of its end was killed. Nobody is told where
    CONVOY_LIVE is 0 in the environment, nor by processes that train together with the first.
    """

    def __init__(self, stage: Stage, record: Mapping[str, Any]) -> None:
        self.pipe: int | None = None
        if stage.rank or os.environ.get("CONVOY_LIVE") == "0":
            return
        command = [sys.executable, "-m", "pipeline.live", stage.item]
        reader, self.pipe = os.pipe()
        os.set_blocking(self.pipe, False)
        try:
            # in a session of its own, so that it outlives a training that is killed with its whole group
            subprocess.Popen(command, cwd=stage.root, stdin=reader, stdout=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            print(f"the run can't be shown in MLflow while it trains: {error}", file=sys.stderr, flush=True)
        finally:
            os.close(reader)
        # of a thousand classes the names would fill the pipe
        self._say({"record": dict(record) | {"task": dict(record["task"]) | {"classes": []}}, "process": os.getpid()})

    def tell(self, row: Mapping[str, float]) -> None:
        """An epoch has ended with this row of the history."""
        self._say({"row": row})

    def end(self, status: str) -> None:
        """The training has come to its end, FINISHED or FAILED."""
        self._say({"status": status})
        if self.pipe is not None:
            os.close(self.pipe)
            self.pipe = None

    def _say(self, message: Mapping[str, Any]) -> None:
        if self.pipe is None:
            return
        line = json.dumps({**message, "moment": int(time.time() * 1000)}) + "\n"
        with contextlib.suppress(OSError):  # full, or nobody reads it any more
            os.write(self.pipe, line.encode())


def bring(stage: Stage, init: str, folder: Path) -> str:
    """Have the champion's or a run's weights brought into `folder`; returns whose they are."""
    command = [sys.executable, "-m", "pipeline.weights", stage.item, init, str(folder)]
    asked = subprocess.run(command, cwd=stage.root, capture_output=True, text=True)
    if asked.returncode:
        raise ConvoyError(asked.stderr.strip().removeprefix("convoy: weights: "))
    return asked.stdout.strip()


if __name__ == "__main__":
    main("train", train, "architecture")
