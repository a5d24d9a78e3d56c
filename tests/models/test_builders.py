"""Networks of torchvision and timm by name: what they share with our own is tested with those."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model

from convoy import models
from convoy.core.errors import ConvoyError
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models import builders
from convoy.models.builders import AveragePool
from convoy.training import builder_weights
from convoy.training.determinism import list_nondeterministic, resolve_determinism
from convoy.training.hardware import count_macs
from convoy.training.init_weights import init_weights
from convoy.training.record import ResolvedTrainer
from model_fixtures import make_dataset_info, make_images
from model_settings import NETWORKS, load_model_settings

# The layers that the documentation of `torch.use_deterministic_algorithms` lists for CUDA tensors.
NONDETERMINISTIC_LAYERS = tuple(
    getattr(nn, name)
    for name in (
        *("AvgPool3d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d", "MaxPool3d", "AdaptiveMaxPool2d"),
        *("FractionalMaxPool2d", "FractionalMaxPool3d", "MaxUnpool1d", "MaxUnpool2d", "MaxUnpool3d", "Upsample"),
        *("ReflectionPad1d", "ReflectionPad2d", "ReflectionPad3d", "ReplicationPad1d", "ReplicationPad2d"),
        *("ReplicationPad3d", "CTCLoss", "EmbeddingBag"),
    )
)
SMALL_TIMM = {"depths": [1, 1, 1, 1], "dims": [4, 8, 8, 16]}


def make_settings(builder: str = "torchvision/mobilenet_v3_small", **changes: Any) -> dict[str, Any]:
    return load_model_settings("mobilenet_v3_small") | {"builder": builder} | changes


def build(values: dict[str, Any], seed: int = 0, **of_info: int) -> Any:
    torch.manual_seed(seed)
    with torch.device("meta" if of_info.pop("meta", 0) else "cpu"):
        return models.build("mine", values, make_dataset_info(**of_info))


def full_settings(name: str) -> dict[str, Any]:
    """The settings as they are in conf/, for the shapes alone."""
    return load_model_settings(name) | {"builder": f"torchvision/{name}", "arguments": {}, "size": 224}


def test_builder_is_found_in_both_libraries() -> None:
    regnet = make_settings("torchvision/regnet_y_400mf", arguments={})
    for values in (make_settings(), make_settings("timm/convnext_tiny", arguments=SMALL_TIMM), regnet):
        network = build(values, channels=3, classes=7).eval()
        assert network(make_images(2, 32, 3)).shape == (2, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"builder": "torchvision/convnext_tny"}, r"convnext_tny: torchvision has no such network; did you mean conv"),
        ({"builder": "timm/resnett50"}, r"resnett50: timm has no such network; did you mean resnet50"),
        ({"builder": "keras/resnet50"}, "must be torchvision/NAME or timm/NAME, such as torchvision/resnet50"),
        ({"builder": "resnet50"}, "must be torchvision/NAME or timm/NAME"),
        ({"builder": "torchvision/resnet18", "arguments": {"width": 2}}, "resnet18 does not take them .*'width'"),
        (
            {"arguments": {"num_classes": 2}},
            "num_classes of torchvision/.* is set by convoy: remove it",
        ),
        (
            {"init": "pretrained", "weights": "IMAGENET21K"},
            "weights=IMAGENET21K: torchvision offers DEFAULT, IMAGE",
        ),
        (
            {"builder": "timm/resnet18", "init": "pretrained", "weights": "none", "arguments": {}},
            "weights=none: timm offers a1_in1k",
        ),
        (
            {"builder": "torchvision/vit_b_16", "init": "pretrained", "arguments": {}},
            "size=32: the weights torchvision vit_b_16 .* fit images of 224 px only",
        ),
        ({"size": 16}, "size=16: input should be greater than or equal to 32"),
        ({"module": "bilders"}, "module=bilders: no such architecture; did you mean builders"),
    ],
    ids=str,
)
def test_wrong_setting_is_refused_with_a_fix(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvoyError, match=rf"model\.mine\..*{message}"):
        models.check_settings("mine", make_settings() | changes)


@pytest.mark.parametrize(
    ("builder", "size", "message"),
    [
        (
            "torchvision/inception_v3",
            32,
            r"images of 32 px .*set model\.mine\.size to 75, the near.* smallest is 75, the largest 1024",
        ),
        (
            "torchvision/vit_b_32",
            250,
            r"images of 250 px .*set model\.mine\.size to 256 or 224, the nearest.* smallest is 32, the largest 1024",
        ),
    ],
)
def test_size_that_does_not_fit_is_refused_with_those_that_do(builder: str, size: int, message: str) -> None:
    with pytest.raises(ConvoyError, match=message):
        build(make_settings(builder, arguments={}), size=size, meta=1)


def test_grey_images_are_repeated_for_three_channels() -> None:
    grey, colour = build(make_settings(), channels=1).eval(), build(make_settings(), channels=3).eval()
    assert grey.mean.numel() == 3
    pixels = make_images(2, 32, 1)
    assert torch.allclose(grey(pixels), colour(pixels.expand(-1, -1, -1, 3)), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in models.names()])
def test_work_and_size_are_those_that_torchvision_states(name: str) -> None:
    weights = builders.find_published(models.parse(name, full_settings(name))).source
    size, classes = weights.transforms().crop_size[0], [str(label) for label in range(1000)]
    with torch.device("meta"):
        network = models.build(name, full_settings(name), DatasetInfo("x", classes, size, 3, [0.4] * 3, [0.2] * 3))
    assert sum(parameter.numel() for parameter in network.parameters()) == weights.meta["num_params"]
    assert math.isclose(count_macs(network) / 1e9, weights.meta["_ops"], abs_tol=0.001, rel_tol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_fit_the_sizes_that_the_documentation_gives(name: str) -> None:
    values = load_model_settings(name) if name in models.names() else full_settings(name)
    for size in (32, 48, 224, 1024):
        build(values | {"size": size}, size=size, channels=3, meta=1)


# Determinism


@pytest.mark.parametrize("name", NETWORKS)
def test_no_shipped_network_needs_what_is_not_deterministic(name: str) -> None:
    values = load_model_settings(name) if name in models.names() else full_settings(name)
    with torch.device("meta"):
        network = models.build(name, values, make_dataset_info(size=64, channels=3))
    assert [layer for layer in network.modules() if isinstance(layer, NONDETERMINISTIC_LAYERS)] == []
    assert list_nondeterministic(network) == []


def test_operations_that_are_not_deterministic_are_found() -> None:
    network = build(make_settings(), channels=3, meta=1)
    network.network.avgpool = nn.AdaptiveMaxPool2d(1)
    network.network.features.append(nn.ReflectionPad2d(0))
    assert list_nondeterministic(network) == ["adaptive_max_pool2d_backward", "reflection_pad2d_backward"]
    gpu = ResolvedTrainer("gpu", 1, 1, "auto", "32-true", False, False, 1)
    assert resolve_determinism(gpu, network).deterministic == "warn"
    assert resolve_determinism(dataclasses.replace(gpu, accelerator="cpu"), network).deterministic is True


@pytest.mark.parametrize("size", [1, 7])
def test_replaced_pooling_equals_that_of_torch(size: int) -> None:
    x = torch.randn(2, 3, 14, 14)
    assert torch.allclose(AveragePool(size)(x), nn.AdaptiveAvgPool2d(size)(x), atol=1e-6)


# Published weights


def fail_if_called(init: str, folder: Path) -> str:
    raise AssertionError("MLflow was asked")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_the_library_are_loaded_from_a_file(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = get_model("mobilenet_v3_small", weights=None, num_classes=1000, width_mult=0.25).eval()
    file = tmp_path / f"theirs{suffix}"
    if suffix == ".pth":
        torch.save(theirs.state_dict(), file)
    else:
        save_file(theirs.state_dict(), file)
    values = make_settings(init=str(file))
    network = build(values, channels=3, classes=3).eval()
    head = network.network.classifier[3].weight.clone()
    start = init_weights(network, "mine", values, fail_if_called)
    assert (start.head, start.verified) == ("new", False)
    assert torch.equal(network.network.classifier[3].weight, head)
    assert torch.allclose(network.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(network.network.features(x), theirs.features(x), atol=1e-5)


def test_damaged_file_in_the_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / "mobilenet_v3_small-047dcff4.pth"
    file.parent.mkdir()
    torch.save({"weight": torch.zeros(1)}, file)
    values = make_settings(init="pretrained", arguments={})
    with pytest.raises(ConvoyError, match=r"model\.mine\.init: .* is damaged.* instead of 047dcff4"):
        init_weights(build(values, channels=3), "mine", values, fail_if_called)


def test_weights_that_cannot_be_had_end_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    for builder in ("torchvision/mobilenet_v3_small", "timm/mobilenetv3_small_100"):
        with pytest.raises(ConvoyError, match=r"model\.mine\.init: .*can't be downloaded \(no network\); ") as error:
            builder_weights.download_weights("mine", make_settings(builder, init="pretrained", arguments={}))
        assert "\n" not in str(error.value)
