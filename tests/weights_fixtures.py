"""Networks and trained weights for tests of initial weights."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import get_model_weights

from convoy import models
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models.base import Classifier
from convoy.training import init_weights
from convoy.training.record import InitialWeights
from model_settings import load_model_settings
from record_factory import make_record
from small_project import ROOT

CONF = ROOT / "conf"
# Of the 1000 classes of ImageNet.
NAMES = get_model_weights("resnet18").IMAGENET1K_V1.meta["categories"]
SOME = ["cat", "dog", "owl"]


def load_settings(name: str, init: str = "scratch", torchvision_name: str = "") -> dict:
    """Load the settings in conf/model, with those of a torchvision network where one is named."""
    values = load_model_settings(name) | {"init": init}
    return values | dict(models.equivalents(name).settings[torchvision_name]) if torchvision_name else values


def make_info(classes: list[str] = SOME, channels: int = 3, size: int = 32) -> DatasetInfo:
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


def save_trained(folder: Path, name: str, values: dict, info: DatasetInfo, seed: int = 7) -> Classifier:
    """Save the weights and the record of a classifier as the train stage does."""
    classifier = build(name, values, info, seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), folder / "weights.safetensors")
    make_record(architecture=name, settings=values, dataset_info=info).save(folder / "record.json")
    return classifier
