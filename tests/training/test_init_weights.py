"""Initial weights: pretrained weights that are loaded, and those that are refused."""

import contextlib
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_model_weights

from convoy import models
from convoy.core import config
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.training import init_weights
from convoy.training.record import InitialWeights
from convoy.training.torchvision_weights import make_meta_network
from model_fixtures import TORCHVISION_NAMES
from weights_fixtures import CONF, NAMES, SOME, build, copy_state, initialise, load_settings, make_info, save_trained

Publish = Callable[[str, Path], Path]


# The head

every_architecture = pytest.mark.parametrize("name", models.names())


@every_architecture
def test_head_is_what_depends_on_the_number_of_classes(name: str) -> None:
    few, many = (build(name, load_settings(name), make_info([str(k) for k in range(count)])) for count in (3, 5))
    shapes = {key: value.shape for key, value in many.state_dict().items()}
    differ = {key for key, value in few.state_dict().items() if value.shape != shapes[key]}
    head = {key for key in shapes if few.is_in_head(key)}
    assert differ <= head
    assert all(any(few.is_in_head(key) for key in differ if key.startswith(layer)) for layer in few.head_modules)
    assert "mean" not in head
    if name != "googlenet":  # whose auxiliary classifiers are head as a whole
        assert differ == head
        assert len(head) == (1 if name == "resnet9" else 2)  # which has no bias there


# From torchvision


