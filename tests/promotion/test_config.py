"""Promotion settings: how models are named, and what they are compared by."""

import shutil
from pathlib import Path

import pytest
import yaml

from convoy.core import config
from convoy.core.config import validate
from convoy.core.errors import ConvoyError
from convoy.data.sources.base import DatasetConfig
from convoy.promotion import champion
from convoy.promotion.config import RegisterConfig
from convoy.recipe import TrainConfig
from convoy.tracking.store import open_store
from small_project import ROOT

SETTINGS = yaml.safe_load((ROOT / "conf/config.yaml").read_text())
REGISTER = SETTINGS["register"] | {"selection_metric": "accuracy"}


def is_accepted(name: object) -> tuple[bool, bool]:
    """Whether it may be the name of a data set, and of a registered model."""
    dataset = {"name": name, "longest_side": 9, "group": None}
    kinds = ((DatasetConfig, dataset, "dataset"), (RegisterConfig, {**REGISTER, "name": name}, "register"))
    found = []
    for kind, values, section in kinds:
        try:
            validate(kind, values, section)
            found.append(True)
        except ConvoyError as error:
            assert str(error).startswith(f"{section}.name=")
            found.append(False)
    return found[0], found[1]


ODD = ["7", "007", "my pets", "a.b-c_d", "_pets", "Köln", "हिन्दी", "数字", "no", "null", "v1", "champion", "x" * 60]
REFUSED = [
    "",
    " ",
    "a/b",
    "a\\b",
    "a:b",
    "a@b",
    "it's",
    "-pets",
    ".pets",
    "pets ",
    "a\nb",
    "x" * 61,
    "Default",
    "a.moving",
    7,
]


@pytest.mark.parametrize("name", ODD)
def test_unusual_dataset_names_are_valid_model_names(
    name: str, tmp_path: Path, empty_database: Path, embedded_store: None
) -> None:
    assert is_accepted(name) == (True, True)
    shutil.copy(empty_database, tmp_path)
    with open_store(tmp_path, name) as store:
        store.client.create_registered_model(name)
        store.client.create_model_version(name, source=(tmp_path / "mlartifacts").as_uri())
        champion.set_champion(
            store, name, champion.PromotionEvent(champion.utc_now(), "promotion", None, 1, "ada", "", "better")
        )
        assert champion.current_version(store, name) == 1
    with open_store(tmp_path, name) as store:
        assert store.experiment.name == name


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_mlflow_could_not_keep_are_refused_for_both(name: object) -> None:
    assert is_accepted(name) == (False, False)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "digits"),
        (["dataset.name=pets"], "pets"),
        (["dataset=mnist"], "mnist"),
        (["register.name=convoy"], "convoy"),
    ],
)
def test_model_is_called_as_its_data_set(overrides: list[str], name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    assert config.compose(tmp_path, overrides)["register"]["name"] == name


def test_one_setting_selects_epoch_challenger_and_champion(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    composed = config.compose(tmp_path, ["train.selection_metric=macro_f1"])
    assert composed["register"]["selection_metric"] == "macro_f1"
    assert validate(TrainConfig, composed["train"], "train").selection_metric == "macro_f1"
    with pytest.raises(ConvoyError, match=r"train\.selection_metric='f1': input should be 'accuracy', 'balanced_acc"):
        validate(TrainConfig, composed["train"] | {"selection_metric": "f1"}, "train")
