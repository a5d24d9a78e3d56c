"""Settings: errors name the full dotted key, and composing never damages params.yaml."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from convoy import models
from convoy.core import config
from convoy.core.config import Fraction, NonNegativeInt, PositiveInt, check_sections, validate
from convoy.core.errors import ConvoyError
from convoy.data.preprocessing import PreprocessConfig
from convoy.data.sources.base import DatasetConfig
from convoy.promotion.config import GateConfig
from convoy.recipe import RecipeConfig
from model_settings import load_model_settings
from small_project import ROOT

SOUND: dict[str, Any] = {
    "size": 32,
    "channels": "auto",
    "test_fraction": 0.2,
    "val_fraction": 0.1,
    "near_duplicate_threshold": 0.9,
}


def make_lenet_settings(**augment: object) -> dict[str, Any]:
    values = load_model_settings("lenet")
    values["recipe"]["augment"] |= augment
    return values


# Types


def test_valid_values_are_returned_unchanged() -> None:
    params = validate(PreprocessConfig, SOUND, "preprocess")
    assert {key: getattr(params, key) for key in SOUND} == SOUND


def test_integer_is_accepted_for_a_float() -> None:
    assert validate(Fraction, 1, "register.min_accuracy") == 1.0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("size", "abc", "preprocess.size='abc': input should be a valid integer"),
        ("size", "32", "preprocess.size='32': input should be a valid integer"),
        ("size", 33.7, "preprocess.size=33.7: input should be a valid integer"),
        ("size", True, "preprocess.size=True: input should be a valid integer"),
        ("size", None, "preprocess.size=None: input should be a valid integer"),
        ("size", [32], "preprocess.size=[32]: input should be a valid integer"),
        ("size", 7, "preprocess.size=7: input should be greater than or equal to 32"),
        ("size", 10**30, "input should be less than or equal to 1024"),
        ("channels", "rgb", "preprocess.channels='rgb': input should be 'auto', 1 or 3"),
        ("channels", 2, "preprocess.channels=2: input should be 'auto', 1 or 3"),
        ("val_fraction", "abc", "preprocess.val_fraction='abc': input should be a valid number"),
        ("val_fraction", True, "preprocess.val_fraction=True: input should be a valid number"),
        ("val_fraction", math.nan, "preprocess.val_fraction=nan: input should be a finite number"),
        ("val_fraction", math.inf, "preprocess.val_fraction=inf: input should be a finite number"),
        ("val_fraction", 0, "preprocess.val_fraction=0: input should be greater than 0"),
        ("val_fraction", 1, "preprocess.val_fraction=1: input should be less than 1"),
        ("val_fraction", b"bytes", "preprocess.val_fraction="),
    ],
)
def test_wrong_value_is_named_with_what_it_may_be(key: str, value: object, message: str) -> None:
    with pytest.raises(ConvoyError) as refusal:
        validate(PreprocessConfig, SOUND | {key: value}, "preprocess")
    assert message in str(refusal.value)


@settings(max_examples=30)
@given(st.one_of(st.text(max_size=5), st.booleans(), st.floats(), st.none(), st.lists(st.integers())))
def test_only_integers_are_accepted_for_an_integer(value: object) -> None:
    with pytest.raises(ConvoyError, match=r"^seed="):
        validate(NonNegativeInt, value, "seed")


@given(st.integers())
def test_number_passes_exactly_if_it_is_in_its_range(value: int) -> None:
    if value >= 0:
        assert validate(NonNegativeInt, value, "seed") == value
    else:
        with pytest.raises(ConvoyError, match=r"seed=-\d+: input should be greater than or equal to 0"):
            validate(NonNegativeInt, value, "seed")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 0),
        ("accumulate_grad_batches", 0),
        ("lr", 0.0),
        ("backbone_lr_scale", 1.1),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("warmup_fraction", 1.1),
        ("label_smoothing", 1.1),
        ("grad_clip_norm", -0.1),
        ("ema_decay", 1.0),
    ],
)
def test_number_of_a_recipe_out_of_its_range_is_refused(key: str, value: float) -> None:
    recipe = make_lenet_settings()["recipe"]
    validate(RecipeConfig, recipe, "recipe")
    with pytest.raises(ConvoyError, match=rf"^recipe\.{key}={value}: input should be"):
        validate(RecipeConfig, recipe | {key: value}, "recipe")


@config.schema
class Crew:
    hands: PositiveInt | Literal["all"]
    watches: list[PositiveInt | Literal["dog"]]


@pytest.mark.parametrize("hands", [1, "all"])
def test_each_type_of_a_union_is_accepted(hands: int | str) -> None:
    assert validate(Crew, {"hands": hands, "watches": [2, "dog"]}, "crew").hands == hands


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hands": 0}, "crew.hands=0: input should be greater than or equal to 1, or 'all'"),
        ({"hands": "al"}, "crew.hands='al': input should be a valid integer, or 'all'"),
        ({"hands": None}, "crew.hands=None: input should be a valid integer, or 'all'"),
        ({"watches": [2, "cat"]}, "crew.watches.1='cat': input should be a valid integer, or 'dog'"),
    ],
)
def test_key_of_union_type_lists_both_types_in_one_line(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvoyError) as refusal:
        validate(Crew, {"hands": 1, "watches": []} | wrong, "crew")
    assert str(refusal.value) == message


@pytest.mark.parametrize("values", [None, 3, "abc", [1, 2]])
def test_section_that_is_no_mapping_is_refused_by_name(values: object) -> None:
    with pytest.raises(ConvoyError, match=r"^preprocess="):
        validate(PreprocessConfig, values, "preprocess")


# Keys


def test_unknown_key_suggests_the_similar_known_key() -> None:
    with pytest.raises(ConvoyError, match=r"^preprocess\.siz: unknown key; did you mean size\?$"):
        validate(PreprocessConfig, SOUND | {"siz": 3}, "preprocess")


def test_dissimilar_unknown_key_lists_all_known_keys() -> None:
    message = r"^preprocess\.x: unknown key; it may be one of size, channels, .*, near_duplicate_threshold$"
    with pytest.raises(ConvoyError, match=message):
        validate(PreprocessConfig, SOUND | {"x": 3}, "preprocess")


def test_missing_key_is_named() -> None:
    with pytest.raises(ConvoyError, match=r"^preprocess\.size: missing; set it in conf/$"):
        validate(PreprocessConfig, {key: value for key, value in SOUND.items() if key != "size"}, "preprocess")


def test_all_errors_are_reported_at_once() -> None:
    with pytest.raises(ConvoyError) as refusal:
        validate(PreprocessConfig, {"siz": 32, "channels": 2, "test_fraction": 2}, "preprocess")
    named = {line.split(":")[0].split("=")[0] for line in str(refusal.value).splitlines()}
    keys = ("size", "siz", "channels", "test_fraction", "val_fraction", "near_duplicate_threshold")
    assert named == {f"preprocess.{key}" for key in keys}


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({"max_shift": 2.5}, r"model\.lenet\.recipe\.augment\.max_shift=2\.5: input should be a valid integer"),
        ({"max_shift": -1}, r"model\.lenet\.recipe\.augment\.max_shift=-1: input should be greater than or equal to 0"),
        ({"hflip": "no"}, r"model\.lenet\.recipe\.augment\.hflip='no': input should be False, True or 'alternate'"),
        ({"max_shft": 2}, r"model\.lenet\.recipe\.augment\.max_shft: unknown key; did you mean max_shift\?"),
    ],
)
def test_nested_key_is_named_by_its_full_path(augment: dict, message: str) -> None:
    models.parse("lenet", make_lenet_settings())
    with pytest.raises(ConvoyError, match=f"^{message}"):
        models.parse("lenet", make_lenet_settings(**augment))


def test_key_in_an_optional_section_gets_a_suggestion_too() -> None:
    values = {
        "name": "x",
        "longest_side": 9,
        "group": None,
        "torchvision": {"nme": "MNIST", "name": "MNIST", "splits": {"all": {}}},
    }
    with pytest.raises(ConvoyError, match=r"^dataset\.torchvision\.nme: unknown key; did you mean name\?$"):
        validate(DatasetConfig, values, "dataset")


@pytest.mark.parametrize("splits", [{}, {"training": {"train": True}}])
def test_torchvision_dataset_needs_known_splits(splits: dict) -> None:
    values = {"name": "x", "longest_side": 9, "group": None, "torchvision": {"name": "MNIST", "splits": splits}}
    with pytest.raises(ConvoyError, match=r"^dataset\.torchvision\.splits"):
        validate(DatasetConfig, values, "dataset")


# Sections

KNOWN = ["dataset", "split", "train"]


def test_known_sections_pass() -> None:
    check_sections({"dataset": {"name": "x"}, "split": {"seed": 0}, "train": {"threads": 1}}, KNOWN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trian": {"threads": 1}}, "trian: unknown section; did you mean train?"),
        ({"x": 1}, "x: unknown section; it may be one of dataset, split, train"),
        ({"train": None}, "train: missing or empty"),
        ({"train": {}}, "train: missing or empty"),
        ({"split": None}, "split: missing or empty"),
    ],
)
def test_unknown_or_empty_section_is_named(change: dict, message: str) -> None:
    with pytest.raises(ConvoyError) as refusal:
        check_sections({"dataset": {"name": "x"}, "split": {"seed": 0}, "train": {"threads": 1}} | change, KNOWN)
    assert message in str(refusal.value)


def test_missing_section_is_named() -> None:
    with pytest.raises(ConvoyError, match="split: missing or empty"):
        check_sections({"dataset": {"name": "x"}, "train": {"threads": 1}}, KNOWN)


# Composing


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "params.yaml").write_text("old: 1\n")
    return tmp_path


def test_composing_returns_what_it_writes(project: Path) -> None:
    composed = config.compose(project, ["train.max_epochs=3", "model=[lenet]", "dataset=mnist"])
    assert composed == config.load(project / "params.yaml") == yaml.safe_load((project / "params.yaml").read_text())
    assert composed["train"]["max_epochs"] == 3
    assert list(composed["model"]) == ["lenet"]
    assert composed["dataset"]["torchvision"]["name"] == "MNIST"


def test_architectures_keep_the_order_of_the_list(project: Path) -> None:
    assert list(config.compose(project, ["model=[vgg,lenet,resnet]"])["model"]) == ["vgg", "lenet", "resnet"]


def test_dvc_composes_identical_bytes(project: Path) -> None:
    # `dvc exp run` itself, in a project whose one stage does nothing
    (project / "dvc.yaml").write_text("stages:\n  idle:\n    cmd: echo idle\n    params: [split]\n")
    (project / ".dvc").mkdir()
    (project / ".dvc/config").write_text("[core]\n    analytics = false\n[hydra]\n    enabled = true\n")
    identity = {
        f"GIT_{who}_{what}": "convoy@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    environment = os.environ | identity | {"GIT_CONFIG_GLOBAL": os.devnull, "DVC_NO_ANALYTICS": "1"}
    for command in (
        ["git", "init", "--quiet"],
        ["git", "add", "."],
        ["git", "commit", "--quiet", "--message", "start"],
        [sys.executable, "-m", "dvc", "exp", "run", "--quiet", "-S", "train.max_epochs=3", "-S", "dataset=cifar10"],
    ):
        subprocess.run(command, cwd=project, env=environment, check=True, capture_output=True)
    theirs = (project / "params.yaml").read_bytes()
    config.compose(project, ["train.max_epochs=3", "dataset=cifar10"])
    assert (project / "params.yaml").read_bytes() == theirs


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trian.max_epochs=3", "trian.max_epochs"),
        ("train.max_epoch=3", "train.max_epoch"),
        ("dataset=fodler", "fodler"),
        ("model=[resnt]", "resnt"),
        ("train.max_epochs", "train.max_epochs"),
        ("train.max_epochs=[1", "[1"),
    ],
)
def test_invalid_override_is_named_and_changes_nothing(project: Path, override: str, named: str) -> None:
    with pytest.raises(ConvoyError, match=r"^conf/") as refusal:
        config.compose(project, [override])
    assert named in str(refusal.value)
    assert (project / "params.yaml").read_text() == "old: 1\n"


@pytest.mark.parametrize(
    "content",
    [
        "name: [1\n",
        "name:\tx\n\tb: 1\n",
        "name: a\nname: b\n",
        "3\n",
        "name: ${nope}\n",
        "name: ${\n",
        "name: ${oc.env:NO_SUCH_VARIABLE}\n",
        "name: !!python/object/apply:os.getcwd []\n",
        b"name: caf\xe9\n",
    ],
)
def test_broken_file_in_conf_is_refused_and_changes_nothing(project: Path, content: str | bytes) -> None:
    (project / "conf/dataset/folder.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConvoyError, match=r"conf/ does not compose: \S"):
        config.compose(project)
    assert (project / "params.yaml").read_text() == "old: 1\n"


def test_full_disk_leaves_params_yaml_as_it_was(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, *_: object, **__: object) -> int:
        file.write_bytes(b"")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConvoyError, match="No space left on device"):
        config.compose(project)
    assert (project / "params.yaml").read_text() == "old: 1\n"


def test_first_params_yaml_is_not_left_behind_by_a_broken_conf(project: Path) -> None:
    (project / "params.yaml").unlink()
    with pytest.raises(ConvoyError):
        config.compose(project, ["nope=1"])
    assert not (project / "params.yaml").exists()


def test_missing_params_yaml_is_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(
        ConvoyError, match=r"params\.yaml is missing: compose it from conf/ with `convoy settings compose`"
    ):
        config.load(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    "content", [b"- 1\n", b"[1\n", b"\xff\xfe", b"<<<<<<< HEAD\nseed: 1\n=======\nseed: 2\n", b"3\n"]
)
def test_invalid_params_yaml_is_refused_with_the_fix(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(ConvoyError, match=r"params\.yaml .*compose it again with `convoy settings compose`"):
        config.load(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("no", "such as 'no'"),
        ("off", "YAML reads no, off and false as False unless quoted"),
        ("yes", "such as 'yes'"),
        ("007", "YAML reads digits as a number, and 007 as 7, unless quoted"),
        ("1.10", "write quotes, such as '1.1'"),
        ("null", "write it in quotes, such as 'null'"),
    ],
)
def test_unquoted_yaml_text_is_refused_with_the_quotes(written: str, said: str) -> None:
    values = yaml.safe_load((ROOT / "conf/dataset/folder.yaml").read_text()) | {"name": yaml.safe_load(written)}
    with pytest.raises(ConvoyError, match=re.escape(said)):
        validate(DatasetConfig, values, "dataset")


def test_unquoted_class_name_in_a_list_is_refused_too() -> None:
    gate = yaml.safe_load((ROOT / "params.yaml").read_text())["register"]["gate"]
    with pytest.raises(ConvoyError, match=r"register.gate.acknowledged_class_changes.0=False: .* such as 'no'"):
        validate(GateConfig, gate | {"acknowledged_class_changes": yaml.safe_load("[off]")}, "register.gate")