def build_torchvision(torchvision_name: str, classes: int = 1000) -> nn.Module:
    """As torchvision builds it, with numbers for which every layer matters."""
    options = {"init_weights": False} if torchvision_name.startswith(("vgg", "googlenet")) else {}
    torch.manual_seed(0)
    with torch.device("meta"):
        model = torchvision.models.get_model(torchvision_name, weights=None, num_classes=classes, **options)
    model.to_empty(device="cpu")
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.1)
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.zeros_(layer.num_batches_tracked)
    return model.eval()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torchvision's, and no network."""

    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def publish(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Put a file into the cache as the weights of a torchvision network, published under a name with its hash."""

    def publish(torchvision_name: str, file: Path) -> Path:
        weights = get_model_weights(torchvision_name).IMAGENET1K_V1
        name = f"{Path(weights.url).name.rpartition('-')[0]}-{sha256(file)[:8]}.pth"
        monkeypatch.setattr(weights.value, "url", f"https://download.pytorch.org/models/{name}")
        return file.rename(cache / name)

    return publish


def save(weights: object, file: Path) -> Path:
    torch.save(weights, file)
    return file


@pytest.mark.parametrize("torchvision_name", TORCHVISION_NAMES)
def test_weights_from_the_torchvision_cache_give_its_logits(
    torchvision_name: str, publish: Publish, tmp_path: Path
) -> None:
    name, theirs = TORCHVISION_NAMES[torchvision_name], build_torchvision(torchvision_name)
    file = publish(torchvision_name, save(theirs.state_dict(), tmp_path / "weights.pth"))
    pixels = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    norm = get_model_weights(torchvision_name).IMAGENET1K_V1.transforms()
    x = torchvision.transforms.functional.normalize(pixels.permute(0, 3, 1, 2) / 255, norm.mean, norm.std)
    if name == "googlenet":  # with its published weights it is built to change the normalisation once more
        theirs.transform_input = True
    with torch.inference_mode():
        expected = theirs(x)
    del theirs  # VGG fills half a gigabyte

    values = load_settings(name, "pretrained", torchvision_name)
    ours = build(name, values, make_info(NAMES, size=224)).eval()
    record = initialise(ours, name, values)
    assert record.sha256 == sha256(file)
    assert record.verified is True
    file.unlink()
    assert record.source == f"torchvision {torchvision_name} IMAGENET1K_V1"
    assert record.head == "kept"
    with torch.inference_mode():
        found = ours(pixels)
    assert expected.std() > 0.001
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_torchvision_equivalents_have_our_layers_in_order() -> None:
    for name in models.names():
        for torchvision_name in models.equivalents(name).settings:
            with torch.device("meta"):
                theirs = models.equivalents(name).translate(make_meta_network(torchvision_name, 1000).state_dict())
                ours = models.build(
                    name, load_settings(name, torchvision_name=torchvision_name), make_info(NAMES, size=224)
                ).state_dict()
            shapes = [value.shape for key, value in ours.items() if key not in ("mean", "std")]
            assert [value.shape for value in theirs.values()] == shapes, torchvision_name


def test_reordered_file_without_batch_counts_loads_equally(tmp_path: Path) -> None:
    # torchvision's files of ResNet are like this: running means first, and from before batches were counted
    weights = build_torchvision("resnet18", classes=3).state_dict()
    old = {key: weights[key] for key in reversed(weights) if not key.endswith("num_batches_tracked")}
    found = []
    for number, content in enumerate((weights, old)):
        torch.save(content, tmp_path / f"{number}.pth")
        values = load_settings("resnet", str(tmp_path / f"{number}.pth"), "resnet18")
        classifier = build("resnet", values, make_info())
        initialise(classifier, "resnet", values)
        found.append(classifier.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_torchvision_file_of_other_classes_gives_its_backbone(tmp_path: Path) -> None:
    theirs = build_torchvision("resnet18", classes=7)
    torch.save(theirs.state_dict(), tmp_path / "mine.pth")
    values = load_settings("resnet", str(tmp_path / "mine.pth"), "resnet18")
    classifier = build("resnet", values, make_info())
    fresh = classifier.classifier.weight.clone()
    record = initialise(classifier, "resnet", values)
    assert (record.source, record.head) == (str(tmp_path / "mine.pth"), "new")
    assert torch.equal(classifier.stem[0].weight, theirs.conv1.weight)
    assert torch.equal(classifier.classifier.weight, fresh)


@pytest.mark.parametrize("order", ["other names", "another order"])
def test_imagenet_weights_for_other_classes_get_a_new_head(order: str, publish: Publish, tmp_path: Path) -> None:
    publish("resnet18", save(build_torchvision("resnet18").state_dict(), tmp_path / "weights.pth"))
    values = load_settings("resnet", "pretrained", "resnet18")
    classifier = build("resnet", values, make_info(SOME if order == "other names" else NAMES[::-1]))
    fresh = classifier.classifier.weight.clone()
    assert initialise(classifier, "resnet", values).head == "new"
    assert torch.equal(classifier.classifier.weight, fresh)


def test_auxiliary_classifiers_of_torchvision_are_not_loaded(publish: Publish, tmp_path: Path) -> None:
    publish("googlenet", save(build_torchvision("googlenet").state_dict(), tmp_path / "weights.pth"))
    values = load_settings("googlenet", "pretrained", "googlenet")
    classifier = build("googlenet", values, make_info(size=64))
    before = copy_state(classifier)
    initialise(classifier, "googlenet", values)
    changed = {key for key, value in classifier.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert not any(key.startswith(("auxiliary", "classifier")) for key in changed)
    assert classifier.mean.flatten().tolist() == [0.5, 0.5, 0.5]


def test_offline_message_names_the_file_and_its_target_folder(cache: Path) -> None:
    values = load_settings("resnet", "pretrained", "resnet18")
    with pytest.raises(ConvoyError) as refusal:
        initialise(build("resnet", values, make_info()), "resnet", values)
    message = str(refusal.value)
    assert message.startswith("model.resnet.init: https://download.pytorch.org/models/resnet18-")
    assert "no network" in message
    assert f"put that file into {cache} by hand" in message
    assert list(cache.iterdir()) == []


def test_download_is_verified_by_its_checksum(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (answer := tmp_path / "answer").write_bytes(b"something else")
    monkeypatch.setattr("torch.hub.urlopen", lambda *_: urlopen(answer.as_uri()))
    values = load_settings("resnet", "pretrained", "resnet18")
    with pytest.raises(ConvoyError, match="invalid hash value"):
        initialise(build("resnet", values, make_info()), "resnet", values)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("torchvision_name", ["alexnet", "googlenet", "resnet18"])
@pytest.mark.parametrize("place", ["cache", "file"])
def test_other_weights_under_a_published_name_are_refused(
    torchvision_name: str, place: str, cache: Path, tmp_path: Path
) -> None:
    name, published = TORCHVISION_NAMES[torchvision_name], Path(get_model_weights(torchvision_name).IMAGENET1K_V1.url)
    file = save(
        build_torchvision(torchvision_name, classes=3).state_dict(),
        (cache if place == "cache" else tmp_path) / published.name,
    )
    values = load_settings(name, "pretrained" if place == "cache" else str(file), torchvision_name)
    classifier = build(name, values, make_info(size=224))
    before = copy_state(classifier)
    with pytest.raises(ConvoyError) as refusal:
        initialise(classifier, name, values)
    expected, message = published.stem[-8:], str(refusal.value)
    assert message.startswith(f"model.{name}.init: {file} is damaged, or not the file that was published")
    assert f"its sha256 begins with {sha256(file)[:8]} instead of {expected}. Remove it, and" in message
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())


def test_flipped_bit_in_published_weights_is_detected(publish: Publish, tmp_path: Path) -> None:
    file = publish("resnet18", save(build_torchvision("resnet18").state_dict(), tmp_path / "weights.pth"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    values = load_settings("resnet", "pretrained", "resnet18")
    with pytest.raises(ConvoyError, match="is damaged, or not the file that was published"):
        initialise(build("resnet", values, make_info()), "resnet", values)


def test_file_of_the_user_is_recorded_as_not_verified(tmp_path: Path) -> None:
    file = save(build_torchvision("resnet18", classes=3).state_dict(), tmp_path / "resnet18-20240131.pth")
    values = load_settings("resnet", str(file), "resnet18")
    record = initialise(build("resnet", values, make_info()), "resnet", values)
    assert (record.sha256, record.verified) == (sha256(file), False)


def test_settings_unknown_to_torchvision_are_refused_with_a_fix() -> None:
    message = (
        r"model\.resnet\.init: torchvision has no resnet with these settings; for its resnet18 set "
        r"widths: \[64, 128, 256, 512\], stem_kernel: 7, stem_stride: 2"
    )
    with pytest.raises(ConvoyError, match=message):
        init_weights.check_init("resnet", load_settings("resnet", "pretrained"))


def test_lenet_has_no_weights_from_imagenet() -> None:
    with pytest.raises(ConvoyError, match=r"model\.lenet\.init: torchvision has no lenet .* set init: scratch"):
        init_weights.check_init("lenet", load_settings("lenet", "pretrained"))


def test_grey_images_are_refused_before_anything_is_downloaded(cache: Path) -> None:
    values = load_settings("resnet", "pretrained", "resnet18")
    with pytest.raises(ConvoyError, match=r"for images with 3 channels instead of 1: set preprocess\.channels: 3"):
        initialise(build("resnet", values, make_info(channels=1)), "resnet", values)


# Hostile and broken files


class Poison:
    """When it is unpickled, a file appears."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
@pytest.mark.parametrize("place", ["cache", "file"])
def test_malicious_file_is_refused_and_not_run(form: str, place: str, publish: Publish, tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    content = {"conv1.weight": Poison(fired)}
    file = tmp_path / "poison.pth"
    if form == "plain pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    if place == "cache":
        file = publish("resnet18", file)
    values = load_settings("resnet", "pretrained" if place == "cache" else str(file), "resnet18")
    classifier = build("resnet", values, make_info())
    with pytest.raises(ConvoyError, match="is no file of plain weights, and no code in it was run"):
        initialise(classifier, "resnet", values)
    assert not fired.exists()
    with contextlib.suppress(RuntimeError):
        torch.load(file, weights_only=False)  # what the refusal is for
    assert fired.exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04", b"<html>"])
def test_broken_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.pth").write_bytes(content)
    values = load_settings("resnet", str(tmp_path / "broken.pth"), "resnet18")
    with pytest.raises(ConvoyError, match=r"model\.resnet\.init: .*broken\.pth is no file of plain weights"):
        initialise(build("resnet", values, make_info()), "resnet", values)


@pytest.mark.parametrize("content", [{"state_dict": {}, "epoch": 3}, [torch.zeros(1)], torch.zeros(1)])
def test_file_of_more_than_tensors_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    values = load_settings("resnet", str(tmp_path / "other.pth"), "resnet18")
    with pytest.raises(ConvoyError, match="holds other objects than tensors"):
        initialise(build("resnet", values, make_info()), "resnet", values)


def test_file_of_another_torchvision_network_is_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3, 512), "fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    values = load_settings("resnet", str(tmp_path / "other.pth"), "resnet18")
    with pytest.raises(
        ConvoyError, match=r"other\.pth does not hold the weights of torchvision's resnet18 .*conv1\.weight"
    ):
        initialise(build("resnet", values, make_info()), "resnet", values)


@pytest.mark.parametrize("init", ["pretraind", "0123abc", "", "weights"])
def test_mistyped_init_is_refused_with_what_it_may_be(init: str) -> None:
    with pytest.raises(ConvoyError, match=r"model\.lenet\.init='.*': it may be scratch, pretrained, champion"):
        init_weights.check_init("lenet", load_settings("lenet", init))


def test_file_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ConvoyError, match=r"model\.lenet\.init: there is no file old/weights\.safetensors"):
        init_weights.check_init("lenet", load_settings("lenet", "old/weights.safetensors"))


