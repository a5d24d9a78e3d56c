"""Networks for tests: every architecture with its settings in conf/, and random images for it."""

import torch
from torch import Tensor

from convoy import models
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models.base import Classifier
from model_settings import load_model_settings
from small_project import ROOT

CONF = ROOT / "conf" / "model"


def make_dataset_info(size: int = 32, channels: int = 1, classes: int = 10) -> DatasetInfo:
    return DatasetInfo(
        "test", [f"class {k}" for k in range(classes)], size, channels, [0.4] * channels, [0.2] * channels
    )


def build(name: str, seed: int = 0, **of_info: int) -> Classifier:
    torch.manual_seed(seed)
    return models.build(name, load_model_settings(name), make_dataset_info(**of_info))


def make_images(count: int = 2, size: int = 32, channels: int = 1) -> Tensor:
    return torch.randint(0, 256, (count, size, size, channels), dtype=torch.uint8)


TORCHVISION_NAMES = {
    "alexnet": "alexnet",
    "vgg11_bn": "vgg",
    "vgg16": "vgg",
    "googlenet": "googlenet",
    "resnet18": "resnet",
    "resnet50": "resnet",
}
