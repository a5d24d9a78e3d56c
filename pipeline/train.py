"""The train stage, which trains one architecture on the prepared images and records the run."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import psutil
import safetensors.torch
import torch

from convoy import models
from convoy.cluster import uses_cluster
from convoy.cluster.config import ClusterConfig
from convoy.core.artifact_names import DATA_PROFILE, DATASET_INFO, HISTORY, MANIFEST, RECORD, WEIGHTS
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.data.packed.arrays import Images
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models.base import Classifier
from convoy.recipe import TrainConfig
from convoy.training import init_weights
from convoy.training.checkpoint import remove_checkpoint
from convoy.training.datamodule import ImageDataModule
from convoy.training.determinism import list_nondeterministic, resolve_determinism
from convoy.training.hardware import TrainerConfig, count_macs, describe_environment, resolve_trainer
from convoy.training.history import COLUMNS
from convoy.training.record import DatasetVersion, EpochMetrics, ResolvedTrainer, TrainingRecord
from convoy.training.trainer import fit
from pipeline.live import LiveRun
from pipeline.stage import Stage, main

# Ray is an extra.
if TYPE_CHECKING:
    from convoy.cluster.training import Cluster


def train(stage: Stage) -> None:
    """Train one architecture."""
    params = stage.validate(TrainConfig, "train")
    architecture = stage.foreach_key
    settings = stage.section(f"model.{architecture}")
    prepared, resized = stage.input("preprocess"), stage.images()
    info = DatasetInfo.load(resized / DATASET_INFO)

    torch.manual_seed(params.seed)
    classifier = models.build(architecture, settings, info)
    images = Images.load(resized, "train")
    classifier.init_from_images(images.pixels)
    start = init_weights.init_weights(
        classifier, architecture, settings, lambda init, folder: fetch_weights(stage, init, folder), stage.scratch
    )
    is_live = os.environ.get("CONVOY_LIVE") != "0"
    with open_cluster(stage) as cluster:
        hardware, machine = cluster.describe_worker(classifier) if cluster else describe_machine(stage, classifier)
        if hardware.deterministic == "warn":
            operations = ", ".join(list_nondeterministic(classifier))
            print(f"{architecture}: no determinism of {operations} on a GPU: repeated training runs differ slightly")
        if not cluster:
            warn_if_busy(hardware)
        data = ImageDataModule(images, Images.load(resized, "val"), classifier.recipe, params.seed)
        identity = stage.fingerprint(machine, dataclasses.asdict(start))
        record = describe_training(
            architecture, settings, params, hardware, classifier, prepared, start, identity, machine
        )
        checkpoint = checkpoint_folder(stage) / identity[:12] / "last.ckpt"
        live = LiveRun(stage.root, record)
        try:
            if cluster:
                name = f"{architecture}-{identity[:12]}"
                show = live.show if is_live else None
                trained = cluster.fit(name, classifier, data, params, hardware, machine, show)
            else:
                trained = fit(classifier, data, params, hardware, checkpoint, [live] if is_live else [])
        except BaseException as error:
            live.end("FAILED" if isinstance(error, Exception) else "KILLED")
            raise

    columns = None if trained.history else COLUMNS
    pd.DataFrame(trained.history, columns=columns).to_csv(stage.scratch / HISTORY, index=False)
    best = EpochMetrics(**trained.best) if trained.best else None  # type: ignore[arg-type]
    results = {"best": best, "stopped": trained.stopped, "failure": trained.failure}
    record.model_copy(update=results).save(stage.scratch / RECORD)
    if trained.failure is None:
        # `safetensors.torch.save_file` hides an OSError and creates a file that other users can't read.
        (stage.scratch / WEIGHTS).write_bytes(safetensors.torch.save(trained.weights))
    else:
        print(trained.failure.describe(architecture), file=sys.stderr, flush=True)
    stage.on_published += [
        cluster.remove_checkpoints if cluster else lambda: remove_checkpoint(checkpoint),
        lambda: live.end("FAILED" if trained.failure else "FINISHED"),
    ]


@contextlib.contextmanager
def open_cluster(stage: Stage, **changes: Any) -> "Iterator[Cluster | None]":
    """Connect to the cluster that the settings choose, if they choose one.

    Args:
        stage: The train stage.
        **changes: Settings of the cluster that replace those of params.yaml.
    """
    if not uses_cluster(stage.section("trainer")):
        yield None
        return
    from convoy.cluster import training

    config = dataclasses.replace(stage.validate(ClusterConfig, "trainer"), **changes)
    with training.open_cluster(config, checkpoint_folder(stage)) as cluster:
        yield cluster


def warn_if_busy(hardware: ResolvedTrainer) -> None:
    """Print a note if other programs use the processors that several threads of a training run on.

    The threads of oneDNN wait for each other without sleeping, so that those that share a processor with another
    program delay all others, in bfloat16 more than tenfold.
    """
    threads = hardware.threads * hardware.devices
    if hardware.accelerator == "cpu" and hardware.threads > 1:
        processors = psutil.cpu_count()
        busy = round(processors * psutil.cpu_percent(interval=0.5) / 100)
        if busy + threads > processors:
            print(
                f"other programs use {busy} of {processors} processors, which slows down training with {threads} "
                f"threads, often more than tenfold: end them, or set trainer.threads={max(1, processors - busy)}",
                flush=True,
            )


def checkpoint_folder(stage: Stage) -> Path:
    """Return the folder for the checkpoints of a stage, in the project."""
    return stage.project_root / "artifacts/.cache/checkpoints" / stage.name


def describe_machine(stage: Stage, classifier: Classifier) -> tuple[ResolvedTrainer, dict[str, str | int]]:
    """Return the hardware for a training run in this process, and its environment.

    Raises:
        ConvoyError: If several machines are to train, and this process was not started as one of them.
    """
    hardware = resolve_trainer(stage.validate(TrainerConfig, "trainer"), classifier)
    hardware = resolve_determinism(hardware, classifier)
    # Without a rank from torchrun or Slurm, the process on each machine would take itself for rank 0.
    if hardware.num_nodes > 1 and not {"RANK", "SLURM_PROCID"} & os.environ.keys():
        raise ConvoyError(
            f"trainer.num_nodes={hardware.num_nodes}: start it on each machine by torchrun (docs/training.md)"
        )
    return hardware, describe_environment(hardware)


def describe_training(
    architecture: str,
    settings: Mapping[str, Any],
    params: TrainConfig,
    hardware: ResolvedTrainer,
    classifier: Classifier,
    prepared: Path,
    start: init_weights.InitialWeights,
    fingerprint: str,
    environment: Mapping[str, str | int],
) -> TrainingRecord:
    """Return the record of a training run that is about to begin, without results.

    Args:
        architecture: Name of the architecture.
        settings: Its settings, as in params.yaml.
        params: Settings of the train stage.
        hardware: Hardware, precision and threads.
        classifier: The classifier, with its initial weights.
        prepared: Output folder of the preprocess stage.
        start: Where the initial weights are from.
        fingerprint: Fingerprint of the training.
        environment: Versions and hardware, from `describe_environment`.
    """
    data_facts = json.loads((prepared / DATA_PROFILE).read_text())
    return TrainingRecord(
        architecture=architecture,
        settings=dict(settings),
        train=params,
        trainer=hardware,
        dataset_info=classifier.info,
        data=DatasetVersion(**data_facts, digest=sha256(prepared / MANIFEST)[:12]),
        fingerprint=fingerprint,
        initial_weights=start,
        parameters=sum(parameter.numel() for parameter in classifier.parameters()),
        macs=count_macs(classifier),
        environment=dict(environment),
    )


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
