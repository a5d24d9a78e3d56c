"""The two-sample test of drift, and the embeddings that it compares."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from convoy.core.errors import ConvoyError
from convoy.monitoring.drift import MAX_IMAGES, MIN_IMAGES, detect_drift, measure_unusualness, sample_rows
from convoy.monitoring.embedding import embed
from convoy.reporting.unusual_images import draw_unusual
from model_fixtures import build, make_images


def draw_embeddings(count: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (count, 8))


def test_images_of_one_distribution_seldom_raise_an_alarm() -> None:
    p_values = [
        detect_drift(draw_embeddings(60, seed), draw_embeddings(40, seed + 100), 1).p_value for seed in range(20)
    ]
    # 3 or fewer of 20 at alpha = 0.05 in 98 % of cases; these seeds are fixed.
    assert sum(p <= 0.05 for p in p_values) <= 3
    assert max(p_values) > 0.5


def test_shifted_images_are_detected_with_a_larger_effect() -> None:
    small, large = (detect_drift(draw_embeddings(60, 1), draw_embeddings(40, 2, by), 1) for by in (1, 9))
    assert small.p_value < 0.01 and large.p_value < 0.01
    assert 0 < small.effect < large.effect <= 1


def test_equal_embeddings_are_no_drift() -> None:
    found = detect_drift(np.zeros((30, 4)), np.zeros((20, 4)), 1)
    assert (found.p_value, found.effect) == (1.0, 0.0)


def test_image_far_from_the_reference_is_the_most_unusual() -> None:
    new = draw_embeddings(30, 2)
    new[17] += 20
    unusualness = detect_drift(draw_embeddings(60, 1), new, 1).unusualness
    assert unusualness.argmax() == 17
    assert 0.5 < np.median(unusualness) < 2


def test_unusualness_is_a_multiple_of_the_usual_distance() -> None:
    # The fifth nearest of the others is at a distance of 3 for most numbers of the reference.
    reference, new = np.arange(1000.0)[:, None], np.array([[500.0], [2000.0]])
    pooled = np.concatenate([new, reference])
    assert measure_unusualness(abs(pooled - pooled.T), len(new)).tolist() == [2 / 3, 1005 / 3]


@pytest.mark.parametrize("counts", [(MIN_IMAGES, MIN_IMAGES - 1), (MIN_IMAGES - 1, MIN_IMAGES)])
def test_too_few_images_are_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(ConvoyError, match=rf"^{MIN_IMAGES - 1} (new|reference) images are too few"):
        detect_drift(*(draw_embeddings(count, 1) for count in counts), 1)


def test_more_images_are_reduced_to_a_sample() -> None:
    assert list(sample_rows(5, 1)) == [0, 1, 2, 3, 4]
    rows = sample_rows(MAX_IMAGES + 50, 1)
    assert len(set(rows)) == MAX_IMAGES and list(rows) == sorted(rows)


@pytest.mark.parametrize(
    ("name", "last"), [("lenet", "output"), ("googlenet", "classifier.1"), ("resnet", "classifier")]
)
def test_embedding_is_what_the_last_layer_sees(name: str, last: str) -> None:
    classifier, images = build(name).eval(), make_images(5)
    embeddings, predicted = embed(classifier, images.numpy(), batch_size=2)
    layer = classifier.get_submodule(last)
    assert isinstance(layer, nn.Linear)
    with torch.inference_mode():
        expected = classifier(images)
        torch.testing.assert_close(layer(torch.tensor(embeddings)), expected)
    assert predicted.tolist() == expected.argmax(dim=1).tolist()


def test_picture_shows_the_most_unusual_images(tmp_path: Path) -> None:
    images = [np.full((8, 8, 1), value, np.uint8) for value in range(40)]
    names = [f"folder/a rather long name of an image {number} $x.png" for number in range(40)]
    draw_unusual(names, images, np.arange(40.0), tmp_path / "new/unusual.png", "The most unusual")
    with Image.open(tmp_path / "new/unusual.png") as picture:
        assert picture.width > 900 and picture.height > 800
