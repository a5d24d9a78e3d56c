"""The gate: it promotes what is shown to be better, holds what is not, and rejects what does harm."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convoy.core.config import SelectionMetric, validate
from convoy.core.errors import ConvoyError
from convoy.evaluation.metrics import calibration_error, calibration_noise
from convoy.promotion.config import GateConfig
from convoy.promotion.evidence import ModelEvidence
from convoy.promotion.gate import fingerprint_test_images
from convoy.promotion.statistics import (
    is_better,
    is_non_inferior,
)
from gate_fixtures import (
    CLASSES,
    IMAGES,
    QUICK,
    RULE,
    counts,
    find_result,
    group_images,
    list_checks,
    make_evidence,
    make_pair,
    make_predictions,
    make_rule,
    rename_classes,
    run_gate,
)

# Really better


def test_better_challenger_is_promoted() -> None:
    verdict = run_gate(*make_pair(30, 5))
    assert verdict.decision == "PROMOTE"
    assert list_checks(verdict, "hold", "reject", "warn") == []
    assert "resnet is better than the champion vgg: 30 images won, 5 lost (p = 1.1" in verdict.summary()
    assert find_result(verdict, "difference").value == pytest.approx(25 / IMAGES)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (12, 12), (7, 5), (5, 7), (1, 0)])
def test_tie_or_a_little_luck_is_held(wins: int, losses: int) -> None:
    verdict = run_gate(*make_pair(wins, losses))
    assert verdict.decision == "HOLD"
    assert list_checks(verdict, "hold", "reject") == ["better"]


def test_summary_names_the_deciding_check() -> None:
    assert run_gate(*make_pair(7, 5)).summary() == (
        "HOLD: resnet is not shown to be better than the champion vgg: 7 images won, 5 lost (p = 0.387 by"
        " McNemar's test, limit 0.05); 600 test images can show a gain of about 0.0144 in accuracy"
    )


def test_worse_challenger_is_rejected() -> None:
    verdict = run_gate(*make_pair(5, 30))
    assert verdict.decision == "REJECT"
    assert "better" in list_checks(verdict, "reject")
    assert "resnet is worse than the champion vgg: 5 images won, 30 lost" in verdict.summary()


def test_stricter_alpha_does_not_soften_the_tests_for_harm() -> None:
    assert find_result(run_gate(*make_pair(10, 22), make_rule(alpha=0.0001)), "better").outcome == "reject"


@QUICK
@given(counts, counts, st.floats(0.001, 0.4))
def test_two_models_are_never_both_promoted_over_each_other(wins: int, losses: int, alpha: float) -> None:
    new, old = make_pair(wins, losses, images=200)
    rule = make_rule(alpha=alpha, min_test_images=100)
    assert [run_gate(new, old, rule).decision, run_gate(old, new, rule).decision].count("PROMOTE") <= 1


def test_equal_models_pass_no_more_often_than_alpha_says() -> None:
    random = np.random.default_rng(0)
    won = random.binomial(40, 0.5, 100_000)
    assert 0.01 < is_better(won, 40 - won, 0.05).mean() <= 0.05


# Enough data


def test_too_few_test_images_give_no_promotion() -> None:
    for wins, losses in ((40, 0), (0, 40)):
        verdict = run_gate(*make_pair(wins, losses, images=499))
        assert verdict.decision == "HOLD"
        assert verdict.summary().startswith("HOLD: 499 test images, at least 500 are needed")
    assert run_gate(*make_pair(40, 0, images=500)).decision == "PROMOTE"


def test_every_verdict_reports_the_smallest_detectable_gain() -> None:
    gain = find_result(run_gate(*make_pair(15, 9)), "detectable gain").value
    assert gain == pytest.approx(2.5 * math.sqrt(24 / IMAGES / IMAGES), rel=0.01)
    for old in (make_pair(0, 0)[1], None):  # where nobody disagrees, it isn't 0
        assert find_result(run_gate(make_pair(0, 0)[0], old, is_first=old is None), "detectable gain").value > 0  # type: ignore[operator]


def test_too_many_test_set_evaluations_give_a_warning() -> None:
    new, old = make_pair(30, 5)
    assert find_result(run_gate(new, old, uses=20), "test set uses").message == "evaluation 20 on these test images"
    assert find_result(run_gate(new, old, uses=20), "test set uses").outcome == "info"
    late = run_gate(new, old, uses=21)
    assert late.decision == "PROMOTE"
    assert "evaluation 21 on these test images, more than the limit of 20: add new test images" in late.summary()
    for uses in (0, math.nan):
        with pytest.raises(ConvoyError, match="this evaluation counts as well"):
            run_gate(new, old, uses=uses)  # type: ignore[arg-type]


def test_set_of_test_images_has_one_fingerprint_in_any_order() -> None:
    table = make_pair(0, 0)[0].predictions
    assert fingerprint_test_images(table) == fingerprint_test_images(table.iloc[::-1])
    assert fingerprint_test_images(table) != fingerprint_test_images(table.iloc[1:])


# Floors


def test_challenger_below_the_floor_is_rejected_even_if_better() -> None:
    verdict = run_gate(*make_pair(30, 5), make_rule(min_accuracy=0.95))
    assert verdict.decision == "REJECT"
    assert "resnet has test accuracy 0.9417, minimum 0.95" in verdict.summary()


def test_score_at_the_floor_passes() -> None:
    assert run_gate(*make_pair(30, 0), make_rule(min_accuracy=0.95)).decision == "PROMOTE"


def test_challenger_no_better_than_majority_class_is_rejected() -> None:
    actual = ["cat"] * 550 + ["NA"] * 50
    lazy = make_evidence("lazy", make_predictions(["cat"] * 600, actual))
    verdict = run_gate(lazy, None, is_first=True)
    assert verdict.decision == "REJECT"
    assert list_checks(verdict, "reject") == ["majority class"]


def test_class_that_only_the_champion_predicts_is_missed() -> None:
    actual = np.array(["cat"] * 500 + ["NA"] * 100 + ["007"] * 5)
    champion = np.where(np.arange(605) < 60, "NA", actual)
    silent = np.where(actual == "007", "cat", actual)
    new, old = (
        make_evidence("resnet", make_predictions(silent, actual)),
        make_evidence("vgg", make_predictions(champion, actual)),
    )
    few = run_gate(new, old)
    assert few.decision == "HOLD"  # of five images there is too little to see
    assert "resnet never predicts '007', and vgg does" in few.summary()
    assert run_gate(new, old, make_rule(acknowledged_class_changes=["007"])).decision == "PROMOTE"
    assert run_gate(new, old, make_rule(min_images_per_class=5)).decision == "REJECT"
    assert (
        run_gate(new, old, make_rule(min_images_per_class=5, acknowledged_class_changes=["007"])).decision == "REJECT"
    )


# No class hurt


def test_better_on_average_but_with_one_class_ruined_is_rejected() -> None:
    actual = np.array(["cat"] * 900 + ["NA"] * 100)
    number = np.arange(1000)
    champion = np.where(number < 90, "NA", actual)
    ruined = np.where(number >= 960, "cat", actual)
    new = make_evidence("resnet", make_predictions(ruined, actual, CLASSES[1:]))
    verdict = run_gate(new, make_evidence("vgg", make_predictions(champion, actual, CLASSES[1:])))
    assert verdict.decision == "REJECT"
    assert list_checks(verdict, "reject") == ["recall drop"]
    assert find_result(verdict, "recall drop").value == pytest.approx(0.4)
    assert "the recall drops for 'NA' by 0.4000 (0 won, 40 lost" in verdict.summary()


@pytest.mark.parametrize(
    ("lost", "max_recall_drop", "outcome"),
    [
        (5, 0.0, "pass"),  # p = 1/32, and with three classes the limit is 1/60
        (6, 0.0, "reject"),  # p = 1/64
        (6, 0.03, "pass"),  # 6 of 200 images are no more than this
    ],
)
def test_class_is_hurt_where_its_drop_is_large_and_no_chance(lost: int, max_recall_drop: float, outcome: str) -> None:
    new, old = make_pair(0, 0, wrong=0)
    predicted = new.predictions["predicted"].mask(np.isin(np.arange(IMAGES), np.arange(lost) * 3), "cat")
    fallen = dataclasses.replace(new, predictions=make_predictions(predicted, new.predictions["actual"]))
    assert (
        find_result(run_gate(fallen, old, make_rule(max_recall_drop=max_recall_drop)), "recall drop").outcome == outcome
    )


def test_classes_with_few_test_images_are_named_as_unguarded() -> None:
    new, old = make_pair(30, 5)
    verdict = run_gate(new, old, make_rule(min_images_per_class=201))
    assert verdict.decision == "PROMOTE"
    assert list_checks(run_gate(new, old, make_rule(min_images_per_class=200)), "warn") == []
    assert "recall not checked, with fewer than 201 test images: '007', 'NA', 'cat'" in verdict.summary()
    assert find_result(verdict, "recall drop").outcome == "info"


# Probabilities


def test_higher_accuracy_with_far_worse_loss_is_rejected() -> None:
    new, old = make_pair(30, 5)
    predictions = new.predictions
    sure = make_predictions(predictions["predicted"], predictions["actual"], sure=1 - 1e-6)
    verdict = run_gate(dataclasses.replace(new, predictions=sure), old)
    assert list_checks(verdict, "reject") == ["log loss"]
    assert verdict.decision == "REJECT"


def test_zero_probability_gives_a_large_finite_loss() -> None:
    new, old = make_pair(30, 5)
    certain = make_predictions(new.predictions["predicted"], new.predictions["actual"], sure=1.0)
    assert math.isfinite(
        find_result(run_gate(dataclasses.replace(new, predictions=certain), old), "log loss").value or 0
    )


def test_perfect_model_shows_a_calibration_error_that_is_noise() -> None:
    random = np.random.default_rng(0)
    confidence = random.uniform(0.6, 1, 500)
    noise = calibration_noise(confidence, seed=0)
    assert 0.02 < noise < 0.06
    assert float(calibration_error(confidence, random.random(500) < confidence)) == pytest.approx(noise, abs=0.03)
    assert float(calibration_error(confidence, np.zeros(500, bool))) == pytest.approx(confidence.mean())


def test_calibration_is_shown_but_decides_nothing() -> None:
    assert find_result(run_gate(*make_pair(30, 5)), "calibration").passed is None


# Groups


def test_gain_from_one_group_is_held() -> None:
    new, old = make_pair(30, 5)
    one = np.where(np.arange(IMAGES) < 30, "one film", "")
    film = dataclasses.replace(new, predictions=new.predictions.assign(group=one))
    verdict = run_gate(film, old)
    assert verdict.decision == "HOLD"
    assert list_checks(verdict, "hold") == ["group bootstrap"]
    many = np.array([f"film {number // 2}" for number in range(IMAGES)])
    assert run_gate(dataclasses.replace(new, predictions=new.predictions.assign(group=many)), old).decision == "PROMOTE"


def test_groups_without_repeats_change_nothing() -> None:
    new, old = make_pair(30, 5)
    alone = dataclasses.replace(new, predictions=new.predictions.assign(group=""))
    assert run_gate(alone, old) == run_gate(new, old)


def test_groups_that_contradict_each_other_are_an_error() -> None:
    new, old = (
        dataclasses.replace(model, predictions=model.predictions.assign(group=name))
        for model, name in zip(make_pair(30, 5), ("a", "b"), strict=True)
    )
    with pytest.raises(ConvoyError, match="different groups"):
        run_gate(new, old)


# Non-inferior


def test_non_inferior_refresh_passes_in_refresh_mode() -> None:
    new, old = make_pair(12, 12)
    refresh = make_rule(mode="non_inferior")
    assert run_gate(new, old).decision == "HOLD"
    assert run_gate(new, old, refresh, best_champion=old).decision == "PROMOTE"
    assert run_gate(*make_pair(11, 12), refresh, best_champion=old).decision == "HOLD"  # below on the sample
    narrow = make_rule(mode="non_inferior", margin=0.005)
    assert run_gate(new, old, narrow, best_champion=old).decision == "HOLD"  # could lack more
    assert run_gate(*make_pair(5, 30), refresh, best_champion=old).decision == "REJECT"


def test_hold_of_non_inferior_names_the_failed_check() -> None:
    new, old = make_pair(11, 12)
    below = run_gate(new, old, make_rule(mode="non_inferior"), best_champion=old)
    assert list_checks(below, "hold") == ["accuracy not lower"]
    assert find_result(below, "non-inferior").passed
    assert below.summary().startswith(
        "HOLD: the accuracy of resnet, 0.9300, is below that of the champion vgg, 0.9317; 600 test images"
    )
    new, old = make_pair(12, 12)
    uncertain = run_gate(new, old, make_rule(mode="non_inferior", margin=0.005), best_champion=old)
    assert list_checks(uncertain, "hold") == ["non-inferior"]
    assert "resnet is not shown to be non-inferior to the champion vgg: 12 images won, 12 lost" in uncertain.summary()
    assert "limit -0.005)" in uncertain.summary()


def test_refresh_is_held_against_the_best_champion_ever_too() -> None:
    new, old = make_pair(12, 12)
    refresh = make_rule(mode="non_inferior")
    best = dataclasses.replace(make_pair(0, 0, wrong=10)[0], name="googlenet")
    slow_decline = run_gate(new, old, refresh, best_champion=best)
    assert slow_decline.decision == "REJECT"
    assert "resnet is worse than the best champion so far, googlenet" in slow_decline.summary()
    unknown = run_gate(new, old, refresh)
    assert unknown.decision == "HOLD"
    assert list_checks(unknown, "hold") == ["best champion"]


def test_clear_gain_is_non_inferior() -> None:
    assert bool(is_non_inferior(30, 5, 600, 0.05, 0.02))


# Imbalanced classes


def make_imbalanced(wins: dict[str, int], losses: dict[str, int]) -> tuple[ModelEvidence, ModelEvidence]:
    """Challenger and champion that alone are right so often on 500 cats and on 50 images of each other class."""
    actual = np.repeat(np.array(CLASSES, object), [50, 50, 500])
    predicted = [actual.copy(), actual.copy()]
    for model, lost in zip(predicted, (losses, wins), strict=True):
        for name, count in lost.items():
            rows = (actual == name).nonzero()[0]
            model[rows[:count] if model is predicted[0] else rows[-count:]] = "cat" if name != "cat" else "NA"
    new, old = (make_predictions(model, actual) for model in predicted)
    return make_evidence("resnet", new), make_evidence("vgg", old)


def test_gain_in_a_rare_class_counts_in_balanced_accuracy() -> None:
    models = make_imbalanced(wins={"NA": 15}, losses={"cat": 20})
    assert run_gate(*models).decision == "HOLD"
    verdict = run_gate(*models, metric="balanced_accuracy")
    assert verdict.decision == "PROMOTE"
    assert find_result(verdict, "better").message.startswith(
        "resnet is better than the champion vgg in balanced accuracy: 0.9867 against 0.9000, 15 images won, 20 lost (p"
    )
    assert find_result(verdict, "balanced accuracy").value == pytest.approx(1 - 20 / 500 / 3)
    assert "in balanced accuracy" in find_result(verdict, "detectable gain").message


def test_gain_in_a_frequent_class_does_not_offset_a_rare_one() -> None:
    new, old = make_imbalanced(wins={"cat": 60}, losses={"NA": 3, "007": 3})
    assert run_gate(new, old, make_rule(max_recall_drop=0.1)).decision == "PROMOTE"
    assert run_gate(new, old, metric="balanced_accuracy").decision == "HOLD"
    refresh = make_rule(mode="non_inferior", margin=0.01)
    verdict = run_gate(new, old, refresh, metric="balanced_accuracy", best_champion=old)
    assert find_result(verdict, "balanced accuracy not lower").passed
    assert list_checks(verdict, "hold") == ["non-inferior"]


@pytest.mark.parametrize("metric", ["balanced_accuracy", "macro_f1"])
def test_drop_in_a_rare_class_is_rejected(metric: SelectionMetric) -> None:
    models = make_imbalanced(wins={"cat": 6}, losses={"NA": 12})
    verdict = run_gate(*models, make_rule(max_recall_drop=1.0), metric=metric)
    assert list_checks(verdict, "reject") == ["better"]
    assert f"is worse than the champion vgg in {metric.replace('_f', ' F').replace('_', ' ')}" in verdict.summary()


def test_always_predicting_one_class_is_no_balanced_accuracy() -> None:
    actual = np.repeat(np.array(CLASSES, object), [50, 50, 500])
    constant = make_evidence("lenet", make_predictions(np.full(600, "cat", object), actual))
    verdict = run_gate(constant, None, make_rule(min_accuracy=0.0), metric="balanced_accuracy", is_first=True)
    assert find_result(verdict, "majority class").limit == "above 0.3333"
    assert verdict.decision == "REJECT"


def test_groups_are_resampled_in_the_selected_metric() -> None:
    models = make_imbalanced(wins={"NA": 15}, losses={"cat": 20})
    films = np.arange(600) // 25
    grouped = [group_images(model, np.array([f"film {film}" for film in films], object)) for model in models]
    verdict = run_gate(*grouped, metric="balanced_accuracy")
    assert list_checks(verdict, "hold") == ["group bootstrap"]


# Size and latency


def test_over_budget_is_rejected_and_unmeasured_is_held() -> None:
    new, old = make_pair(30, 5)

    def decision(parameters: int | None, latency: float | None, budgets: GateConfig) -> str:
        model = dataclasses.replace(new, parameters=parameters, latency=latency)
        return run_gate(model, dataclasses.replace(old, latency=10.0), budgets).decision

    size, time = make_rule(max_parameters=1000), make_rule(max_latency_ratio=1.5)
    assert [decision(number, None, size) for number in (1000, 1001, None)] == ["PROMOTE", "REJECT", "HOLD"]
    assert [decision(None, number, time) for number in (15.0, 15.1, None)] == ["PROMOTE", "REJECT", "HOLD"]
    assert run_gate(dataclasses.replace(new, latency=1.0), old, time).decision == "HOLD"
    assert run_gate(new, old).decision == "PROMOTE"
    assert find_result(run_gate(new, old, size), "parameters").message == "the parameters were not counted, limit 1000"


@pytest.mark.parametrize("broken", [math.nan, math.inf, -1, 0])
@pytest.mark.parametrize("what", ["parameters", "latency"])
def test_nan_measurement_is_an_error(what: str, broken: float) -> None:
    new, old = make_pair(30, 5)
    with pytest.raises(ConvoyError, match=f"{what} of (resnet|vgg) is {broken}"):
        run_gate(new, dataclasses.replace(old, **{what: broken}))  # type: ignore[arg-type]


# Added and removed classes


def test_classes_that_came_or_went_need_an_acknowledgement() -> None:
    new, old = make_pair(30, 5)
    grown, wider = rename_classes(new, [*CLASSES, "dog"]), rename_classes(old, ["", *CLASSES])
    verdict = run_gate(grown, wider)
    assert verdict.decision == "HOLD"
    assert (
        "classes changed since vgg, 'dog' added and '' removed: if that is intended, add 'dog', ''" in verdict.summary()
    )
    assert run_gate(grown, wider, make_rule(acknowledged_class_changes=["dog"])).decision == "HOLD"
    assert run_gate(grown, wider, make_rule(acknowledged_class_changes=["dog", ""])).decision == "PROMOTE"


def test_unused_acknowledgement_is_reported() -> None:
    verdict = run_gate(*make_pair(30, 5), make_rule(acknowledged_class_changes=["dog"]))
    assert verdict.decision == "PROMOTE"
    assert "'dog' in register.gate.acknowledged_class_changes is neither added nor removed" in verdict.summary()


def test_gain_on_a_new_class_does_not_offset_losses() -> None:
    actual = np.array(CLASSES * 200 + ["dog"] * 100, object)
    champion = np.where(actual == "dog", "cat", actual)
    everywhere = np.where(np.arange(700) % 20 == 0, "dog", actual)
    new = make_evidence("resnet", make_predictions(everywhere, actual, [*CLASSES, "dog"]))
    verdict = run_gate(
        new, make_evidence("vgg", make_predictions(champion, actual)), make_rule(acknowledged_class_changes=["dog"])
    )
    assert find_result(verdict, "better").outcome == "pass"
    assert "shared classes" in list_checks(verdict, "reject")
    assert verdict.decision == "REJECT"


def test_images_of_a_removed_class_count_as_wrong() -> None:
    actual = np.array(CLASSES * 200, object)
    fewer = np.where(actual == "cat", "NA", actual)
    new, old = (
        make_evidence("resnet", make_predictions(fewer, actual, CLASSES[:2])),
        make_evidence("vgg", make_predictions(actual, actual)),
    )
    assert run_gate(new, old, make_rule(acknowledged_class_changes=["cat"])).decision == "REJECT"


# First run


def test_first_champion_passes_the_applicable_checks() -> None:
    new, _ = make_pair(0, 0)
    verdict = run_gate(new, None, is_first=True)
    assert verdict.decision == "PROMOTE"
    assert "resnet may become the first champion, with test accuracy 0.9500" in verdict.summary()


@pytest.mark.parametrize(
    ("rule", "decision"),
    [
        (make_rule(min_accuracy=0.96), "REJECT"),
        (make_rule(min_test_images=601), "HOLD"),
        (make_rule(max_parameters=1), "HOLD"),
        (make_rule(max_latency_ratio=1.0), "PROMOTE"),  # there is nothing to divide by
    ],
)
def test_first_champion_must_pass_too(rule: GateConfig, decision: str) -> None:
    assert run_gate(make_pair(0, 0)[0], None, rule, is_first=True).decision == decision


def test_missing_champion_is_never_a_first_run() -> None:
    new, old = make_pair(30, 5)
    with pytest.raises(ConvoyError, match="the champion is missing or unreadable"):
        run_gate(new, None)
    with pytest.raises(ConvoyError, match="there is a champion, vgg: pass is_first=False"):
        run_gate(new, old, is_first=True)
    with pytest.raises(ConvoyError, match="there was a champion, vgg: pass is_first=False"):
        run_gate(new, None, is_first=True, best_champion=old)


# Settings and report


def test_non_numeric_or_out_of_range_settings_are_refused() -> None:
    good = dataclasses.asdict(RULE)
    assert validate(GateConfig, good, "gate") == RULE
    for key, value in (
        ("alpha", math.nan),
        ("alpha", 0.5),
        ("min_accuracy", math.nan),
        ("mode", "any"),
        ("acknowledged_class_changes", [7]),
    ):
        with pytest.raises(ConvoyError, match=f"gate.{key}"):
            validate(GateConfig, good | {key: value}, "gate")


def test_table_has_a_number_and_a_limit_in_every_row() -> None:
    table = run_gate(*make_pair(30, 5)).table()
    assert list(table.columns) == ["check", "value", "limit", "outcome", "message"]
    assert table["check"].is_unique
    assert (table[["value", "limit", "message"]] != "").all(axis=None)
    assert table.set_index("check")["value"]["test images"] == "600"


def test_verdict_can_be_kept_as_json() -> None:
    verdict = run_gate(*make_pair(30, 5), make_rule(mode="non_inferior"))
    assert json.loads(json.dumps(dataclasses.asdict(verdict)))["decision"] == verdict.decision


def test_groups_of_a_refresh_may_lack_the_margin_and_no_more() -> None:
    films = np.array([f"film {number // 2}" for number in range(IMAGES)])
    new, old = (group_images(model, films) for model in make_pair(12, 12))
    refresh = make_rule(mode="non_inferior", margin=0.05)
    assert run_gate(new, old, refresh, best_champion=old).decision == "PROMOTE"
    narrow = run_gate(new, old, make_rule(mode="non_inferior", margin=0.001), best_champion=old)
    assert "group bootstrap" in list_checks(narrow, "hold")


def test_worse_loss_from_one_group_is_no_proof() -> None:
    new, old = make_pair(30, 5)
    doubts = np.arange(IMAGES) >= 400
    table = new.predictions.copy()
    columns = [column for column in table if column.startswith("probability_")]
    table.loc[doubts, columns] = np.where(table.loc[doubts, columns] > 0.5, 0.4, 0.3)
    new = dataclasses.replace(new, predictions=table)
    assert find_result(run_gate(new, old), "log loss").outcome == "reject"
    films = np.where(doubts, "one film", [f"film {number // 2}" for number in range(IMAGES)])
    assert find_result(run_gate(group_images(new, films), group_images(old, films)), "log loss").outcome == "pass"
