"""The plan of training runs side by side: their order, and how many of them the machine allows at a time."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.dvc_files import list_changed_stages


@dataclasses.dataclass(frozen=True)
class Job:
    """The training and evaluation of one architecture."""

    name: str
    work: int  # MACs per image
    units: int  # processors, or GPUs, that the training uses; 0 if it runs on a cluster, which divides its own


@dataclasses.dataclass(frozen=True)
class Machine:
    """The processors, or the GPUs, that the training runs of a project share."""

    units: int
    gpus: tuple[str, ...]  # as in CUDA_VISIBLE_DEVICES; empty if the networks are trained on processors


def plan_jobs(params: Mapping[str, Any]) -> tuple[list[Job], Machine]:
    """Return the jobs of all architectures, the longest first, and the machine that they share.

    This imports torch. It needs no images: their number of channels and classes hardly changes the work, and the
    largest possible ones are assumed.
    """
    import joblib

    from convoy import models
    from convoy.cluster import uses_cluster
    from convoy.core.config import validate
    from convoy.data.packed.dataset_info import DatasetInfo
    from convoy.training.hardware import TrainerConfig, count_gpus, count_macs, resolve_trainer

    trainer = None if uses_cluster(params["trainer"]) else validate(TrainerConfig, params["trainer"], "trainer")
    jobs, is_gpu = [], False
    for name, settings in params["model"].items():
        info = DatasetInfo("", [str(label) for label in range(1000)], settings["size"], 3, [0.5] * 3, [0.5] * 3)
        classifier = models.build(name, settings, info)
        units = 0
        if trainer:
            hardware = resolve_trainer(trainer, classifier)
            is_gpu = hardware.accelerator == "gpu"
            units = hardware.devices if is_gpu else hardware.devices * hardware.threads
        jobs.append(Job(name, count_macs(classifier), units))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if is_gpu else []
    if is_gpu and len(gpus) < count_gpus():
        gpus = [str(number) for number in range(count_gpus())]
    machine = Machine(len(gpus) if is_gpu else joblib.cpu_count(), tuple(gpus))
    return sorted(jobs, key=lambda job: -job.work), machine


def select_changed(root: Path, jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs that DVC would not skip."""
    stages = [f"{stage}@{job.name}" for job in jobs for stage in ("train", "evaluate")]
    changed = {stage.partition("@")[2] for stage in list_changed_stages(root, stages)}
    return [job for job in jobs if job.name in changed]
