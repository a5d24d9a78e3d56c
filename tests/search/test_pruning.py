"""The callback of a trial: it reports each epoch, and ends a training that is to be pruned."""

import optuna
import pytest
from optuna.pruners import NopPruner, ThresholdPruner

from convoy.search.pruning import ReportTrial
from training_fixtures import build, train


def ask(pruner: optuna.pruners.BasePruner) -> optuna.Trial:
    return optuna.create_study(direction="maximize", pruner=pruner).ask()


def test_every_epoch_is_reported_and_the_result_the_same() -> None:
    trial = ask(NopPruner())
    reported = train(build(), callbacks=[ReportTrial(trial, "accuracy")])
    values = trial.study.trials[0].intermediate_values
    assert values == {row["epoch"]: row["val_accuracy"] for row in reported.history}
    assert reported.history == train(build()).history


@pytest.mark.parametrize(
    ("pruner", "deadline"), [(ThresholdPruner(lower=1.1), None), (NopPruner(), 0.0)], ids=["poor", "late"]
)
def test_training_is_pruned_after_its_epoch(pruner: optuna.pruners.BasePruner, deadline: float | None) -> None:
    callback = ReportTrial(ask(pruner), "accuracy", deadline)
    with pytest.raises(optuna.TrialPruned):
        train(build(), callbacks=[callback])
    assert [row["epoch"] for row in callback.rows] == [1]


def test_last_epoch_is_not_pruned() -> None:
    train(build(), callbacks=[ReportTrial(ask(ThresholdPruner(lower=1.1)), "accuracy")], max_epochs=1)
