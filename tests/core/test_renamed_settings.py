"""Renamed settings: an old name is refused, with the new one in the message, wherever it may be written."""

import re
import shutil
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from convoy.core import config
from convoy.core.errors import ConvoyError
from convoy.core.renamed_settings import RENAMED_SETTINGS, list_keys, refuse_old_names, rename_model_settings
from pipeline.check_settings import check_settings
from small_project import ROOT

every_renaming = pytest.mark.parametrize(
    ("old", "new"), [(old.replace("*", "lenet"), new) for old, new in RENAMED_SETTINGS.items()]
)


def nest(key: str) -> dict[str, Any]:
    """Return nested tables that hold the value 1 at a dotted key."""
    return reduce(lambda value, name: {name: value}, reversed(key.split(".")), 1)  # type: ignore[arg-type, return-value]


def describe(old: str, new: str, origin: str) -> str:
    return f"^{re.escape(f'{origin}: {old} is called {new} now')}$"


@every_renaming
@pytest.mark.parametrize("prefix", ["", "+", "++", "~"])
def test_old_name_in_an_override_is_refused(old: str, new: str, prefix: str) -> None:
    with pytest.raises(ConvoyError, match=describe(old, new, "override")):
        config.compose_text(ROOT, [f"{prefix}{old}=1"])


@every_renaming
def test_old_name_in_params_yaml_is_refused(old: str, new: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(nest(old)))
    with pytest.raises(ConvoyError, match=describe(old, new, "params.yaml")):
        config.load(tmp_path / "params.yaml")


@every_renaming
def test_old_name_in_conf_is_refused(old: str, new: str) -> None:
    with pytest.raises(ConvoyError, match=describe(old, new, "conf/")):
        check_settings(nest(old))


def test_every_old_name_in_an_experiment_is_listed(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "conf/experiment/mine.yaml").write_text(
        "# @package _global_\nseed: 2\nmodel:\n  lenet: {recipe: {clip_norm: 1.0, augment: {flip: true}}}\n"
    )
    with pytest.raises(ConvoyError) as refusal:
        config.compose(tmp_path, ["experiment=mine"], check_settings)
    assert sorted(str(refusal.value).splitlines()) == [
        "conf/: model.lenet.recipe.augment.flip is called hflip now",
        "conf/: model.lenet.recipe.clip_norm is called grad_clip_norm now",
        "conf/: seed is called train.seed and split.seed now",
    ]


def test_new_names_are_settings_and_are_not_refused() -> None:
    keys = set(list_keys(config.load(ROOT / "params.yaml")))
    refuse_old_names(keys, "params.yaml")
    for old, new in RENAMED_SETTINGS.items():
        section = old.replace("*", "lenet").rpartition(".")[0]
        # a name with a dot is in another section
        names = new.split(" and ")
        assert {name if "." in name else f"{section}.{name}" for name in names} <= keys


def test_settings_of_an_architecture_are_renamed() -> None:
    old = {"pool": 3, "recipe": {"lr": 0.1, "ema": 0.9, "balance": "loss", "augment": {"flip": True, "mixup": 0.2}}}
    assert rename_model_settings(old) == {
        "pool": 3,
        "recipe": {
            "lr": 0.1,
            "ema_decay": 0.9,
            "class_balance": "weighted_loss",
            "augment": {"hflip": True, "mixup": 0.2},
        },
    }
