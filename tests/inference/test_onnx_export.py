"""ONNX export: the file predicts as the predictor does, or is not created."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from convoy import models
from convoy.core.errors import ConvoyError
from convoy.inference import onnx_export
from convoy.inference.onnx_export import OnnxWrapper
from convoy.inference.predictor import Predictor
from convoy.models.base import Classifier
from convoy.registry.verification import TOLERANCE
from model_fixtures import TORCHVISION_NAMES, build, make_dataset_info, make_images
from model_settings import every_network, load_model_settings


def make_network(name: str, torchvision_name: str = "", **of_info: int) -> Predictor:
    """An untrained network, or one with the settings of a torchvision network, whose layers all do something."""
    torch.manual_seed(0)
    values = load_model_settings(name) | (
        models.equivalents(name).settings[torchvision_name] if torchvision_name else {}
    )
    classifier = models.build(name, values, make_dataset_info(**of_info)).eval()
    for layer in classifier.modules():
        if isinstance(layer, nn.BatchNorm2d):  # fresh ones hardly do anything
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    weights = classifier.state_dict()
    last = [key for key in weights if classifier.is_in_head(key) and "auxiliary" not in key and weights[key].ndim == 2]
    head = nn.init.normal_(weights[last[-1]], std=0.1)  # fresh output layers hardly prefer a class
    with torch.inference_mode():
        spread = classifier(make_images(4, classifier.info.size, classifier.info.channels)).std()
        head.mul_((1 / spread).clamp(min=1))  # the features of some networks are small
    return Predictor(name, classifier.info, classifier, temperature=0.6)


@every_network
def test_onnx_file_predicts_any_batch_as_the_predictor_does(name: str, tmp_path: Path) -> None:
    predictor, file = make_network(name, channels=3, classes=5), tmp_path / "here" / "model.onnx"
    file.parent.mkdir()
    onnx_export.export(predictor, file)
    alone = file.rename(tmp_path / "alone.onnx")  # where no weights can lie beside it
    for count in (1, 2, 3, onnx_export.BATCH_SIZE + 1):
        pixels = make_images(count, channels=3).numpy()
        expected = predictor.probabilities(pixels)
        assert expected.std() > 0.01
        assert onnx_export.max_difference(alone, pixels, expected) < 1e-5
    assert list(file.parent.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("torchvision_name", ["alexnet", "vgg11_bn", "googlenet", "resnet18", "resnet50"])
def test_network_for_imagenet_exports_too(torchvision_name: str, tmp_path: Path) -> None:
    predictor = make_network(TORCHVISION_NAMES[torchvision_name], torchvision_name, size=224, channels=3)
    pixels = make_images(3, 224, channels=3).numpy()
    expected = predictor.probabilities(pixels)
    assert expected.std() > 0.01
    onnx_export.export(predictor, tmp_path / "model.onnx")
    # sums over so many numbers are rounded otherwise on each machine: 1.001e-5 was seen
    assert onnx_export.max_difference(tmp_path / "model.onnx", pixels, expected) < TOLERANCE


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("exported") / "model.onnx"
    onnx_export.export(make_network("lenet", size=36, classes=3), file)
    return file


def test_onnx_file_describes_its_inputs_and_outputs(onnx_file: Path) -> None:
    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    told = [(end.name, end.shape, end.type) for end in (*session.get_inputs(), *session.get_outputs())]
    assert told == [
        ("pixels", ["N", 36, 36, 1], "tensor(uint8)"),
        ("probabilities", ["N", 3], "tensor(float)"),
        ("feature_maps", ["N", 16, 12, 12], "tensor(float)"),
    ]
    meta = session.get_modelmeta()
    explained = dict(meta.custom_metadata_map)
    assert json.loads(explained.pop("classes")) == ["class 0", "class 1", "class 2"]
    numbers = {"size": "36", "channels": "1", "longest_side": "4096"}
    assert explained == {"architecture": "lenet", "dataset": "test", "feature_maps": "c3", **numbers}
    assert meta.description.startswith("pixels (N, 36, 36, 1) uint8: the middle square of an upright grey image")
    onnx.checker.check_model(onnx_file, full_check=True)


@every_network
def test_last_feature_maps_show_places(name: str) -> None:
    predictor, pixels = make_network(name, channels=3, classes=5), make_images(2, channels=3)
    wrapper = OnnxWrapper(predictor, pixels)
    maps = wrapper(pixels)[wrapper.outputs.index("feature_maps")]
    assert maps.shape[1:] == wrapper.map_shape
    assert min(wrapper.map_shape[1:]) >= onnx_export.MIN_MAP_SIZE
    assert maps.std() > 0
    assert wrapper.layer in wrapper.describe_maps()


@pytest.mark.parametrize("name", ["googlenet", "resnet"])
def test_class_weights_give_the_logit_from_the_maps(name: str) -> None:
    predictor, pixels = make_network(name, size=96, channels=3, classes=5), make_images(4, 96, channels=3)
    wrapper = OnnxWrapper(predictor, pixels)
    assert wrapper.outputs == ["probabilities", "feature_maps", "class_weights"]
    probabilities, maps, weights = wrapper(pixels)
    head = [layer for layer in predictor.classifier.modules() if isinstance(layer, nn.Linear)][-1]
    evidence = (maps.mean((2, 3)) * weights).sum(dim=1) + head.bias[probabilities.argmax(dim=1)]
    torch.testing.assert_close(evidence, predictor.classifier(pixels).max(dim=1).values, rtol=1e-3, atol=1e-3)


def test_onnx_file_contains_no_source_line_and_no_path(onnx_file: Path) -> None:
    content = onnx_file.read_bytes()
    assert [word for word in (b".py", b"def ", b"return ", b"File ", str(Path.cwd()).encode()) if word in content] == []


def test_same_predictor_gives_a_bit_identical_file(onnx_file: Path, tmp_path: Path) -> None:
    onnx_export.export(make_network("lenet", size=36, classes=3), tmp_path / "again.onnx")
    digests = [hashlib.sha256(each.read_bytes()).hexdigest() for each in (onnx_file, tmp_path / "again.onnx")]
    assert digests[0] == digests[1]


# Where it does not export, or does not agree


class Strange(Classifier):
    """A network that does to its images what it is told."""

    def __init__(self, what: str) -> None:
        super().__init__(build("lenet").info, build("lenet").recipe)
        self.what = what

    def logits(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3)) + torch.linspace(0, 1, 10) * x.amax((2, 3))  # (N, 10)
        if self.what == "decide by numbers" and means.sum() > 0:
            return -means
        if self.what == "ask for what ONNX has not":
            return means + torch.linalg.eigvals(x[:, 0]).real[:, :10]
        if self.what == "be another then" and torch.compiler.is_exporting():
            return means * 2
        return means


def make_strange_predictor(what: str) -> Predictor:
    network = Strange(what).eval()
    return Predictor("strange", network.info, network, 1.0)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("decide by numbers", "Could not guard on data-dependent expression"),
        ("ask for what ONNX has not", "No ONNX function found for .*linalg_eig"),
    ],
)
def test_export_failure_is_one_line_with_the_reason(
    what: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConvoyError, match=rf"^torch can't export it \({said}") as refusal:
        onnx_export.export(make_strange_predictor(what), tmp_path / "model.onnx")
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 250
    assert capfd.readouterr() == ("", "")


def test_wrongly_exported_network_is_detected(tmp_path: Path) -> None:
    predictor, pixels = make_strange_predictor("be another then"), make_images(8).numpy()
    onnx_export.export(predictor, tmp_path / "model.onnx")
    assert onnx_export.max_difference(tmp_path / "model.onnx", pixels, predictor.probabilities(pixels)) > 0.001


def test_onnx_file_with_other_predictions_is_detected(onnx_file: Path) -> None:
    pixels = make_images(40, size=36).numpy()
    expected = make_network("lenet", size=36, classes=3).probabilities(pixels)
    assert onnx_export.max_difference(onnx_file, pixels, expected) < 1e-6
    other = expected.copy()
    other[-1, 0] += 0.002  # of the last image, in the second batch
    assert onnx_export.max_difference(onnx_file, pixels, other) == pytest.approx(0.002, abs=1e-6)
    assert onnx_export.max_difference(onnx_file, pixels, expected[:, :2]) == float("inf")
    assert not onnx_export.max_difference(onnx_file, pixels, expected * np.nan) <= 1


def test_invalid_or_mismatched_onnx_file_is_one_line(
    onnx_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "model.onnx"
    broken.write_bytes(onnx_file.read_bytes()[:-1000])
    for given, size in ((broken, 36), (onnx_file, 32)):
        with pytest.raises(ConvoyError, match=r"^onnxruntime can't run model.onnx \(") as refusal:
            onnx_export.max_difference(given, make_images(2, size=size).numpy(), np.zeros((2, 3)))
        assert len(str(refusal.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")
