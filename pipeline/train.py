"""The train stage, which trains one architecture on the prepared images and records the run."""

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
from convoy.core.artifact_names import DATA_PROFILE, DATASET_INFO, HISTORY, MANIFEST, RECORD, WEIGHTS
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.data.packed.arrays import Images
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.recipe import TrainConfig
from convoy.training import init_weights
from convoy.training.checkpoint import Checkpoint
from convoy.training.datamodule import ImageData
from convoy.training.hardware import TrainerConfig, count_macs, describe_environment, resolve_trainer
from convoy.training.record import DatasetVersion, EpochMetrics, TrainingRecord
from convoy.training.result import COLUMNS
from convoy.training.trainer import fit
from pipeline.stage import Stage, main


def train(stage: Stage) -> None:
    """Train one architecture."""
    params = stage.validate(TrainConfig, "train")
    architecture = stage.foreach_key
    settings = stage.section(f"model.{architecture}")
    prepared = stage.input("preprocess")
    info = DatasetInfo.load(prepared / DATASET_INFO)

    torch.manual_seed(params.seed)
    classifier = models.build(architecture, settings, info)
    start = init_weights.init_weights(
        classifier, architecture, settings, lambda init, folder: fetch_weights(stage, init, folder), stage.scratch
    )
    hardware = resolve_trainer(stage.validate(TrainerConfig, "trainer"), classifier)
    # Without a rank from torchrun or Slurm, the process on each machine would take itself for rank 0.
    if hardware.nodes > 1 and not {"RANK", "SLURM_PROCID"} & os.environ.keys():
        raise ConvoyError(f"trainer.nodes={hardware.nodes}: start it on each machine by torchrun (docs/training.md)")
    machine = describe_environment(hardware)
    data = ImageData(Images.load(prepared, "train"), Images.load(prepared, "val"), classifier.recipe, params.seed)
    identity = stage.fingerprint(machine, dataclasses.asdict(start))
    checkpoint = Checkpoint(
        stage.project_root / "artifacts/.cache/checkpoints" / stage.name / identity[:12] / "last.pt"
    )
    data_facts = json.loads((prepared / DATA_PROFILE).read_text())
    record = TrainingRecord(
        architecture=architecture,
        settings=settings,
        train=params,
        trainer=hardware,
        dataset_info=info,
        data=DatasetVersion(**data_facts, digest=sha256(prepared / MANIFEST)[:12]),
        fingerprint=identity,
        initial_weights=start,
        parameters=sum(parameter.numel() for parameter in classifier.parameters()),
        macs=count_macs(classifier),
        environment=machine,
    )
    live = Live(stage, record)
    try:
        trained = fit(classifier, data, params, hardware, checkpoint, live.on_epoch_end)
    except Exception:
        live.end("FAILED")
        raise

    pd.DataFrame(trained.history, columns=COLUMNS).to_csv(stage.scratch / HISTORY, index=False)
    best = EpochMetrics(**trained.best) if trained.best else None  # type: ignore[arg-type]
    results = {"best": best, "stopped": trained.stopped, "failure": trained.failure}
    record.model_copy(update=results).save(stage.scratch / RECORD)
    if trained.failure is None:
        # `safetensors.torch.save_file` hides an OSError and creates a file that other users can't read.
        (stage.scratch / WEIGHTS).write_bytes(safetensors.torch.save(trained.weights))
    else:
        print(trained.failure.describe(architecture), file=sys.stderr, flush=True)
    stage.on_published += [checkpoint.remove, lambda: live.end("FAILED" if trained.failure else "FINISHED")]


class Live:
    """Sender of a training's progress to `pipeline.live`, a separate process that shows it as a run in MLflow.

    The training never waits for that process or for MLflow: a message that can't be written at once is dropped. The
    process ends when the training process has ended; if no final status was sent, it marks the run as killed. Nothing
    is sent if the environment variable CONVOY_LIVE is 0, or from processes of a rank other than 0.

    Args:
        stage: The running train stage.
        record: The training record, which is the first message.
    """

    def __init__(self, stage: Stage, record: TrainingRecord) -> None:
        self.pipe: int | None = None
        if stage.rank or os.environ.get("CONVOY_LIVE") == "0":
            return
        command = [sys.executable, "-m", "pipeline.live", stage.foreach_key]
        reader, self.pipe = os.pipe()
        os.set_blocking(self.pipe, False)
        try:
            # A separate session lets the process outlive a training that is killed with its process group.
            subprocess.Popen(command, cwd=stage.root, stdin=reader, stdout=subprocess.DEVNULL, start_new_session=True)
        except OSError as error:
            print(f"the run can't be shown in MLflow while it trains: {error}", file=sys.stderr, flush=True)
        finally:
            os.close(reader)
        # The names of a thousand classes would fill the pipe, so the classes are left out.
        sent = record.model_copy(update={"dataset_info": dataclasses.replace(record.dataset_info, classes=[])})
        self._send({"record": sent.model_dump(mode="json"), "process": os.getpid()})

    def on_epoch_end(self, row: Mapping[str, float]) -> None:
        """Report the end of an epoch.

        Args:
            row: The row of the epoch in the history.
        """
        self._send({"row": row})

    def end(self, status: str) -> None:
        """Report the end of the training.

        Args:
            status: The status of the run in MLflow, "FINISHED" or "FAILED".
        """
        self._send({"status": status})
        if self.pipe is not None:
            os.close(self.pipe)
            self.pipe = None

    def _send(self, message: Mapping[str, Any]) -> None:
        if self.pipe is None:
            return
        line = json.dumps({**message, "moment": int(time.time() * 1000)}) + "\n"
        # The pipe may be full or no longer read.
        with contextlib.suppress(OSError):
            os.write(self.pipe, line.encode())


def fetch_weights(stage: Stage, init: str, folder: Path) -> str:
    """Fetch the initial weights from MLflow into a folder, in a separate process.

    Args:
        stage: The running train stage.
        init: "champion" or the id of a run.
        folder: The folder to write record.json and weights.safetensors into.

    Returns:
        A description of the model that the weights belong to.

    Raises:
        ConvoyError: If the weights can't be fetched.
    """
    command = [sys.executable, "-m", "pipeline.fetch_weights", stage.foreach_key, init, str(folder)]
    fetched = subprocess.run(command, cwd=stage.root, capture_output=True, text=True)
    if fetched.returncode:
        raise ConvoyError(fetched.stderr.strip().removeprefix("convoy: fetch_weights: "))
    return fetched.stdout.strip()


if __name__ == "__main__":
    main("train", train, "architecture")
