"""Settings of the networks for tests, composed from the project's conf/."""

import copy
import functools
from typing import Any

import pytest

from convoy import models
from convoy.core import config
from small_project import ROOT

NETWORKS = sorted(file.stem for file in (ROOT / "conf/model").glob("*.yaml"))
# Settings that make networks small enough for tests: timm's ConvNeXt and EfficientNet take their widths, torchvision's
# do not, and the class is the one that vit_b_16 builds.
SHRUNK: dict[str, dict[str, Any]] = {
    "convnext_tiny": {
        "builder": "timm/convnext_tiny",
        "arguments": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "patch_size": 2},
    },
    "efficientnet_v2_s": {
        "builder": "timm/efficientnetv2_s",
        "arguments": {"channel_multiplier": 0.1, "depth_multiplier": 0.1},
    },
    "mobilenet_v3_small": {"arguments": {"width_mult": 0.25}},
    "vit_b_16": {
        "builder": "torchvision/VisionTransformer",
        "arguments": {"patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32},
    },
}
FAST = {*models.names(), "convnext_tiny", "vit_b_16"}
every_network = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NETWORKS]
)


def load_model_settings(name: str) -> dict[str, Any]:
    """Return the settings of a network, shrunk where it is large; the caller may change them."""
    settings = copy.deepcopy(_compose()[name]) | copy.deepcopy(SHRUNK.get(name, {}))
    return settings | {"size": 32}


@functools.cache
def _compose() -> dict[str, Any]:
    overrides = [f"model=[{','.join(NETWORKS)}]", "~experiment"]
    return config.parse(config.compose_text(ROOT, overrides))["model"]
