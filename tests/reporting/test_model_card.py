"""The model card: it says what the model is and how to call it."""

from convoy.data.packed.dataset_info import DatasetInfo
from convoy.reporting.model_card import MAX_LISTED_CLASSES, describe_model
from record_factory import make_record


def test_card_names_the_classes_data_and_call() -> None:
    card = describe_model("pets", make_record())
    assert "one of 2 classes: `0`, `1`." in card
    assert "`digits@a99769f9303d` (1,797 images" in card
    assert 'mlflow.pyfunc.load_model("models:/pets@champion")' in card
    assert "32x32 pixels, grey" in card


def test_card_of_many_classes_lists_the_first() -> None:
    info = DatasetInfo("many", [str(number) for number in range(1000)], 32, 3, [0.5] * 3, [0.25] * 3)
    card = describe_model("many", make_record(dataset_info=info))
    assert f"`{MAX_LISTED_CLASSES - 1}` and {1000 - MAX_LISTED_CLASSES} more." in card
