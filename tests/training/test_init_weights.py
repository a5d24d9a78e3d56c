"""Initial weights: pretrained weights that are loaded, and those that are refused."""

import contextlib
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
import torchvision
import yaml
from mlflow.entities.model_registry import ModelVersion
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model_weights

import convoy
from convoy import models
from convoy.core import config
from convoy.core.config import validate
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models.base import Classifier
from convoy.registry import model_loader, versions
from convoy.tracking import runs
from convoy.tracking.runs import RunRecord
from convoy.tracking.store import TrackingStore, open_store
from convoy.training import init_weights
from convoy.training.record import DatasetVersion, InitialWeights
from convoy.training.torchvision_weights import make_meta_network
from model_fixtures import TORCHVISION_NAMES
from record_factory import make_record
from registry_fixtures import write_trained_files as leave_registered
from small_project import ROOT

Publish = Callable[[str, Path], Path]
CONF = ROOT / "conf"
NAMES = get_model_weights("resnet18").IMAGENET1K_V1.meta["categories"]  # of ImageNet's 1000 classes
SOME = ["cat", "dog", "owl"]


def settings(name: str, init: str = "scratch", torchvision_name: str = "") -> dict:
    """Of conf/model, or with the numbers of torchvision's `torchvision_name`."""
    values = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())[name] | {"init": init}
    return values | dict(models.equivalents(name).settings[torchvision_name]) if torchvision_name else values


def dataset_info(classes: list[str] = SOME, channels: int = 3, size: int = 32) -> DatasetInfo:
    return DatasetInfo("test", classes, size, channels, [0.4] * channels, [0.2] * channels)


