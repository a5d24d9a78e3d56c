"""The look into a network: where it sees evidence for a class, and where it sees none."""

import numpy as np
import torch
from torch import Tensor, nn

from convoy.models.base import Classifier
from convoy.reporting.inspection import compute_grad_cam
from model_fixtures import build, make_dataset_info


class Brightness(Classifier):
    """A network that takes light images for class 0 and dark ones for class 1."""

    def __init__(self) -> None:
        super().__init__(make_dataset_info(size=8, classes=2), build("lenet").recipe)
        self.maps = nn.Conv2d(1, 1, 1, bias=False)
        self.classifier = nn.Linear(1, 2, bias=False)
        nn.init.ones_(self.maps.weight)
        with torch.no_grad():
            self.classifier.weight.copy_(torch.tensor([[1.0], [-1.0]]))

    def logits(self, x: Tensor) -> Tensor:
        return self.classifier(self.maps(x).mean((2, 3)))


def test_evidence_is_where_the_image_speaks_for_the_class() -> None:
    pixels = np.zeros((8, 8, 1), np.uint8)
    pixels[2:4, 5:7] = 255
    evidence, layer = compute_grad_cam(Brightness().eval(), np.stack([pixels, pixels]), np.array([0, 1]))
    assert layer == "maps"
    light = pixels[..., 0] > 0
    # What is dark speaks for class 1, and against class 0.
    assert np.array_equal(evidence, np.stack([light, ~light]))
