"""The hardware: what trains, in which precision and with how many threads, as it was measured to be best."""

import copy
import dataclasses
import platform
from importlib.metadata import version
from typing import Annotated, Literal

import joblib
import torch
from pydantic import Field
from torch.utils.flop_counter import FlopCounterMode

from convoy.config import Count, schema
from convoy.errors import ConvoyError
from convoy.models.base import Classifier

MATRICES = ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")  # what multiplies matrices in half precision
PER_THREAD = 4e9  # multiply-adds of a training step from which one more thread pays: some 0.1 s of work
Threads = Annotated[int, Field(ge=1, le=1024)]  # of some ten thousand torch crashes


@schema
class TrainerConfig:
    """What the training runs on; `auto` is what was measured to be best (benchmarks/README.md)."""

    accelerator: Literal["auto", "cpu", "gpu"]  # auto: a GPU where there is one
    devices: Count | Literal["all"]  # of each machine: GPUs, or processes on the CPU; more than one train by DDP
    nodes: Count  # machines
    precision: Literal["auto", "float32", "bfloat16"]  # of the arithmetic in training; weights are float32
    compile: bool  # by torch.compile: minutes at the start, for runs of hours
    threads: Threads | Literal["auto"]  # of each process; part of what makes the same bits


@dataclasses.dataclass(frozen=True)
class ResolvedTrainer:
    """What `auto` came to; all of it is part of what makes the same bits."""

    accelerator: str  # cpu or gpu
    devices: int
    nodes: int
    precision: str  # float32 or bfloat16
    compile: bool
    threads: int


def choose(trainer: TrainerConfig, classifier: Classifier) -> ResolvedTrainer:
    """The settings with every `auto` decided, by the hardware and the size of the network alone.

    Nothing is tried out: two runs on one machine must choose alike, however busy it is. Raises ConvoyError where a GPU
    is asked for and there is none, or too few.
    """
    there = gpus()
    if trainer.accelerator == "gpu" and not there:
        raise ConvoyError("trainer.accelerator=gpu: this machine has no GPU that torch can use; set it to auto or cpu")
    gpu = device(trainer.accelerator).type == "cuda"
    cores = joblib.cpu_count(only_physical_cores=True)
    devices = trainer.devices if trainer.devices != "all" else there if gpu else cores
    if gpu and devices > there:
        raise ConvoyError(f"trainer.devices={devices}: this machine has {there} GPUs")
    precision = trainer.precision
    if precision == "auto":
        # 1.3 times as fast for small networks and twice for large ones, with the instructions; slower without
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else has_bfloat16()
        precision = "bfloat16" if fast else "float32"
    if trainer.threads == "auto":
        work = 3 * count_macs(classifier) * classifier.recipe.batch_size / devices / trainer.nodes
        # threads of a small step wait for each other longer than they work, most of all on a busy machine
        threads = 1 if gpu else max(1, min(cores // devices, int(work / PER_THREAD)))
    else:
        threads = trainer.threads
    return ResolvedTrainer("gpu" if gpu else "cpu", devices, trainer.nodes, precision, trainer.compile, threads)


def device(accelerator: str) -> torch.device:
    """What works where `Trainer.accelerator`, or what was chosen of it, is this: the CPU, or the first GPU."""
    return torch.device("cuda" if accelerator != "cpu" and gpus() else "cpu")


def gpus() -> int:
    """How many torch can use: none where the driver, or one of them, is too old for it."""
    if not torch.cuda.is_available():
        return 0
    built_for = [int(name[3:].rstrip("af")) for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    count = torch.cuda.device_count()
    versions = [10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(count))]
    return count if min(versions) >= min(built_for, default=0) else 0


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 numbers itself."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def count_macs(classifier: Classifier) -> int:
    """Of the main logits of one image, in its convolutions and full layers."""
    task = classifier.task
    x = torch.empty(1, task.channels, task.size, task.size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        copy.deepcopy(classifier).eval().to("meta").logits(x)
    return counter.get_total_flops() // 2


def environment(choice: ResolvedTrainer) -> dict[str, str | int]:
    """The versions and the hardware that decide the bits, beside code, settings and data."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in ("numpy", "pytorch-lightning", "torch")},
        "device": torch.cuda.get_device_name() if choice.accelerator == "gpu" else "cpu",
        "instructions": instructions(),
        "threads": choice.threads,
        "precision": choice.precision,
        "processes": choice.devices * choice.nodes,
    }


def instructions() -> str:
    """Those of the processor by which it rounds otherwise than others: "AVX512 avx512_bf16"."""
    can = torch.cpu.get_capabilities()
    return " ".join([torch.backends.cpu.get_cpu_capability(), *(name for name in MATRICES if can.get(name))])