# From our own files


def test_scratch_leaves_the_initial_weights() -> None:
    classifier = build("lenet", load_settings("lenet"), make_info())
    before = copy_state(classifier)
    assert initialise(classifier, "lenet", load_settings("lenet")) == InitialWeights("scratch")
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())


@every_architecture
def test_all_weights_are_loaded_for_the_same_classes(name: str, tmp_path: Path) -> None:
    left = save_trained(tmp_path, name, load_settings(name), make_info())
    values = load_settings(name, str(tmp_path / "weights.safetensors"))
    classifier = build(name, values, make_info())
    record = initialise(classifier, name, values)
    assert record.head == "kept"
    found = classifier.state_dict()
    assert all(torch.equal(found[key], value) for key, value in left.state_dict().items())


@every_architecture
@pytest.mark.parametrize("classes", [SOME[::-1], ["a", "b", "c"], [*SOME, "elk"]], ids=["order", "names", "number"])
def test_all_weights_but_the_head_are_loaded_for_other_classes(name: str, classes: list[str], tmp_path: Path) -> None:
    left = save_trained(tmp_path, name, load_settings(name), make_info()).state_dict()
    values = load_settings(name, str(tmp_path / "weights.safetensors"))
    classifier = build(name, values, make_info(classes))
    fresh = copy_state(classifier)
    assert initialise(classifier, name, values).head == "new"
    for key, value in classifier.state_dict().items():
        assert torch.equal(value, fresh[key] if classifier.is_in_head(key) else left[key]), key