def build(name: str, values: dict, info: DatasetInfo, seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return models.build(name, values, info)


def fail_if_called(init: str, folder: Path) -> str:
    raise AssertionError("MLflow was asked")


def initialise(classifier: Classifier, name: str, values: dict) -> InitialWeights:
    return init_weights.init_weights(classifier, name, values, fail_if_called)


def copy_state(classifier: Classifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in classifier.state_dict().items()}


# The head

every_architecture = pytest.mark.parametrize("name", models.names())


@every_architecture
def test_head_is_what_depends_on_the_number_of_classes(name: str) -> None:
    few, many = (build(name, settings(name), dataset_info([str(k) for k in range(count)])) for count in (3, 5))
    shapes = {key: value.shape for key, value in many.state_dict().items()}
    differ = {key for key, value in few.state_dict().items() if value.shape != shapes[key]}
    head = {key for key in shapes if few.is_in_head(key)}
    assert differ <= head
    assert all(any(few.is_in_head(key) for key in differ if key.startswith(layer)) for layer in few.head_modules)
    assert "mean" not in head
    if name != "googlenet":  # whose auxiliary classifiers are head as a whole
        assert differ == head
        assert len(head) == 2


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

    values = settings(name, "pretrained", torchvision_name)
    ours = build(name, values, dataset_info(NAMES, size=224)).eval()
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
                    name, settings(name, torchvision_name=torchvision_name), dataset_info(NAMES, size=224)
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
        values = settings("resnet", str(tmp_path / f"{number}.pth"), "resnet18")
        classifier = build("resnet", values, dataset_info())
        initialise(classifier, "resnet", values)
        found.append(classifier.state_dict())
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_torchvision_file_of_other_classes_gives_its_backbone(tmp_path: Path) -> None:
    theirs = build_torchvision("resnet18", classes=7)
    torch.save(theirs.state_dict(), tmp_path / "mine.pth")
    values = settings("resnet", str(tmp_path / "mine.pth"), "resnet18")
    classifier = build("resnet", values, dataset_info())
    fresh = classifier.classifier.weight.clone()
    record = initialise(classifier, "resnet", values)
    assert (record.source, record.head) == (str(tmp_path / "mine.pth"), "new")
    assert torch.equal(classifier.stem[0].weight, theirs.conv1.weight)
    assert torch.equal(classifier.classifier.weight, fresh)


@pytest.mark.parametrize("order", ["other names", "another order"])
def test_imagenet_weights_for_other_classes_get_a_new_head(order: str, publish: Publish, tmp_path: Path) -> None:
    publish("resnet18", save(build_torchvision("resnet18").state_dict(), tmp_path / "weights.pth"))
    values = settings("resnet", "pretrained", "resnet18")
    classifier = build("resnet", values, dataset_info(SOME if order == "other names" else NAMES[::-1]))
    fresh = classifier.classifier.weight.clone()
    assert initialise(classifier, "resnet", values).head == "new"
    assert torch.equal(classifier.classifier.weight, fresh)


def test_auxiliary_classifiers_of_torchvision_are_not_loaded(publish: Publish, tmp_path: Path) -> None:
    publish("googlenet", save(build_torchvision("googlenet").state_dict(), tmp_path / "weights.pth"))
    values = settings("googlenet", "pretrained", "googlenet")
    classifier = build("googlenet", values, dataset_info(size=64))
    before = copy_state(classifier)
    initialise(classifier, "googlenet", values)
    changed = {key for key, value in classifier.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert not any(key.startswith(("auxiliary", "classifier")) for key in changed)
    assert classifier.mean.flatten().tolist() == [0.5, 0.5, 0.5]


def test_offline_message_names_the_file_and_its_target_folder(cache: Path) -> None:
    values = settings("resnet", "pretrained", "resnet18")
    with pytest.raises(ConvoyError) as refusal:
        initialise(build("resnet", values, dataset_info()), "resnet", values)
    message = str(refusal.value)
    assert message.startswith("model.resnet.init: https://download.pytorch.org/models/resnet18-")
    assert "no network" in message
    assert f"put that file into {cache} by hand" in message
    assert list(cache.iterdir()) == []


def test_download_is_verified_by_its_checksum(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (answer := tmp_path / "answer").write_bytes(b"something else")
    monkeypatch.setattr("torch.hub.urlopen", lambda *_: urlopen(answer.as_uri()))
    values = settings("resnet", "pretrained", "resnet18")
    with pytest.raises(ConvoyError, match="invalid hash value"):
        initialise(build("resnet", values, dataset_info()), "resnet", values)
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
    values = settings(name, "pretrained" if place == "cache" else str(file), torchvision_name)
    classifier = build(name, values, dataset_info(size=224))
    before = copy_state(classifier)
    with pytest.raises(ConvoyError) as refusal:
        initialise(classifier, name, values)
    expected, message = published.stem[-8:], str(refusal.value)
    assert message.startswith(f"model.{name}.init: {file} is damaged, or not the file that torchvision published")
    assert f"its sha256 begins with {sha256(file)[:8]} instead of {expected}. Remove it, and" in message
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())


def test_flipped_bit_in_published_weights_is_detected(publish: Publish, tmp_path: Path) -> None:
    file = publish("resnet18", save(build_torchvision("resnet18").state_dict(), tmp_path / "weights.pth"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    values = settings("resnet", "pretrained", "resnet18")
    with pytest.raises(ConvoyError, match="is damaged, or not the file that torchvision published"):
        initialise(build("resnet", values, dataset_info()), "resnet", values)


def test_file_of_the_user_is_recorded_as_not_verified(tmp_path: Path) -> None:
    file = save(build_torchvision("resnet18", classes=3).state_dict(), tmp_path / "resnet18-20240131.pth")
    values = settings("resnet", str(file), "resnet18")
    record = initialise(build("resnet", values, dataset_info()), "resnet", values)
    assert (record.sha256, record.verified) == (sha256(file), False)


def test_settings_unknown_to_torchvision_are_refused_with_a_fix() -> None:
    message = (
        r"model\.resnet\.init: torchvision has no resnet with these settings; for its resnet18 set "
        r"widths: \[64, 128, 256, 512\], stem_kernel: 7, stem_stride: 2"
    )
    with pytest.raises(ConvoyError, match=message):
        init_weights.check_init("resnet", settings("resnet", "pretrained"))


def test_lenet_has_no_weights_from_imagenet() -> None:
    with pytest.raises(ConvoyError, match=r"model\.lenet\.init: torchvision has no lenet .* set init: scratch"):
        init_weights.check_init("lenet", settings("lenet", "pretrained"))


def test_grey_images_are_refused_before_anything_is_downloaded(cache: Path) -> None:
    values = settings("resnet", "pretrained", "resnet18")
    with pytest.raises(ConvoyError, match=r"for images with 3 channels instead of 1: set preprocess\.channels: 3"):
        initialise(build("resnet", values, dataset_info(channels=1)), "resnet", values)


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
    values = settings("resnet", "pretrained" if place == "cache" else str(file), "resnet18")
    classifier = build("resnet", values, dataset_info())
    with pytest.raises(ConvoyError, match="is no file of plain weights, and no code in it was run"):
        initialise(classifier, "resnet", values)
    assert not fired.exists()
    with contextlib.suppress(RuntimeError):
        torch.load(file, weights_only=False)  # what the refusal is for
    assert fired.exists()


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04", b"<html>"])
def test_broken_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.pth").write_bytes(content)
    values = settings("resnet", str(tmp_path / "broken.pth"), "resnet18")
    with pytest.raises(ConvoyError, match=r"model\.resnet\.init: .*broken\.pth is no file of plain weights"):
        initialise(build("resnet", values, dataset_info()), "resnet", values)


@pytest.mark.parametrize("content", [{"state_dict": {}, "epoch": 3}, [torch.zeros(1)], torch.zeros(1)])
def test_file_of_more_than_tensors_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    values = settings("resnet", str(tmp_path / "other.pth"), "resnet18")
    with pytest.raises(ConvoyError, match="holds other objects than tensors"):
        initialise(build("resnet", values, dataset_info()), "resnet", values)


def test_file_of_another_torchvision_network_is_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3, 512), "fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    values = settings("resnet", str(tmp_path / "other.pth"), "resnet18")
    with pytest.raises(
        ConvoyError, match=r"other\.pth does not hold the weights of torchvision's resnet18 .*conv1\.weight"
    ):
        initialise(build("resnet", values, dataset_info()), "resnet", values)


@pytest.mark.parametrize("init", ["pretraind", "0123abc", "", "weights"])
def test_mistyped_init_is_refused_with_what_it_may_be(init: str) -> None:
    with pytest.raises(ConvoyError, match=r"model\.lenet\.init='.*': it may be scratch, pretrained, champion"):
        init_weights.check_init("lenet", settings("lenet", init))


def test_file_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ConvoyError, match=r"model\.lenet\.init: there is no file old/weights\.safetensors"):
        init_weights.check_init("lenet", settings("lenet", "old/weights.safetensors"))


# From our own files


def save_trained(folder: Path, name: str, values: dict, info: DatasetInfo, seed: int = 7) -> Classifier:
    """A trained classifier's weights and record, as the train stage leaves them."""
    classifier = build(name, values, info, seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), folder / "weights.safetensors")
    make_record(architecture=name, settings=values, dataset_info=info).save(folder / "record.json")
    return classifier


def test_scratch_leaves_the_initial_weights() -> None:
    classifier = build("lenet", settings("lenet"), dataset_info())
    before = copy_state(classifier)
    assert initialise(classifier, "lenet", settings("lenet")) == InitialWeights("scratch")
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())


