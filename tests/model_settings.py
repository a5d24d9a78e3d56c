"""Settings of the architectures for tests, composed from the project's conf/."""

import copy
import functools
from typing import Any

from convoy import models
from convoy.core import config
from small_project import ROOT


def load_model_settings(name: str) -> dict[str, Any]:
    """Return the settings of an architecture, which the caller may change."""
    return copy.deepcopy(_compose()[name])


@functools.cache
def _compose() -> dict[str, Any]:
    overrides = [f"model=[{','.join(models.names())}]", "~experiment"]
    return config.parse(config.compose_text(ROOT, overrides))["model"]