def test_normalisation_comes_with_the_weights(tmp_path: Path) -> None:
    save_trained(
        tmp_path, "lenet", load_settings("lenet"), DatasetInfo("old", SOME, 32, 3, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    )
    values = load_settings("lenet", str(tmp_path / "weights.safetensors"))
    classifier = build("lenet", values, make_info(["a", "b"]))
    initialise(classifier, "lenet", values)
    assert classifier.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_weights_of_other_settings_are_refused_with_what_to_set(tmp_path: Path) -> None:
    save_trained(tmp_path, "lenet", load_settings("lenet") | {"f6": 90}, make_info())
    values = load_settings("lenet", str(tmp_path / "weights.safetensors"))
    classifier = build("lenet", values, make_info(["a", "b"]))
    before = copy_state(classifier)
    message = (
        r"model\.lenet\.init: .*weights\.safetensors: the weights don't fit the settings: "
        r"f6\.weight has the shape \[90, 120\] instead of \[84, 120\]; f6\.bias .*; set f6: 90"
    )
    with pytest.raises(ConvoyError, match=message):
        initialise(classifier, "lenet", values)
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())


def test_missing_and_unknown_names_are_refused() -> None:
    classifier = build("lenet", load_settings("lenet"), make_info())
    weights = copy_state(classifier)
    weights["extra"] = weights.pop("c1.weight")
    with pytest.raises(ConvoyError, match=r"c1\.weight is missing; extra is unknown"):
        init_weights.load_matching(classifier, weights, same_classes=False)
    headless = {key: value for key, value in copy_state(classifier).items() if not key.startswith("output")}
    init_weights.load_matching(classifier, headless, same_classes=False)
    with pytest.raises(ConvoyError, match=r"output\.weight is missing"):
        init_weights.load_matching(classifier, headless, same_classes=True)