@every_architecture
def test_all_weights_are_loaded_for_the_same_classes(name: str, tmp_path: Path) -> None:
    left = save_trained(tmp_path, name, settings(name), dataset_info())
    values = settings(name, str(tmp_path / "weights.safetensors"))
    classifier = build(name, values, dataset_info())
    record = initialise(classifier, name, values)
    assert record.head == "kept"
    found = classifier.state_dict()
    assert all(torch.equal(found[key], value) for key, value in left.state_dict().items())


@every_architecture
@pytest.mark.parametrize("classes", [SOME[::-1], ["a", "b", "c"], [*SOME, "elk"]], ids=["order", "names", "number"])
def test_all_weights_but_the_head_are_loaded_for_other_classes(name: str, classes: list[str], tmp_path: Path) -> None:
    left = save_trained(tmp_path, name, settings(name), dataset_info()).state_dict()
    values = settings(name, str(tmp_path / "weights.safetensors"))
    classifier = build(name, values, dataset_info(classes))
    fresh = copy_state(classifier)
    assert initialise(classifier, name, values).head == "new"
    for key, value in classifier.state_dict().items():
        assert torch.equal(value, fresh[key] if classifier.is_in_head(key) else left[key]), key


def test_normalisation_comes_with_the_weights(tmp_path: Path) -> None:
    save_trained(
        tmp_path, "lenet", settings("lenet"), DatasetInfo("old", SOME, 32, 3, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    )
    values = settings("lenet", str(tmp_path / "weights.safetensors"))
    classifier = build("lenet", values, dataset_info(["a", "b"]))
    initialise(classifier, "lenet", values)
    assert classifier.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_weights_of_other_settings_are_refused_with_what_to_set(tmp_path: Path) -> None:
    save_trained(tmp_path, "lenet", settings("lenet") | {"f6": 90}, dataset_info())
    values = settings("lenet", str(tmp_path / "weights.safetensors"))
    classifier = build("lenet", values, dataset_info(["a", "b"]))
    before = copy_state(classifier)
    message = (
        r"model\.lenet\.init: .*weights\.safetensors: the weights don't fit the settings: "
        r"f6\.weight has the shape \[90, 120\] instead of \[84, 120\]; f6\.bias .*; set f6: 90"
    )
    with pytest.raises(ConvoyError, match=message):
        initialise(classifier, "lenet", values)
    assert all(torch.equal(value, before[key]) for key, value in classifier.state_dict().items())


def test_missing_and_unknown_names_are_refused() -> None:
    classifier = build("lenet", settings("lenet"), dataset_info())
    weights = copy_state(classifier)
    weights["extra"] = weights.pop("c1.weight")
    with pytest.raises(ConvoyError, match=r"c1\.weight is missing; extra is unknown"):
        init_weights.load_matching(classifier, weights, same_classes=False)
    headless = {key: value for key, value in copy_state(classifier).items() if not key.startswith("output")}
    init_weights.load_matching(classifier, headless, same_classes=False)
    with pytest.raises(ConvoyError, match=r"output\.weight is missing"):
        init_weights.load_matching(classifier, headless, same_classes=True)


def test_first_of_many_mismatches_are_named() -> None:
    classifier = build("resnet", settings("resnet"), dataset_info())
    with pytest.raises(ConvoyError, match=r"mean is missing; .* and \d+ more$"):
        init_weights.load_matching(classifier, {}, same_classes=False)


def test_weights_for_grey_images_are_refused_for_colour(tmp_path: Path) -> None:
    save_trained(tmp_path, "lenet", settings("lenet"), dataset_info(channels=1))
    values = settings("lenet", str(tmp_path / "weights.safetensors"))
    with pytest.raises(ConvoyError, match=r"for images with 1 channels instead of 3: set preprocess\.channels: 1"):
        initialise(build("lenet", values, dataset_info()), "lenet", values)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_trained(tmp_path, "lenet", settings("lenet"), dataset_info())
    values = settings("resnet", str(tmp_path / "weights.safetensors"))
    with pytest.raises(ConvoyError, match="holds weights of lenet, not of resnet"):
        initialise(build("resnet", values, dataset_info()), "resnet", values)


@pytest.mark.parametrize("content", [None, "", "[]", "{}"])
def test_weights_without_their_record_are_refused(content: str | None, tmp_path: Path) -> None:
    save_trained(tmp_path, "lenet", settings("lenet"), dataset_info())
    (tmp_path / "record.json").unlink()
    if content is not None:
        (tmp_path / "record.json").write_text(content)
    values = settings("lenet", str(tmp_path / "weights.safetensors"))
    with pytest.raises(ConvoyError, match=r"record\.json is missing or can't be read: put the record"):
        initialise(build("lenet", values, dataset_info()), "lenet", values)


def test_broken_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_trained(tmp_path, "lenet", settings("lenet"), dataset_info())
    (tmp_path / "weights.safetensors").write_bytes(pickle.dumps({"c1.weight": 1}))
    values = settings("lenet", str(tmp_path / "weights.safetensors"))
    with pytest.raises(ConvoyError, match=r"weights\.safetensors is no safetensors file"):
        initialise(build("lenet", values, dataset_info()), "lenet", values)


# From MLflow

VERSIONS = ["lenet", "resnet", "lenet"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingStore]:
    """A store with three versions of a model: a lenet, a resnet and another lenet."""
    root = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with open_store(root, "convoy") as store:
            package = Path(convoy.__file__).parent
            for number, name in enumerate(VERSIONS, start=1):
                folder = root / str(number)
                save_trained(folder, name, settings(name), dataset_info(), seed=number)
                versions.register(
                    store,
                    name="convoy",
                    run_id=log_run(store, name, folder),
                    identity=str(number),
                    model=package / "inference/pyfunc_model.py",
                    files={"record": folder / "record.json", "weights": folder / "weights.safetensors"},
                    code=package,
                    step=1,
                )
            yield store


def log_run(
    store: TrackingStore, name: str, folder: Path, files: tuple[str, ...] = ("record.json", "weights.safetensors")
) -> str:
    data = DatasetVersion("digits", "a99769f9303d", "data.dvc", {"images": 1797})
    run = RunRecord(
        name=name,
        params={"model": name},
        tags={runs.IDENTITY: str(folder)},
        origin={},
        data=data,
        history=[{"epoch": 1, "val_accuracy": 0.5}],
        files=[folder / file for file in files],
        status="FINISHED",
    )
    return runs.sync_run(store, run, "results", moment=0)


def init_from_store(store: TrackingStore, name: str, values: dict) -> tuple[Classifier, dict[str, str]]:
    classifier = build(name, values, dataset_info(["a", "b"]))
    record = init_weights.init_weights(
        classifier,
        name,
        values,
        lambda init, folder: model_loader.fetch_weights(store, "convoy", name, init, folder),
    )
    return classifier, record


@pytest.mark.parametrize(
    ("name", "champion", "version"), [("lenet", None, 3), ("lenet", 1, 1), ("lenet", 2, 3), ("resnet", 1, 2)]
)
def test_champion_or_newest_version_is_used(
    store: TrackingStore, name: str, champion: int | None, version: int
) -> None:
    store.client.delete_registered_model_alias("convoy", "champion")
    if champion:
        store.client.set_registered_model_alias("convoy", "champion", str(champion))
    classifier, record = init_from_store(store, name, settings(name, "champion"))
    left = build(name, settings(name), dataset_info(), seed=version).state_dict()
    body = {key: value for key, value in classifier.state_dict().items() if not classifier.is_in_head(key)}
    assert all(torch.equal(left[key], value) for key, value in body.items())
    assert (record.init, record.head, record.verified) == ("champion", "new", True)
    assert record.source.startswith(f"version {version} of model convoy, of run ")


def test_unregistered_architecture_is_refused(store: TrackingStore) -> None:
    message = r"model\.alexnet\.init: .* no version of model convoy of architecture alexnet \(there are lenet, resnet\)"
    with pytest.raises(ConvoyError, match=message):
        init_from_store(store, "alexnet", settings("alexnet", "champion"))


def test_before_any_model_is_registered_there_is_no_champion(store: TrackingStore, tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match=r"\(there is none at all\): set init: scratch"):
        model_loader.fetch_weights(store, "another", "lenet", "champion", tmp_path)


def test_run_gives_its_weights(store: TrackingStore, tmp_path: Path) -> None:
    left = save_trained(tmp_path, "lenet", settings("lenet"), dataset_info(["a", "b"]), seed=9)
    run = log_run(store, "lenet", tmp_path)
    classifier, record = init_from_store(store, "lenet", settings("lenet", run))
    assert (record.source, record.head) == (f"run {run}", "kept")
    found = classifier.state_dict()
    assert all(torch.equal(found[key], value) for key, value in left.state_dict().items())


def test_run_of_another_architecture_is_refused(store: TrackingStore, tmp_path: Path) -> None:
    save_trained(tmp_path, "lenet", settings("lenet"), dataset_info())
    with pytest.raises(ConvoyError, match="holds weights of lenet, not of resnet"):
        init_from_store(store, "resnet", settings("resnet", log_run(store, "lenet", tmp_path)))


def test_run_that_is_not_there_or_holds_no_weights_is_refused(store: TrackingStore, tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match=rf"model\.lenet\.init: MLflow has no run {'0' * 32}"):
        init_from_store(store, "lenet", settings("lenet", "0" * 32))
    save_trained(tmp_path, "lenet", settings("lenet"), dataset_info())
    run = log_run(store, "lenet", tmp_path, ("record.json",))
    with pytest.raises(ConvoyError, match=rf"run {run} holds no weights\.safetensors"):
        init_from_store(store, "lenet", settings("lenet", run))


# No message names a temporary folder, which is gone when it is read


@pytest.mark.parametrize("file", ["record.json", "weights.safetensors", "calibration.json"])
@pytest.mark.parametrize(
    "use", [model_loader.load, lambda version: model_loader.verify(version, np.empty(0), np.empty(0))]
)
def test_broken_registered_model_is_named_by_its_uri(
    use: Callable[[ModelVersion], object], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch_broken(version: ModelVersion, folder: Path, files: object = ()) -> None:
        leave_registered(folder / "artifacts")
        (folder / "artifacts" / file).write_text("[]")

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(model_loader, "fetch", fetch_broken)
    with pytest.raises(ConvoyError) as refusal:
        use(ModelVersion("convoy", "3", 0))
    assert str(refusal.value).startswith(f"models:/convoy/3/artifacts/{file}")
    assert "scratch" not in str(refusal.value)


@pytest.mark.parametrize("file", ["record.json", "weights.safetensors"])
@pytest.mark.parametrize("architecture", ["lenet", "resnet"])
def test_broken_weights_of_a_run_are_named_by_the_run(
    file: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bring_broken(init: str, folder: Path) -> str:
        save_trained(folder, "lenet", settings("lenet"), dataset_info())
        if architecture == "lenet":
            (folder / file).write_text("[]")
        return f"run {init}"

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    values = settings(architecture, "0" * 32)
    with pytest.raises(ConvoyError) as refusal:
        init_weights.init_weights(build(architecture, values, dataset_info()), architecture, values, bring_broken)
    assert f"of run {'0' * 32}" in str(refusal.value)
    assert "scratch/" not in str(refusal.value)


# The settings in one word


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
    assert list(params["model"]) == ["resnet"]
    assert params["preprocess"]["channels"] == 3
    assert params["train"]["max_epochs"] < plain["train"]["max_epochs"]
    values = params["model"]["resnet"]
    recipe = validate(models.schema("resnet"), values, "model.resnet").recipe  # type: ignore[attr-defined]
    assert recipe.body_lr < 1
    init_weights.check_init("resnet", values)
    assert values["init"] == "pretrained"
    assert models.torchvision_name("resnet", values) == "resnet18"
