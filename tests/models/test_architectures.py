"""The architectures: what all have in common, then what is specific to each."""

import copy
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torchvision
import yaml
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from convoy import models
from convoy.core.errors import ConvoyError
from convoy.models import alexnet, googlenet, lenet, resnet9, vgg
from convoy.models.base import Classifier
from model_fixtures import CONF, build, make_dataset_info, make_images
from model_settings import every_network, load_model_settings
from small_project import ROOT


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def fill_zeros(model: Classifier) -> Classifier:
    """Draw weights that are zero at first, as those of a transformer's head."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


# Every architecture


def test_every_module_has_a_settings_file_of_its_name() -> None:
    assert set(models.names()) < {file.stem for file in CONF.glob("*.yaml")}


@every_network
def test_settings_file_has_its_name_as_key_and_fits_the_schema(name: str) -> None:
    content = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert list(content) == ["defaults", name]
    models.check_settings(name, load_model_settings(name))


@every_network
def test_settings_file_overrides_the_shared_recipe(name: str) -> None:
    content = yaml.safe_load((CONF / f"{name}.yaml").read_text())[name]
    shared = yaml.safe_load((ROOT / "conf/recipe/default.yaml").read_text())
    recipe, own = load_model_settings(name)["recipe"], content.get("recipe", {})
    assert recipe.keys() == shared.keys()
    for key in recipe.keys() - {"augment"}:
        assert recipe[key] == own.get(key, shared[key])


@every_network
@pytest.mark.parametrize(("size", "channels"), [(32, 1), (32, 3), (33, 1), (48, 3), (64, 1), (96, 3), (224, 3)])
def test_images_of_any_size_become_one_logit_for_each_class(name: str, size: int, channels: int) -> None:
    if name == "vit_b_16" and size % 8:
        pytest.skip("a transformer needs complete patches")
    with torch.device("meta"):  # shapes without numbers
        model = build(name, size=size, channels=channels, classes=7)
        assert model(make_images(2, size, channels)).shape == (2, 7)
        assert all(
            logits.shape == (2, 7)
            for _, logits in model.weighted_heads(model.normalise(make_images(2, size, channels)))
        )


@every_network
@pytest.mark.parametrize("size", [32, 40, 64])
def test_logits_are_finite_and_differ_between_images(name: str, size: int) -> None:
    logits = fill_zeros(build(name, size=size, channels=3)).eval()(make_images(4, size, channels=3))
    assert logits.isfinite().all()
    assert logits.std(dim=0).min() > 0


@every_network
def test_fresh_logits_are_of_moderate_size(name: str) -> None:
    # a first loss far above log(K) is a network that starts out certain and wrong
    model = build(name)
    pixels, labels = make_images(64), torch.arange(64) % 10
    weight, logits = model.weighted_heads(model.normalise(pixels))[0]
    assert weight == 1
    assert functional.cross_entropy(logits, labels) < 5


@every_network
def test_pixels_are_normalised_inside(name: str) -> None:
    model = build(name, channels=3).eval()
    pixels = make_images(3, channels=3)
    x = (pixels.permute(0, 3, 1, 2) / 255 - 0.4) / 0.2
    assert torch.allclose(model(pixels), model.logits(x), atol=1e-4)


@every_network
def test_gradient_of_the_heads_reaches_every_parameter(name: str) -> None:
    model = fill_zeros(build(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # a zero gain of a norm holds back all gradients below it
                parameter.uniform_(0.1, 0.5)
    labels = torch.arange(8)
    heads = model.weighted_heads(model.normalise(make_images(8)))
    sum(weight * functional.cross_entropy(logits, labels) for weight, logits in heads).backward()
    idle = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
    ]
    assert idle == []


@every_network
def test_weights_depend_on_the_seed(name: str) -> None:
    first, again, other = (build(name, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@every_network
def test_saved_weights_restore_the_same_classifier(name: str, tmp_path: Path) -> None:
    model = build(name, channels=3)
    model(make_images(8, channels=3))  # in training mode: batch norms move
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    restored = models.restore(
        name, load_model_settings(name), make_dataset_info(channels=3), tmp_path / "weights.safetensors"
    )
    assert not restored.training
    pixels = make_images(4, channels=3)
    assert torch.equal(restored(pixels), model.eval()(pixels))


def test_restoring_imports_neither_compiler_nor_sympy(tmp_path: Path) -> None:
    weights, file = tmp_path / "weights.safetensors", tmp_path / "restore.py"
    save_file(build("lenet").state_dict(), weights)
    file.write_text(
        "import sys\nfrom pathlib import Path\nfrom convoy import models\n"
        "from convoy.data.packed.dataset_info import DatasetInfo\n"
        f"info = DatasetInfo(**{dataclasses.asdict(make_dataset_info())})\n"
        f"models.restore('lenet', {load_model_settings('lenet')}, info, Path({str(weights)!r}))\n"
        "print({'sympy', 'torch._dynamo'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.check_output([sys.executable, file], env=environment, text=True) == "set()\n"


@every_network
def test_weights_of_another_dataset_are_refused_by_name(name: str, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(build(name, classes=9).state_dict(), weights)
    with pytest.raises(ConvoyError, match=f"weights.safetensors: not the weights of this {name}"):
        models.restore(name, load_model_settings(name), make_dataset_info(), weights)


@pytest.mark.parametrize("content", [None, b"", b"not a safetensors file"])
def test_missing_or_broken_file_of_weights_is_refused_by_name(content: bytes | None, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    if content is not None:
        weights.write_bytes(content)
    with pytest.raises(ConvoyError, match=r"weights\.safetensors"):
        models.restore("lenet", load_model_settings("lenet"), make_dataset_info(), weights)


@every_network
def test_misspelled_key_is_refused_with_a_suggestion(name: str) -> None:
    values = load_model_settings(name)
    values["recipe"]["learning_rte"] = 0.1
    with pytest.raises(ConvoyError, match=rf"model\.{name}\.recipe\.learning_rte: unknown key"):
        models.build(name, values, make_dataset_info())


@every_network
def test_every_setting_is_needed(name: str) -> None:
    for key in load_model_settings(name).keys() - set(models.COMMON):
        values = load_model_settings(name)
        del values[key]
        with pytest.raises(ConvoyError, match=rf"model\.{name}\.{key}: missing"):
            models.build(name, values, make_dataset_info())


@every_network
def test_too_small_images_are_refused_with_the_minimum_size(name: str) -> None:
    try:
        build(name, size=20)
    except ConvoyError as refusal:
        message = str(refusal)
        assert message.startswith(f"model.{name}: does not fit images of 20 px")
        smallest, largest = map(int, re.findall(r"the smallest is (\d+), the largest (\d+)", message)[0])
        build(name, size=smallest)
        build(name, size=largest)
        with pytest.raises(ConvoyError, match=f"the smallest is {smallest}"):
            build(name, size=smallest - 1)


def test_unknown_architecture_is_refused_with_known_names() -> None:
    with pytest.raises(ConvoyError, match=r"model\.resnt: no such architecture; did you mean resnet\?$"):
        models.build("resnt", {}, make_dataset_info())


def test_architecture_is_imported_only_when_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in models.names():
        monkeypatch.delitem(sys.modules, f"convoy.models.{name}", raising=False)
    build("lenet")
    assert [name for name in models.names() if f"convoy.models.{name}" in sys.modules] == ["lenet"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("lenet", 61_706),
        ("alexnet", 200_802),
        ("vgg", 481_786),
        ("googlenet", 654_902),
        ("resnet", 701_178),
        ("resnet9", 3_180_968),
    ],
)
def test_parameter_count_is_unchanged(name: str, count: int) -> None:
    assert count_parameters(build(name)) == count


@pytest.mark.parametrize("channels", [1, 3])
def test_first_layer_of_resnet9_whitens_the_patches(channels: int) -> None:
    model = build("resnet9", channels=channels)
    assert isinstance(model, resnet9.ResNet9)
    random = np.random.default_rng(0)
    # Neighbouring pixels and channels are alike, as in photographs.
    base = random.integers(0, 200, (400, 16, 16, 1)).repeat(2, axis=1).repeat(2, axis=2)
    pixels = (base + random.integers(0, 50, (400, 32, 32, channels))).astype(np.uint8)
    model.init_from_images(pixels)
    with torch.inference_mode():
        x = model.normalise(torch.from_numpy(pixels))
        found = functional.conv2d(x, model.whitening.weight).transpose(0, 1).flatten(1)
    half = len(found) // 2
    assert torch.equal(found[:half], -found[half:])
    torch.testing.assert_close(torch.cov(found[:half]), torch.eye(half), atol=0.02, rtol=0)


# Against torchvision, at the papers' settings for ImageNet; tests/training/test_init_weights.py compares the logits

IMAGENET = {
    "alexnet": "alexnet",
    "vgg16": "vgg",
    "googlenet": "googlenet",
    "resnet18": "resnet",
    "resnet50": "resnet",
}


def build_imagenet(theirs: str, size: int = 224) -> Classifier:
    """The classifier with which torchvision's `theirs` is to be equal, without weights."""
    name = IMAGENET[theirs]
    with torch.device("meta"):
        return models.build(
            name,
            load_model_settings(name) | models.equivalents(name).settings[theirs],
            make_dataset_info(size, 3, classes=1000),
        )


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("alexnet", 61_100_840),
        ("vgg16", 138_357_544),
        ("googlenet", 13_004_888),  # with both auxiliary classifiers
        ("resnet18", 11_689_512),
        ("resnet50", 25_557_032),
    ],
)
def test_imagenet_parameter_count_equals_that_of_torchvision(name: str, count: int) -> None:
    assert count_parameters(build_imagenet(name)) == count


