"""The choice of hardware, precision and number of threads for a training run."""

import copy
import os
import platform
import re
from importlib.metadata import version
from typing import Annotated, Literal

import joblib
import torch
from pydantic import AfterValidator, Field
from torch.utils.flop_counter import FlopCounterMode

from convoy.core.config import PositiveInt, schema
from convoy.core.errors import ConvoyError
from convoy.models.base import Classifier
from convoy.training.record import ISA_VARIABLES, ResolvedTrainer

# Instruction sets that multiply matrices in half precision.
HALF_PRECISION_SETS = ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")
# Work in a training step for which one more thread is worthwhile: about 0.1 s.
MACS_PER_THREAD = 4e9  # MACs
# Torch crashes with about ten thousand threads.
Threads = Annotated[int, Field(ge=1, le=1024)]


def _check_duration(text: str) -> str:
    if not re.fullmatch(r"\d\d:\d\d:\d\d:\d\d", text):
        raise ValueError("it must be days, hours, minutes and seconds, DD:HH:MM:SS, such as 00:12:00:00")
    return text


Duration = Annotated[str, AfterValidator(_check_duration)]


@schema
class TrainerConfig:
    """Hardware settings; `auto` selects what was measured to be best (benchmarks/README.md)."""

    accelerator: Literal["auto", "cpu", "gpu"]  # auto uses a GPU if there is one
    devices: PositiveInt | Literal["all"]  # GPUs or CPU processes per machine; more than one use DDP
    num_nodes: PositiveInt  # machines
    # FSDP and other strategies were never tried here.
    strategy: Literal["auto", "ddp"]  # auto uses DDP for more than one device
    precision: Literal["auto", "32-true", "bf16-mixed"]  # precision of the computation; weights are float32
    sync_batchnorm: bool  # whether batch norms use the statistics of all devices
    max_time: Duration | None  # validates and ends then, but not before the end of the first epoch
    profiler: Literal["simple", "advanced"] | None  # prints how long each part of the training takes
    compile: bool  # torch.compile takes minutes at the start, which pays off in runs of hours
    threads: Threads | Literal["auto"]  # per process; results are bit-identical only for the same number


def resolve_trainer(trainer: TrainerConfig, classifier: Classifier) -> ResolvedTrainer:
    """Replace each `auto` by a value that depends only on the hardware and the size of the network.

    Nothing is measured, so that all runs on a machine make the same decisions, regardless of its load.

    Args:
        trainer: Settings, which may be `auto`.
        classifier: The network to train.

    Raises:
        ConvoyError: If the settings ask for a GPU and there is none, or for more GPUs than there are.
    """
    gpu_count = count_gpus()
    if trainer.accelerator == "gpu" and not gpu_count:
        raise ConvoyError(
            "trainer.accelerator=gpu: this machine has no GPU that this torch can use, which is built for CUDA "
            f"{torch.version.cuda}: update the driver (see nvidia-smi), or set trainer.accelerator to auto or cpu"
        )
    is_gpu = select_device(trainer.accelerator).type == "cuda"
    cores = joblib.cpu_count(only_physical_cores=True)
    devices = trainer.devices if trainer.devices != "all" else gpu_count if is_gpu else cores
    if is_gpu and devices > gpu_count:
        raise ConvoyError(f"trainer.devices={devices}: this machine has {gpu_count} GPUs")
    precision = trainer.precision
    if precision == "auto":
        # With hardware support, bfloat16 is 1.3 times as fast for small networks and twice as fast for large ones;
        # without it, bfloat16 is slower than float32.
        is_supported = torch.cuda.is_bf16_supported(including_emulation=False) if is_gpu else has_bfloat16()
        precision = "bf16-mixed" if is_supported else "32-true"
    if trainer.threads == "auto":
        work = 3 * count_macs(classifier) * classifier.recipe.batch_size / devices / trainer.num_nodes
        # In a small step, threads wait for each other longer than they work, especially on a busy machine.
        threads = 1 if is_gpu else max(1, min(cores // devices, int(work / MACS_PER_THREAD)))
    else:
        threads = trainer.threads
    return ResolvedTrainer(
        accelerator="gpu" if is_gpu else "cpu",
        devices=devices,
        num_nodes=trainer.num_nodes,
        strategy="ddp" if devices * trainer.num_nodes > 1 else trainer.strategy,
        precision=precision,
        sync_batchnorm=trainer.sync_batchnorm,
        compile=trainer.compile,
        threads=threads,
        max_time=trainer.max_time,
        profiler=trainer.profiler,
    )


def select_device(accelerator: str) -> torch.device:
    """Return the device for an accelerator setting: the CPU or the first GPU.

    Args:
        accelerator: The `accelerator` of a `TrainerConfig` or a `ResolvedTrainer`.
    """
    return torch.device("cuda" if accelerator != "cpu" and count_gpus() else "cpu")


def count_gpus() -> int:
    """Return the number of GPUs that torch can use, which is 0 if the driver or any GPU is too old for it."""
    if not torch.cuda.is_available():
        return 0
    built_for = [int(name[3:].rstrip("af")) for name in torch.cuda.get_arch_list() if name.startswith("sm_")]
    count = torch.cuda.device_count()
    versions = [10 * major + minor for major, minor in map(torch.cuda.get_device_capability, range(count))]
    return count if min(versions) >= min(built_for, default=0) else 0


def has_bfloat16() -> bool:
    """Return whether the processor has instructions that multiply bfloat16 numbers."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def count_macs(classifier: Classifier) -> int:
    """Count the MACs of the convolutions and fully connected layers that compute the main logits of one image."""
    info = classifier.info
    pixels = torch.empty(1, info.size, info.size, info.channels, dtype=torch.uint8, device="meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        copy.deepcopy(classifier).eval().to("meta")(pixels)
    return counter.get_total_flops() // 2


def describe_environment(hardware: ResolvedTrainer) -> dict[str, str | int]:
    """Return the package versions and hardware that results depend on, besides code, settings and data."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in ("numpy", "pytorch-lightning", "torch")},
        "device": torch.cuda.get_device_name() if hardware.accelerator == "gpu" else "cpu",
        "instructions": list_instruction_sets(),
        "threads": hardware.threads,
        "precision": hardware.precision,
        "processes": hardware.devices * hardware.num_nodes,
        # As `make_trainer` sets them.
        "deterministic": "on" if hardware.deterministic is True else hardware.deterministic,
        "tf32": "off",
        **{name: os.environ.get(name, "") for name in ISA_VARIABLES},
    }


def list_instruction_sets() -> str:
    """Return the instruction sets that affect the processor's rounding, such as "AVX512 avx512_bf16"."""
    capabilities = torch.cpu.get_capabilities()
    supported = [name for name in HALF_PRECISION_SETS if capabilities.get(name)]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *supported])
