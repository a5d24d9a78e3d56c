"""Promotion: the challenger is the best by validation."""

from convoy.promotion import rank


def scored(accuracy: float, loss: float = 0.5) -> dict[str, float]:
    return {"val_accuracy": accuracy, "val_loss": loss}


def test_the_highest_validation_accuracy_comes_first_then_the_lowest_loss_then_the_name() -> None:
    best = {"vgg": scored(0.9), "resnet": scored(0.9), "lenet": scored(0.9, loss=0.4), "alexnet": scored(0.95, loss=2)}
    assert rank(best) == ["alexnet", "lenet", "resnet", "vgg"]


def test_test_figures_take_no_part() -> None:
    best = {"vgg": scored(0.9) | {"test_accuracy": 0.1}, "lenet": scored(0.8) | {"test_accuracy": 1.0}}
    assert rank(best)[0] == "vgg"
