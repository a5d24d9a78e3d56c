"""Differences of two trainings: the first one is found in weights, history and metrics, to the last bit."""

import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from convoy.tracking.differences import compare_histories, compare_metrics, compare_weights

HISTORY = "epoch,train_loss,val_loss\n1,0.5,0.25\n2,0.30000000000000004,0.2\n"


def write_weights(file: Path, **tensors: object) -> Path:
    save_file({name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}, file)
    return file


def test_equal_weights_have_no_difference(tmp_path: Path) -> None:
    files = [write_weights(tmp_path / name, bias=[0.1, math.nan], scale=1.0) for name in ("a", "b")]
    compared = compare_weights(*files)
    assert (compared.compared, compared.difference) == ("2 tensors", "")


def test_first_weight_that_differs_in_one_bit_is_named(tmp_path: Path) -> None:
    after = np.float32(0.1)
    before = write_weights(tmp_path / "a", bias=[[0.0, 0.1]], scale=[1.0])
    other = write_weights(tmp_path / "b", bias=[[0.0, np.nextafter(after, np.float32(1))]], scale=[1.0])
    difference = compare_weights(before, other).difference
    assert difference == "1 differ, by 7.5e-09 at most; first bias[0, 1]: 0.100000001 became 0.100000009"


def test_weights_of_other_shapes_or_names_are_compared(tmp_path: Path) -> None:
    one = write_weights(tmp_path / "a", bias=[0.0, 0.1], scale=1.0)
    assert "bias and others have another shape" in compare_weights(one, write_weights(tmp_path / "b", bias=[0], scale=1.0)).difference  # fmt: skip  # noqa: E501
    assert "scale is only in one" in compare_weights(one, write_weights(tmp_path / "c", bias=[0.0, 0.1])).difference
    scalar = write_weights(tmp_path / "d", bias=[0.0, 0.1], scale=2.0)
    assert "first scale[0]: 1 became 2" in compare_weights(one, scalar).difference


def test_failed_training_is_equal_to_a_failed_one(tmp_path: Path) -> None:
    assert not compare_weights(None, None).difference
    assert compare_weights(None, write_weights(tmp_path / "a", bias=0.0)).difference


def test_first_epoch_that_differs_is_named(tmp_path: Path) -> None:
    before, after = tmp_path / "a.csv", tmp_path / "b.csv"
    before.write_text(HISTORY)
    after.write_text(HISTORY.replace("0.30000000000000004", "0.3"))
    assert not compare_histories(before, before).difference
    expected = "first in epoch 2: train_loss 0.30000000000000004 became 0.3"
    assert compare_histories(before, after).difference == expected
    after.write_text(HISTORY + "3,0.1,0.1\n")
    assert compare_histories(before, after).difference == "3 epochs instead"


def test_metrics_are_compared_with_the_digits_of_mlflow() -> None:
    after = {"accuracy": 0.9889807162534435, "top_5": math.nan, "macro_f1": 0.5}
    assert not compare_metrics({"accuracy": 0.9889807, "top_5": math.nan, "accuracy_low": 0.97}, after).difference
    assert compare_metrics({"accuracy": 0.98}, after).difference == "1 differ; first accuracy 0.98 became 0.9889807"
