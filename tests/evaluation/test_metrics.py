"""Metrics: they can be checked by hand, and their intervals have the stated coverage."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics

from convoy import models
from convoy.data.packed.arrays import Images
from convoy.evaluation.calibration import apply_temperature, fit_temperature
from convoy.evaluation.metrics import (
    CALIBRATION_BINS,
    calibration_error,
    metrics_with_ci,
    per_class_metrics,
    prediction_table,
    slice_metrics,
)
from convoy.models.base import predict
from convoy.training.record import TrainingRecord
from pipeline.evaluate import evaluate
from pipeline.stage import Stage
from small_project import SMALL, make_project, run_stages

LABELS = np.array([0, 0, 0, 1])
PROBABILITIES = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
HOSTILE = ["NA", "007", "", "a,b"]


def evaluate_both(labels: np.ndarray, probabilities: np.ndarray, groups: Any = None) -> pd.DataFrame:
    return metrics_with_ci(labels, probabilities, probabilities, groups).set_index("metric")


def compute_metrics(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    return evaluate_both(labels, probabilities)["value"].to_dict()


def draw_predictions(random: np.random.Generator, images: int, classes: int, sharpness: float = 2.0) -> tuple:
    """labels (N,) and probabilities (N, K) that are true: as often as they say, the image is of that class."""
    logits = sharpness * random.normal(size=(images, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (probabilities.cumsum(axis=1) < random.random((images, 1))).sum(axis=1)
    return np.minimum(labels, classes - 1), probabilities


def make_probabilities(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes)[predicted] * 0.8 + 0.2 / classes


# Figures


def test_metrics_equal_those_counted_by_hand() -> None:
    found = compute_metrics(LABELS, PROBABILITIES)
    assert found["accuracy"] == pytest.approx(3 / 4)
    assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert found["log_loss"] == pytest.approx(-sum(map(math.log, (0.9, 0.8, 0.4, 0.7))) / 4)
    assert found["brier"] == pytest.approx(2 * (0.1**2 + 0.2**2 + 0.6**2 + 0.3**2) / 4)
    # each in a bin of its own, but for 0.6 and 0.7 of which one is wrong: 9 and 10 of 15
    assert found["calibration_error"] == pytest.approx((0.1 + 0.2 + 0.6 + 0.3) / 4)


@pytest.mark.parametrize("classes", [3, 12])
def test_metrics_equal_those_of_scikit_learn(classes: int) -> None:
    labels, probabilities = draw_predictions(np.random.default_rng(0), 400, classes)
    found, predicted = compute_metrics(labels, probabilities), probabilities.argmax(axis=1)
    everything = list(range(classes))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))
    assert found["log_loss"] == pytest.approx(metrics.log_loss(labels, probabilities, labels=everything))
    assert found["brier"] == pytest.approx(metrics.brier_score_loss(labels, probabilities, labels=everything))
    if classes >= 10:
        top_5 = metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=everything)
        assert found["top_5"] == pytest.approx(top_5)


def test_calibration_error_is_the_weighted_gap_of_its_bins() -> None:
    labels, probabilities = draw_predictions(np.random.default_rng(0), 400, 3)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    by_hand = 0.0
    for number in range(CALIBRATION_BINS):
        inside = (confidence >= number / CALIBRATION_BINS) & (confidence < (number + 1) / CALIBRATION_BINS)
        if inside.any():
            by_hand += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert compute_metrics(labels, probabilities)["calibration_error"] == pytest.approx(by_hand)
    assert float(calibration_error(confidence, right)) == pytest.approx(by_hand)


def test_top5_is_reported_from_ten_classes_on() -> None:
    for classes in (9, 10):
        labels, probabilities = draw_predictions(np.random.default_rng(0), 50, classes)
        assert ("top_5" in compute_metrics(labels, probabilities)) == (classes >= 10)


def test_ties_in_top5_go_to_the_first_classes() -> None:
    assert compute_metrics(np.arange(10), np.full((10, 10), 0.1))["top_5"] == 0.5


def test_class_that_is_never_predicted_counts_as_zero() -> None:
    always_first = np.array([[0.9, 0.1]] * 4)
    assert compute_metrics(LABELS, always_first)["macro_f1"] == pytest.approx((6 / 7 + 0) / 2)
    assert list(per_class_metrics(["cat", "dog"], LABELS, always_first)["f1"]) == pytest.approx([6 / 7, 0])


def test_class_of_which_there_is_no_image_does_not_count() -> None:
    wider = np.pad(PROBABILITIES, ((0, 0), (0, 1)))
    for name in ("balanced_accuracy", "macro_f1"):
        assert compute_metrics(LABELS, wider)[name] == compute_metrics(LABELS, PROBABILITIES)[name]
    row = per_class_metrics(["cat", "dog", "fox"], LABELS, wider).iloc[2]
    assert row.drop("class").to_list() == [0, 0, True] + 3 * [0, 0, 1]


def test_calibrated_and_raw_probabilities_are_evaluated() -> None:
    labels, raw = draw_predictions(np.random.default_rng(0), 400, 12)
    table = metrics_with_ci(labels, apply_temperature(raw, 3.0), raw).set_index("metric")
    for name in ("log_loss", "brier", "calibration_error"):
        assert table.loc[f"{name}_uncalibrated", "value"] == compute_metrics(labels, raw)[name]
        assert table.loc[name, "value"] > table.loc[f"{name}_uncalibrated", "value"]
    assert table["value"].notna().all()


# Classes


def test_each_class_has_its_images_precision_recall_and_f1() -> None:
    table = per_class_metrics(["cat", "dog"], LABELS, PROBABILITIES)
    assert list(table["class"]) == ["cat", "dog"]
    assert list(table["images"]) == [3, 1]
    assert list(table["predicted"]) == [2, 2]
    assert list(table["precision"]) == pytest.approx([1, 1 / 2])
    assert list(table["recall"]) == pytest.approx([2 / 3, 1])


def test_class_metrics_lie_in_intervals_wide_for_few_images() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [300, 30, 3])
    predicted = np.where(random.random(333) < 0.8, labels, random.integers(0, 3, 333))
    table = per_class_metrics(["cat", "dog", "fox"], labels, make_probabilities(labels, predicted, 3))
    for rate in ("precision", "recall", "f1"):
        low, value, high = (table[f"{rate}{end}"] for end in ("_low", "", "_high"))
        assert ((low >= 0) & (low <= value) & (value <= high) & (high <= 1)).all()
    width = table["recall_high"] - table["recall_low"]
    assert width.is_monotonic_increasing


def test_classes_and_slices_of_under_30_images_are_marked() -> None:
    labels = np.repeat([0, 1, 2], [300, 30, 29])
    probabilities = make_probabilities(labels, labels, 3)
    table = per_class_metrics(["cat", "dog", "fox"], labels, probabilities)
    assert list(table["images"]) == [300, 30, 29]
    assert list(table["too_few_images"]) == [False, False, True]
    # 30 images from 2 films are no more evidence than 2 images.
    films = np.where(labels == 1, np.where(np.arange(359) % 2, "first", "second"), "").astype(object)
    assert list(per_class_metrics(["cat", "dog", "fox"], labels, probabilities, films)["too_few_images"]) == [
        False,
        True,
        True,
    ]
    sliced = slice_metrics(make_predictions(labels == labels, column_site=np.array(["x", "y", "z"])[labels]))
    assert list(sliced["too_few_images"]) == [False, False, True]


def test_names_of_classes_and_values_round_trip() -> None:
    labels = np.arange(40) % 4
    table = per_class_metrics(HOSTILE, labels, make_probabilities(labels, labels, 4))
    again = pd.read_csv(io.StringIO(table.to_csv(index=False)), dtype={"class": str}, keep_default_na=False)
    assert list(again["class"]) == HOSTILE
    sliced = slice_metrics(make_predictions(labels == labels, column_site=np.array(HOSTILE)[labels]))
    again = pd.read_csv(io.StringIO(sliced.to_csv(index=False)), dtype={"value": str}, keep_default_na=False)
    assert list(again["value"]) == sorted(HOSTILE)


# Intervals


@pytest.mark.parametrize("images", [100, 400])
def test_intervals_cover_the_truth_in_95_of_100_test_sets(images: int) -> None:
    random = np.random.default_rng(0)
    everything = compute_metrics(*draw_predictions(random, 20_000, 4))
    everything |= {"calibration_error": 0.0, "calibration_error_uncalibrated": 0.0}
    sets = [evaluate_both(*draw_predictions(random, images, 4)) for _ in range(100)]
    for name, truth in everything.items():
        held = np.mean([table.loc[name, "low"] <= truth <= table.loc[name, "high"] for table in sets])
        assert held >= 0.89, name  # 0.95 less twice what a hundred sets can err, and the bootstrap's own fault
    assert np.mean([table.loc["accuracy", "low"] > everything["accuracy"] for table in sets]) > 0  # and no wider
    for table in sets:
        assert ((table["low"] <= table["value"]) & (table["value"] <= table["high"])).all()


def test_interval_of_a_large_calibration_error_contains_it() -> None:
    random = np.random.default_rng(0)

    def overconfident(images: int) -> float | tuple[float, float]:
        labels, probabilities = draw_predictions(random, images, 4)
        row = evaluate_both(labels, apply_temperature(probabilities, 0.5)).loc["calibration_error"]
        return row["value"] if images > 10_000 else (row["low"], row["high"])

    truth = overconfident(20_000)
    assert truth > 0.05
    assert np.mean([low <= truth <= high for low, high in (overconfident(300) for _ in range(50))]) >= 0.88  # type: ignore[misc]


def test_more_images_make_intervals_narrower() -> None:
    labels, probabilities = draw_predictions(np.random.default_rng(0), 3200, 12)
    few, many = (evaluate_both(labels[:count], probabilities[:count]) for count in (200, 3200))
    ratio = (few["high"] - few["low"]) / (many["high"] - many["low"])
    assert (ratio > 1.8).all()
    assert ratio["accuracy"] == pytest.approx(4, rel=0.2)  # the root of 16


def test_interval_of_perfect_accuracy_reaches_below_one() -> None:
    labels = np.arange(40) % 4
    perfect = evaluate_both(labels, make_probabilities(labels, labels, 4))
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        assert perfect.loc[name].to_list() == pytest.approx([1, 40 / (40 + 1.96**2), 1], abs=1e-4)
    rows = per_class_metrics(["a", "b", "c", "d"], labels, make_probabilities(labels, labels, 4))
    assert rows["recall_low"].to_list() == pytest.approx([10 / (10 + 1.96**2)] * 4, abs=1e-4)
    wrong = evaluate_both(labels, make_probabilities(labels, (labels + 1) % 4, 4)).loc["accuracy"]
    assert wrong.to_list() == pytest.approx([0, 0, 1.96**2 / (40 + 1.96**2)], abs=1e-4)


def test_copies_in_a_group_make_no_interval_narrower() -> None:
    labels, probabilities = draw_predictions(np.random.default_rng(0), 200, 4)
    copies = (np.repeat(labels, 9), np.repeat(probabilities, 9, axis=0))
    groups = np.array([f"film {number // 9}" for number in range(1800)], object)
    once, alone, together = evaluate_both(labels, probabilities), evaluate_both(*copies), evaluate_both(*copies, groups)
    width = {name: table["high"] - table["low"] for name, table in zip("oat", (once, alone, together), strict=True)}
    assert (width["t"] > 1.5 * width["a"]).all()
    assert width["t"].to_list() == pytest.approx(width["o"].to_list(), rel=0.1)
    by_class = [per_class_metrics(list("abcd"), *copies, groups=by)["recall_low"] for by in (None, groups)]
    assert (by_class[1] < by_class[0]).all()


def test_images_without_a_group_are_groups_of_their_own() -> None:
    labels, probabilities = draw_predictions(np.random.default_rng(0), 200, 4)
    for groups in (np.full(200, "", object), np.array([f"film {number}" for number in range(200)], object)):
        pd.testing.assert_frame_equal(
            evaluate_both(labels, probabilities, groups), evaluate_both(labels, probabilities)
        )


def test_single_group_gives_a_wide_interval() -> None:
    labels, probabilities = draw_predictions(np.random.default_rng(0), 200, 4)
    row = evaluate_both(labels, probabilities, np.full(200, "one film", object)).loc["accuracy"]
    assert row["low"] < 0.3
    assert row["high"] > 0.9


def test_same_predictions_give_bit_identical_metrics() -> None:
    labels, probabilities = draw_predictions(np.random.default_rng(0), 300, 12)
    pd.testing.assert_frame_equal(
        evaluate_both(labels, probabilities), evaluate_both(labels, probabilities), check_exact=True
    )


# Predictions


def make_predictions(right: Any, **columns: Any) -> pd.DataFrame:
    """The predictions of a model that is right for these images."""
    right = np.asarray(right, bool)
    return pd.DataFrame({"actual": "cat", "predicted": np.where(right, "cat", "dog")}).assign(**columns)


def test_predictions_have_the_hash_and_actual_class_of_images() -> None:
    images = pd.DataFrame({"sha256": ["a", "b", "c", "d"], "label": ["cat", "cat", "cat", "dog"]}, index=[7, 8, 9, 10])
    table = prediction_table(["cat", "dog"], images, PROBABILITIES)
    assert list(table.columns) == ["sha256", "actual", "predicted", "probability_cat", "probability_dog"]
    assert list(table["sha256"]) == ["a", "b", "c", "d"]
    assert list(table["predicted"]) == ["cat", "cat", "dog", "dog"]
    assert (table[["probability_cat", "probability_dog"]].to_numpy() == PROBABILITIES).all()


def test_predictions_carry_groups_and_other_columns() -> None:
    images = pd.DataFrame(
        {"sha256": list("abcd"), "label": "cat", "group": ["", "1", "1", ""], "column_site": list("xyxy")}
    )
    table = prediction_table(["cat", "dog"], images.set_index(np.arange(7, 11)), PROBABILITIES)
    assert list(table["group"]) == ["", "1", "1", ""]
    assert list(table["column_site"]) == list("xyxy")
    assert "group" not in prediction_table(["cat", "dog"], images.assign(group=""), PROBABILITIES)


# Slices


def test_slices_of_a_column_hold_every_image_once() -> None:
    random = np.random.default_rng(0)
    table = make_predictions(random.random(300) < 0.8, column_site=random.choice(["x", "y", ""], 300), column_age="7")
    found = slice_metrics(table)
    assert list(found.columns) == ["column", "value", "images", "too_few_images", "accuracy", "low", "high"]
    assert list(found["column"]) == ["site"] * 3 + ["age"]
    for _, rows in found.groupby("column"):
        assert rows["images"].sum() == 300
        right = (table["actual"] == table["predicted"]).sum()
        assert (rows["images"] * rows["accuracy"]).sum() == pytest.approx(right)
    assert ((found["low"] <= found["accuracy"]) & (found["accuracy"] <= found["high"])).all()
    assert found.iloc[3]["accuracy"] == right / 300


def test_column_of_more_than_fifty_values_is_not_sliced() -> None:
    numbers = np.arange(102)
    found = slice_metrics(
        make_predictions(numbers > 9, column_fine=(numbers % 51).astype(str), column_coarse=(numbers % 50).astype(str))
    )
    assert set(found["column"]) == {"coarse"}


def test_slice_is_resampled_by_groups_and_a_group_by_images() -> None:
    numbers = np.arange(400)
    right = numbers // 20 % 2 == 0  # a group is right as a whole, or wrong
    site = np.where(numbers < 200, "x", "y")
    groups = np.array([f"film {number // 20:02}" for number in numbers], object)
    wide, narrow = (
        slice_metrics(make_predictions(right, column_site=site, **by)).query("column == 'site'")
        for by in ({"group": groups}, {})
    )
    assert (wide["high"] - wide["low"] > 2 * (narrow["high"] - narrow["low"])).all()
    films = slice_metrics(make_predictions(numbers % 2, column_site=site, group=groups)).query("column == 'group'")
    assert films["value"].to_list() == sorted(set(groups))
    assert (films["high"] - films["low"] < 0.6).all()


def test_without_other_columns_there_are_no_slices() -> None:
    assert list(slice_metrics(make_predictions([True])).columns) == [
        "column",
        "value",
        "images",
        "too_few_images",
        "accuracy",
        "low",
        "high",
    ]
    assert not len(slice_metrics(make_predictions([True])))


# The stage


@pytest.fixture(scope="module")
def trained_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_project(tmp_path_factory.mktemp("road"), [*SMALL, "model=[lenet]", "train.max_epochs=1"])
    pictures = sorted(file.relative_to(root / "data") for file in (root / "data").rglob("*.png"))
    rows = [
        f"{path},{path.parent},film {number // 2},{'xy'[number % 2]},{number}" for number, path in enumerate(pictures)
    ]
    (root / "data/labels.csv").write_text("\n".join(["path,label,group,site,number", *rows]) + "\n")
    run_stages(root, until="evaluate")
    return root


def evaluate_folder(root: Path) -> Path:
    return root / "artifacts/evaluate/lenet"


def read_metrics(root: Path) -> dict[str, float]:
    table = pd.read_csv(evaluate_folder(root) / "intervals.csv")
    return dict(zip(table["metric"], table["value"], strict=True))


def test_evaluation_writes_metrics_slices_and_predictions(trained_project: Path) -> None:
    table = pd.read_parquet(evaluate_folder(trained_project) / "predictions.parquet")
    assert list(table.columns[:5]) == ["sha256", "actual", "predicted", "group", "column_site"]
    shown = json.loads((evaluate_folder(trained_project) / "metrics.json").read_text())
    intervals = pd.read_csv(evaluate_folder(trained_project) / "intervals.csv").set_index("metric")
    assert [*shown][:3] == ["val_accuracy", "val_loss", "best_epoch"]
    tested = {name: intervals["value"][name.removeprefix("test_")] for name in [*shown][3:]}
    assert tested == pytest.approx({name: shown[name] for name in tested})
    best = TrainingRecord.load(trained_project / "artifacts/train/lenet/record.json").best
    assert best
    assert [shown[name] for name in [*shown][:3]] == [best.val_accuracy, best.val_loss, best.epoch]
    sliced = pd.read_csv(evaluate_folder(trained_project) / "slices.csv").set_index(["column", "value"])
    assert sliced.loc["site"]["images"].sum() == len(table)
    assert "number" not in sliced.index.get_level_values("column")


def test_metrics_can_be_recomputed_from_the_predictions(trained_project: Path) -> None:
    table = pd.read_parquet(evaluate_folder(trained_project) / "predictions.parquet")
    names = [column for column in table if str(column).startswith("probability_")]
    labels = np.array([names.index(f"probability_{name}") for name in table["actual"]])
    temperature = json.loads((evaluate_folder(trained_project) / "calibration.json").read_text())["temperature"]
    served = table[names].to_numpy()
    again = metrics_with_ci(labels, served, apply_temperature(served, 1 / temperature), table["group"].to_numpy())
    np.testing.assert_allclose(
        again.iloc[:, 1:], pd.read_csv(evaluate_folder(trained_project) / "intervals.csv").iloc[:, 1:], atol=1e-9
    )
    assert slice_metrics(table).to_csv(index=False) == (evaluate_folder(trained_project) / "slices.csv").read_text()


def test_validation_table_has_the_classes_and_the_loss_of_images(trained_project: Path) -> None:
    table = pd.read_parquet(evaluate_folder(trained_project) / "validation.parquet")
    val = Images.load(trained_project / "artifacts/preprocess", "val")
    record = TrainingRecord.load(trained_project / "artifacts/train/lenet/record.json")
    assert list(table["actual"]) == [record.dataset_info.classes[label] for label in val.labels]
    calibration = json.loads((evaluate_folder(trained_project) / "calibration.json").read_text())
    assert table["log_loss"].mean() == pytest.approx(calibration["val_log_loss_uncalibrated"])


def test_temperature_never_makes_validation_worse(trained_project: Path) -> None:
    found = json.loads((evaluate_folder(trained_project) / "calibration.json").read_text())
    assert found["val_log_loss"] <= found["val_log_loss_uncalibrated"]
    assert 0.05 <= found["temperature"] <= 20


def test_temperature_is_fitted_to_the_validation_images(trained_project: Path) -> None:
    found = json.loads((evaluate_folder(trained_project) / "calibration.json").read_text())
    val = Images.load(trained_project / "artifacts/preprocess", "val")
    record = TrainingRecord.load(trained_project / "artifacts/train/lenet/record.json")
    weights = trained_project / "artifacts/train/lenet/weights.safetensors"
    classifier = models.restore("lenet", record.settings, record.dataset_info, weights)
    fit = fit_temperature(val.labels, predict(classifier, val.pixels, 16))
    assert found["temperature"] == pytest.approx(fit.temperature)
    assert found["fitted_temperature"] == pytest.approx(fit.fitted)


def test_flip_averaging_adds_an_accuracy_of_its_own(trained_project: Path) -> None:
    root = trained_project
    before = read_metrics(root)
    params = root / "params.yaml"
    settings = params.read_text()
    params.write_text(settings.replace("flip_average: false", "flip_average: true"))
    try:
        Stage(root, "evaluate", "lenet").run(evaluate)
        found = read_metrics(root)
    finally:
        params.write_text(settings)
        Stage(root, "evaluate", "lenet").run(evaluate)
    test = Images.load(root / "artifacts/preprocess", "test")
    record = TrainingRecord.load(root / "artifacts/train/lenet/record.json")
    weights = root / "artifacts/train/lenet/weights.safetensors"
    classifier = models.restore("lenet", record.settings, record.dataset_info, weights)
    both = [predict(classifier, pixels, 512) for pixels in (test.pixels, test.pixels[:, :, ::-1])]
    expected = (sum(both).argmax(axis=1) == test.labels).mean()
    assert found.pop("accuracy_flip_averaged") == pytest.approx(expected)
    assert found == before


def test_repeated_evaluation_is_bit_identical(trained_project: Path) -> None:
    before = {file.name: file.read_bytes() for file in evaluate_folder(trained_project).iterdir()}
    Stage(trained_project, "evaluate", "lenet").run(evaluate)
    assert {file.name: file.read_bytes() for file in evaluate_folder(trained_project).iterdir()} == before


def test_failed_training_has_headers_and_no_metrics(tmp_path: Path) -> None:
    root = make_project(tmp_path / "project", [*SMALL, "model=[lenet]", "model.lenet.recipe.lr=1e30"])
    run_stages(root, until="evaluate")
    for name in ("metrics", "calibration"):
        assert json.loads((evaluate_folder(root) / f"{name}.json").read_text()) == {}
    headers = {
        "intervals.csv": "metric,value,low,high\n",
        "slices.csv": "column,value,images,too_few_images,accuracy,low,high\n",
        "confusion.csv": "actual,predicted\n",
    }
    for name, text in headers.items():
        assert (evaluate_folder(root) / name).read_text() == text
    assert not len(pd.read_csv(evaluate_folder(root) / "per_class.csv"))
    for name in ("predictions", "validation"):
        assert not len(pd.read_parquet(evaluate_folder(root) / f"{name}.parquet"))