def test_first_of_many_mismatches_are_named() -> None:
    classifier = build("resnet", load_settings("resnet"), make_info())
    with pytest.raises(ConvoyError, match=r"mean is missing; .* and \d+ more$"):
        init_weights.load_matching(classifier, {}, same_classes=False)


def test_weights_for_grey_images_are_refused_for_colour(tmp_path: Path) -> None:
    save_trained(tmp_path, "lenet", load_settings("lenet"), make_info(channels=1))
    values = load_settings("lenet", str(tmp_path / "weights.safetensors"))
    with pytest.raises(ConvoyError, match=r"for images with 1 channels instead of 3: set preprocess\.channels: 1"):
        initialise(build("lenet", values, make_info()), "lenet", values)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_trained(tmp_path, "lenet", load_settings("lenet"), make_info())
    values = load_settings("resnet", str(tmp_path / "weights.safetensors"))
    with pytest.raises(ConvoyError, match="holds weights of lenet, not of resnet"):
        initialise(build("resnet", values, make_info()), "resnet", values)


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_weights_without_their_record_are_refused(content: str | None, tmp_path: Path) -> None:
    save_trained(tmp_path, "lenet", load_settings("lenet"), make_info())
    (tmp_path / "record.json").unlink()
    if content is not None:
        (tmp_path / "record.json").write_text(content)
    values = load_settings("lenet", str(tmp_path / "weights.safetensors"))
    with pytest.raises(ConvoyError, match=r"record\.json is missing or can't be read: put the record"):
        initialise(build("lenet", values, make_info()), "lenet", values)


def test_broken_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_trained(tmp_path, "lenet", load_settings("lenet"), make_info())
    (tmp_path / "weights.safetensors").write_bytes(pickle.dumps({"c1.weight": 1}))
    values = load_settings("lenet", str(tmp_path / "weights.safetensors"))
    with pytest.raises(ConvoyError, match=r"weights\.safetensors is no safetensors file"):
        initialise(build("lenet", values, make_info()), "lenet", values)


# The experiment finetune


@pytest.mark.parametrize("way", ["conf", "override"])
def test_finetune_experiment_fits_its_weights(way: str, tmp_path: Path) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    file = tmp_path / "conf" / "config.yaml"
    text = file.read_text()
    if "experiment:" not in text:
        text = text.replace("  - _self_\n", "  - _self_\n  - experiment: null\n")
    file.write_text(text)
    plain = config.compose(tmp_path)
    if way == "conf":
        file.write_text(text.replace("experiment: null", "experiment: finetune"))
    params = config.compose(tmp_path, ["experiment=finetune"] if way == "override" else [])
    assert set(params) == set(plain)  # no section of its own
    assert list(params["model"]) == ["resnet", "efficientnet_v2_s", "convnext_tiny"]
    assert params["preprocess"]["channels"] == 3
    for name, values in params["model"].items():
        models.check_settings(name, values)
        init_weights.check_init(name, values)
        assert values["init"] == "pretrained"
        assert values["recipe"]["lr"] < plain["model"]["resnet"]["recipe"]["lr"]
    values = params["model"]["resnet"]
    assert models.torchvision_name("resnet", values) == "resnet50"
