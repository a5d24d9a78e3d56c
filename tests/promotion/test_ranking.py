"""The ranking on validation images, and the choice of the challenger among equally good architectures."""

import numpy as np
import pandas as pd
import pytest

from convoy.promotion.ranking import ValidatedModel, choose, rank

ACTUAL = np.repeat(np.array(["cat", "dog"], object), [150, 50])


def make_model(name: str, errors: int, loss: float = 0.5, parameters: int = 100, macs: int = 100) -> ValidatedModel:
    """A model that takes so many cats for dogs."""
    predicted = np.where(np.arange(200) < errors, "dog", ACTUAL)
    table = pd.DataFrame({"actual": ACTUAL, "predicted": predicted, "log_loss": loss})
    return ValidatedModel(name, table, parameters, macs)


def test_models_rank_by_accuracy_then_loss_then_name() -> None:
    models = [make_model("vgg", 9), make_model("resnet", 9), make_model("lenet", 9, 0.4), make_model("alexnet", 4, 2)]
    assert [model.name for model in rank(models, "accuracy")] == ["alexnet", "lenet", "resnet", "vgg"]


def test_models_rank_by_the_selected_metric() -> None:
    all_cats = make_model("lenet", 0)
    all_cats.predictions["predicted"] = "cat"
    models = [all_cats, make_model("resnet", 60)]
    assert rank(models, "accuracy")[0].name == "lenet"
    assert rank(models, "balanced_accuracy")[0].name == "resnet"
    assert rank(models, "macro_f1")[0].name == "resnet"


def test_ties_are_reported_and_the_best_is_chosen() -> None:
    ranked = [make_model("vgg", 4), make_model("lenet", 5, parameters=10, macs=10), make_model("resnet", 30)]
    choice = choose(ranked, "accuracy", "best")
    assert choice.name == "vgg"
    assert choice.reason == (
        "vgg is best in validation, with accuracy 0.9800; lenet is within one standard error of it on 200 images"
    )


def test_smaller_of_equally_good_models_is_chosen() -> None:
    ranked = [make_model("vgg", 4), make_model("lenet", 5, parameters=10, macs=10), make_model("resnet", 30)]
    choice = choose(ranked, "accuracy", "small")
    assert choice.name == "lenet"
    assert choice.reason.endswith(
        "; lenet is chosen (register.prefer: small), with 10 instead of 100 parameters and 10 instead of 100 MACs"
    )


@pytest.mark.parametrize(
    "other",
    [
        make_model("worse", 6, parameters=10, macs=10),  # by 2 images, of which one standard error has 1.4
        make_model("slower", 4, parameters=10, macs=101),
        make_model("larger", 4, parameters=101, macs=10),
    ],
    ids=lambda model: model.name,
)
def test_worse_slower_or_larger_model_is_never_preferred(other: ValidatedModel) -> None:
    assert choose([make_model("vgg", 4), other], "accuracy", "small").name == "vgg"


def test_only_model_is_chosen_without_comparison() -> None:
    assert choose([make_model("vgg", 4)], "accuracy", "best").reason == (
        "vgg is best in validation, with accuracy 0.9800"
    )