def test_googlenet_heads_equal_those_of_torchvision() -> None:
    # at 256 px, where the auxiliary classifiers' windows, 5x5 in the paper at 224 px, are the same in both
    torch.manual_seed(0)
    theirs = torchvision.models.googlenet(weights=None, init_weights=False).eval()
    for layer in theirs.modules():
        if isinstance(layer, nn.BatchNorm2d):  # fresh ones hardly do anything
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.01, 0.1)
    ours = build_imagenet("googlenet", 256).eval()
    keys = [key for key in ours.state_dict() if key not in ("mean", "std")]
    weights = dict(zip(keys, theirs.state_dict().values(), strict=True))
    ours.load_state_dict(weights | {"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}, assign=True)
    x = torch.randn(1, 3, 256, 256)
    theirs.training = True  # of the outermost module alone: it returns all heads, and dropout stays off
    with torch.inference_mode():
        expected = theirs(x)
        heads = [logits for _, logits in ours.weighted_heads(x)]
    for found, wanted in zip(heads, (expected.logits, expected.aux_logits1, expected.aux_logits2), strict=True):
        assert wanted.std() > 0.001
        assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


# What is special in one architecture


def test_imagenet_stem_on_small_images_is_refused() -> None:
    values = load_model_settings("alexnet") | models.equivalents("alexnet").settings["alexnet"]
    with pytest.raises(
        ConvoyError, match=r"model\.alexnet: does not fit images of 32 px .*size to 223, the nearest that fits"
    ):
        models.build("alexnet", values, make_dataset_info())


def test_alexnet_response_norm_equals_that_of_torch() -> None:
    x = torch.randn(2, 9, 4, 4) * 100
    expected = functional.local_response_norm(x, size=5, alpha=5 * 1e-4, beta=0.75, k=2)
    assert torch.allclose(alexnet.LocalResponse()(x), expected, rtol=1e-5, atol=1e-6)


def test_googlenet_auxiliary_classifiers_only_train() -> None:
    model = build("googlenet").eval()
    pixels = make_images()
    assert [weight for weight, _ in model.weighted_heads(model.normalise(pixels))] == [1.0, 0.3, 0.3]
    before = model(pixels)
    for auxiliary in (model.auxiliary_4a, model.auxiliary_4d):
        for parameter in auxiliary.parameters():
            nn.init.zeros_(parameter)
    assert torch.equal(model(pixels), before)
    model.weighted_heads(model.normalise(pixels))[0][1].sum().backward()
    assert all(parameter.grad is None for parameter in model.auxiliary_4a.parameters())


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_resnet_block_of_equal_shape_starts_as_the_identity(block: str) -> None:
    values = load_model_settings("resnet") | {"block": block}
    model = models.build("resnet", values, make_dataset_info())
    x = torch.rand(2, model.blocks[1].outputs, 8, 8)
    assert torch.equal(model.blocks[1](x), x)
    changed = copy.deepcopy(model.blocks[1])
    nn.init.ones_(changed.body[-1].weight)
    assert not torch.equal(changed(x), x)


@pytest.mark.parametrize("module", [lenet, alexnet, vgg, googlenet])
def test_large_feature_maps_are_averaged_by_equal_windows(module: ModuleType) -> None:
    x = torch.randn(2, 3, 12, 12)
    assert torch.equal(module.average_pool_to(x, 12), x)
    assert torch.allclose(module.average_pool_to(x, 4), functional.adaptive_avg_pool2d(x, 4))
    assert all(module.average_pool_to(x, size).shape == (2, 3, size, size) for size in range(1, 13))
