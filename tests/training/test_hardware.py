"""Hardware: `auto` depends on the machine and the size of the network alone."""

import dataclasses

import pytest
import torch

from convoy.core.config import validate
from convoy.core.errors import ConvoyError
from convoy.training import hardware
from convoy.training.hardware import TrainerConfig, count_macs, describe_environment, resolve_trainer
from convoy.training.record import ResolvedTrainer
from training_fixtures import build

AUTO = TrainerConfig(
    accelerator="auto",
    devices=1,
    num_nodes=1,
    strategy="auto",
    precision="auto",
    sync_batchnorm=False,
    max_time=None,
    profiler=None,
    compile=False,
    threads="auto",
)


def set_machine(monkeypatch: pytest.MonkeyPatch, *, gpus: int = 0, bfloat16: bool = True, cores: int = 8) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "compute_120"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    monkeypatch.setattr(hardware, "has_bfloat16", lambda: bfloat16)
    monkeypatch.setattr("joblib.cpu_count", lambda only_physical_cores: cores)


@pytest.mark.parametrize(("bfloat16", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
@pytest.mark.parametrize("gpus", [0, 2])
def test_bfloat16_is_chosen_if_the_hardware_supports_it(
    bfloat16: bool, precision: str, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_machine(monkeypatch, gpus=gpus, bfloat16=bfloat16)
    assert resolve_trainer(AUTO, build()).precision == precision


def test_small_steps_use_one_thread_and_large_ones_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, cores=8)
    assert resolve_trainer(AUTO, build(batch_size=32)).threads == 1
    assert resolve_trainer(AUTO, build(name="resnet", batch_size=64)).threads == 1
    assert resolve_trainer(AUTO, build(name="resnet", batch_size=4096)).threads == 8
    two = dataclasses.replace(AUTO, devices=2)
    assert resolve_trainer(two, build(name="resnet", batch_size=4096)).threads == 4  # they share the cores


def test_gpu_is_chosen_if_available(monkeypatch: pytest.MonkeyPatch) -> None:
    every = dataclasses.replace(AUTO, devices="all")
    set_machine(monkeypatch, gpus=4)
    assert resolve_trainer(AUTO, build()) == ResolvedTrainer("gpu", 1, 1, "auto", "bf16-mixed", False, False, 1)
    assert (resolve_trainer(every, build()).devices, resolve_trainer(every, build()).strategy) == (4, "ddp")
    assert resolve_trainer(dataclasses.replace(AUTO, accelerator="cpu"), build()).accelerator == "cpu"
    set_machine(monkeypatch, gpus=0, cores=3)
    assert resolve_trainer(AUTO, build()).accelerator == "cpu"
    assert resolve_trainer(every, build()).devices == 3


def test_gpu_that_torch_cant_use_counts_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, gpus=2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: [(9, 0), (6, 1)][number])  # one too old
    assert resolve_trainer(AUTO, build()).accelerator == "cpu"
    set_machine(monkeypatch, gpus=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # though its driver, too old for torch, counts two
    assert resolve_trainer(AUTO, build()).accelerator == "cpu"
    assert hardware.select_device("gpu").type == "cpu"


def test_unavailable_hardware_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, gpus=0)
    with pytest.raises(ConvoyError, match=r"trainer\.accelerator=gpu: this machine has no GPU"):
        resolve_trainer(dataclasses.replace(AUTO, accelerator="gpu"), build())
    set_machine(monkeypatch, gpus=2)
    with pytest.raises(ConvoyError, match=r"trainer\.devices=3: this machine has 2 GPUs"):
        resolve_trainer(dataclasses.replace(AUTO, devices=3), build())


def test_explicit_settings_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch)
    given = {"precision": "32-true", "sync_batchnorm": True, "compile": True, "threads": 5, "profiler": "simple"}
    asked = dataclasses.replace(AUTO, accelerator="cpu", devices=2, num_nodes=3, max_time="00:01:00:00", **given)
    expected = ResolvedTrainer("cpu", 2, 3, "ddp", max_time="00:01:00:00", **given)
    assert resolve_trainer(asked, build()) == expected


@pytest.mark.parametrize(
    ("setting", "value"),
    [("strategy", "fsdp"), ("accelerator", "mps"), ("precision", "16-mixed"), ("max_time", "1h"), ("profiler", "xla")],
)
def test_what_was_never_tried_is_refused_by_name(setting: str, value: str) -> None:
    with pytest.raises(ConvoyError, match=rf"trainer\.{setting}"):
        validate(TrainerConfig, dataclasses.asdict(AUTO) | {setting: value}, "trainer")


def test_macs_of_lenet_are_those_of_its_layers() -> None:
    classifier = build()
    expected = (
        28 * 28 * 6 * 25  # C1
        + 10 * 10 * 16 * 6 * 25  # C3
        + 120 * 16 * 25  # C5
        + 120 * 84  # F6
        + 84 * 2  # output, of two classes
    )
    assert count_macs(classifier) == expected
    assert classifier.mean.device.type == "cpu"  # counted on a copy


def test_environment_names_what_reproducibility_depends_on() -> None:
    found = describe_environment(ResolvedTrainer("cpu", 2, 3, "ddp", "bf16-mixed", False, False, 3))
    assert found["torch"] == torch.__version__.split("+")[0]
    assert {"device": "cpu", "threads": 3, "precision": "bf16-mixed", "processes": 6}.items() <= found.items()
    assert {"python", "numpy", "pytorch-lightning", "instructions"} <= found.keys()
