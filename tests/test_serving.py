"""Serving: the registered model takes plain images in every form that its documentation promises."""

import base64
import io
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from mlflow.exceptions import MlflowException
from PIL import Image
from project import REAL
from safetensors.torch import save_file

from convoy import models
from convoy.serving import ImageClassifier
from convoy.task import Task

CLASSES = ["cat", "dog", "fox"]


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "rgb"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageClassifier:
    """An untrained LeNet behind the model that MLflow loads."""
    folder = tmp_path_factory.mktemp("served")
    settings = yaml.safe_load((REAL / "conf/model/lenet.yaml").read_text())["lenet"]
    channels = request.param
    task = {"dataset": "pets", "classes": CLASSES, "size": 32, "channels": channels}
    task |= {"mean": [0.5] * channels, "std": [0.25] * channels}
    torch.manual_seed(0)
    save_file(models.build("lenet", settings, Task(**task)).state_dict(), folder / "weights.safetensors")
    (folder / "record.json").write_text(json.dumps({"architecture": "lenet", "settings": settings, "task": task}))
    model = ImageClassifier()
    files = {"record": folder / "record.json", "weights": folder / "weights.safetensors"}
    model.load_context(SimpleNamespace(artifacts={name: str(file) for name, file in files.items()}))
    return model


def picture(height: int = 40, width: int = 60, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def probabilities(served: ImageClassifier, model_input: object) -> np.ndarray:
    return np.array(served.predict(None, model_input)["probabilities"].tolist())


def test_an_answer_is_the_likeliest_class_with_its_probability(served: ImageClassifier) -> None:
    answer = served.predict(None, [picture(), picture(32, 32)])
    assert list(answer.columns) == ["label", "probability", "probabilities"]
    for row in answer.itertuples():
        assert sum(row.probabilities) == pytest.approx(1)
        assert row.probability == max(row.probabilities)
        assert row.label == CLASSES[row.probabilities.index(row.probability)]


def test_the_same_picture_gets_the_same_answer_in_every_form(served: ImageClassifier) -> None:
    rgb = picture()
    expected = probabilities(served, [rgb])
    text = base64.b64encode(png(rgb)).decode()
    forms = [rgb, rgb[None], [png(rgb)], png(rgb), text, [text], pd.DataFrame({"image": [png(rgb)]})]
    forms += [pd.DataFrame({"image": [text]}), rgb.astype(np.int64), [rgb.tolist()]]
    for form in forms:
        np.testing.assert_array_equal(probabilities(served, form), expected)


def test_grey_pictures_come_with_or_without_a_channel_axis(served: ImageClassifier) -> None:
    grey = picture(channels=1)
    expected = probabilities(served, [grey])
    for form in (grey[:, :, 0], grey, grey[None], grey[None, :, :, 0], np.repeat(grey, 3, axis=2)):
        np.testing.assert_allclose(probabilities(served, form), expected, atol=1e-6)


def test_what_is_transparent_counts_as_white(served: ImageClassifier) -> None:
    hidden = picture(channels=4)
    hidden[:, :, 3] = 0
    white = np.full((40, 60, 3), 255, np.uint8)
    np.testing.assert_array_equal(probabilities(served, hidden), probabilities(served, white))


def test_pictures_of_any_sizes_are_answered_together(served: ImageClassifier) -> None:
    together = probabilities(served, [picture(20, 30), picture(32, 32), picture(500, 100, 1)])
    alone = np.concatenate(
        [probabilities(served, [p]) for p in (picture(20, 30), picture(32, 32), picture(500, 100, 1))]
    )
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_no_pictures_get_no_answers(served: ImageClassifier) -> None:
    assert len(served.predict(None, [])) == 0


@pytest.mark.parametrize(
    ("model_input", "said"),
    [
        (picture() / 255, "whole numbers from 0 to 255"),
        ([picture().astype(np.int32) + 200], "whole numbers from 0 to 255"),
        ([np.zeros((4, 5, 6, 7), np.uint8)], "it must be"),
        ([np.zeros((0, 5), np.uint8)], "has no pixels"),
        ([b"no image at all"], "is not an image"),
        ("no base64!", "not the base64 of an image file"),
        ([None], "whole numbers"),
    ],
)
def test_what_is_no_picture_gets_a_clear_message(served: ImageClassifier, model_input: object, said: str) -> None:
    with pytest.raises(MlflowException, match=said) as raised:
        served.predict(None, model_input)
    assert raised.value.get_http_status_code() == 400
