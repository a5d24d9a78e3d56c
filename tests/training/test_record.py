"""Tests of the training record, and of models that were registered with an earlier format of it."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pydantic
import pytest

from convoy import models
from convoy.core.errors import ConvoyError
from convoy.inference import predictor
from convoy.training.record import EpochMetrics, FailureInfo, InitialWeights, ResolvedTrainer, TrainingRecord
from record_factory import make_record

# A tiny LeNet as training and evaluation left it before records had a format.
FORMAT_1 = Path(__file__).with_name("format_1")


def test_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    start = InitialWeights("champion", "version 3", "0" * 64, True, "kept", ("", "a99769f9303d"))
    record = make_record(initial_weights=start, failure=FailureInfo("the loss is NaN", 2, 17, 0.05))
    record.save(tmp_path / "record.json")
    assert TrainingRecord.load(tmp_path / "record.json") == record


def test_nan_and_infinity_are_read_as_they_were_written(tmp_path: Path) -> None:
    make_record(best=EpochMetrics(1, 0.1, 0.5, math.inf, 0.5, math.nan)).save(tmp_path / "record.json")
    best = TrainingRecord.load(tmp_path / "record.json").best
    assert best
    assert best.train_loss == math.inf
    assert math.isnan(best.val_loss)


def test_record_is_frozen() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        make_record().macs = 2


def test_lineage_holds_own_data_and_that_of_initial_weights() -> None:
    start = InitialWeights("champion", lineage=("b", "a99769f9303d"))
    record = make_record(initial_weights=start)
    assert record.lineage == ["a99769f9303d", "b"]
    assert record.earlier_data == ["b"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "invalid JSON"),
        ("[]", "input should be"),
        ("[" * 100_000, "invalid JSON"),
        ("{}", "architecture: field required"),
        ('{"format": 4}', "format 4 is not known here: update"),
    ],
)
def test_file_that_is_no_record_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConvoyError, match=f"record.json.*{reason}"):
        TrainingRecord.parse(text)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"macs": "1"}, "macs"), ({"macs": 1.5}, "macs"), ({"colour": "red"}, "colour"), ({"data": {}}, "data.name")],
)
def test_record_with_a_wrong_field_is_refused_by_name(change: dict, reason: str) -> None:
    table = json.loads(make_record().model_dump_json()) | change
    with pytest.raises(ConvoyError, match=reason):
        TrainingRecord.parse(json.dumps(table))


# Earlier formats


def test_record_of_format_2_is_upgraded() -> None:
    old = json.loads(make_record().model_dump_json()) | {"format": 2, "stopped": "max_minutes"}
    old["train"]["max_minutes"] = 90.0
    old["trainer"] = {
        "accelerator": "cpu", "devices": 2, "nodes": 1, "precision": "bfloat16", "compile": False, "threads": 2
    }  # fmt: skip
    record = TrainingRecord.parse(json.dumps(old))
    assert record.trainer == ResolvedTrainer("cpu", 2, 1, "ddp", "bf16-mixed", False, False, 2, "00:01:30:00")
    assert record.stopped == "max_time"


def test_record_of_format_1_is_upgraded() -> None:
    old = json.loads((FORMAT_1 / "record.json").read_text())
    record = TrainingRecord.load(FORMAT_1 / "record.json")
    assert record.format == 3
    assert record.fingerprint == old["identity"]
    assert record.macs == old["multiply_adds"]
    assert record.dataset_info.classes == old["task"]["classes"]
    assert record.initial_weights == InitialWeights("scratch")
    assert record.best == EpochMetrics(**old["best"])
    assert record.train.seed == record.data.split_seed == old["seed"]


@pytest.mark.parametrize("balance", ["none", "loss", "sampler"])
def test_settings_of_format_1_are_valid_under_their_new_names(balance: str) -> None:
    old = json.loads((FORMAT_1 / "record.json").read_text())
    old["settings"]["recipe"]["balance"] = balance
    record = TrainingRecord.parse(json.dumps(old))
    params = models.parse("lenet", record.settings)
    assert params.recipe.grad_clip_norm == old["settings"]["recipe"]["clip_norm"]
    assert params.recipe.augment.max_shift == old["settings"]["recipe"]["augment"]["shift"]
    assert params.recipe.class_balance == ("weighted_loss" if balance == "loss" else balance)


@pytest.mark.parametrize("field", ["settings", "train", "data", "seed"])
def test_damaged_record_of_format_1_is_refused(field: str) -> None:
    old = json.loads((FORMAT_1 / "record.json").read_text())
    with pytest.raises(ConvoyError, match="is not the record of a training"):
        TrainingRecord.parse(json.dumps(old | {field: "?"}))


def test_early_record_says_that_its_initial_data_is_unknown() -> None:
    old = json.loads((FORMAT_1 / "record.json").read_text())
    del old["init"]
    assert "" in TrainingRecord.parse(json.dumps(old)).lineage


def test_failed_training_of_format_1_has_no_best_epoch() -> None:
    old = json.loads((FORMAT_1 / "record.json").read_text())
    old |= {"best": {}, "failure": {"reason": "the loss is NaN", "epoch": 1, "step": 3, "lr": 0.05}}
    record = TrainingRecord.parse(json.dumps(old))
    assert record.best is None
    assert record.failure == FailureInfo("the loss is NaN", 1, 3, 0.05)


def test_model_of_format_1_predicts_what_it_predicted_then(tmp_path: Path) -> None:
    shutil.copytree(FORMAT_1, tmp_path / "model")
    pixels = np.arange(32 * 32, dtype=np.uint8).reshape(1, 32, 32, 1)
    found = predictor.restore(tmp_path / "model").probabilities(pixels)
    assert found[0] == pytest.approx([0.07872055963314613, 0.5725037418433832, 0.3487756985234707], rel=1e-4)
