"""Temperature scaling: it finds a planted temperature and never raises the loss of its images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convoy.evaluation.calibration import apply_temperature, fit_temperature, per_image_log_loss


def softmax(logits: np.ndarray) -> np.ndarray:
    scaled = np.exp(logits - logits.max(axis=1, keepdims=True))
    return scaled / scaled.sum(axis=1, keepdims=True)


def draw_labels(seed: int, images: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """labels (N,), and the logits (N, K) that they were drawn by."""
    random = np.random.default_rng(seed)
    logits = 2 * random.normal(size=(images, classes))
    labels = (softmax(logits).cumsum(axis=1) < random.random((images, 1))).sum(axis=1)
    return np.minimum(labels, classes - 1), logits


@pytest.mark.parametrize("planted", [0.3, 1.0, 2.5, 8.0])
def test_planted_temperature_is_found(planted: float) -> None:
    labels, logits = draw_labels(0, 5000, 7)
    assert fit_temperature(labels, softmax(logits * planted)) == pytest.approx(planted, rel=0.05)


def test_temperature_divides_the_logits() -> None:
    _, logits = draw_labels(0, 50, 7)
    for temperature in (0.1, 1.0, 7.0):
        np.testing.assert_allclose(
            apply_temperature(softmax(logits), temperature), softmax(logits / temperature), atol=1e-12
        )
        back = apply_temperature(apply_temperature(softmax(logits), temperature), 1 / temperature)
        np.testing.assert_allclose(back, softmax(logits), atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 12), st.floats(0.01, 200), st.booleans())
def test_temperature_never_raises_loss_nor_changes_predictions(
    seed: int, images: int, classes: int, sharpness: float, shuffled: bool
) -> None:
    labels, logits = draw_labels(seed, images, classes)
    probabilities = softmax((logits * sharpness).astype(np.float32).astype(float))
    labels = labels[::-1] if shuffled else labels
    temperature = fit_temperature(labels, probabilities)
    after = apply_temperature(probabilities, temperature)
    assert 0.05 <= temperature <= 20
    assert per_image_log_loss(labels, after).mean() <= per_image_log_loss(labels, probabilities).mean()
    assert (after.argmax(axis=1) == probabilities.argmax(axis=1)).all()
    assert after.sum(axis=1) == pytest.approx(np.ones(images))


def test_few_correct_predictions_do_not_prove_certainty() -> None:
    labels = np.zeros(30, int)
    probabilities = np.array([[0.9, 0.1]] * 30)
    temperature = fit_temperature(labels, probabilities)
    assert 0.2 < temperature < 1
    assert apply_temperature(probabilities, temperature).max() < 0.9999


def test_one_confident_error_does_not_outweigh_all_others() -> None:
    assert per_image_log_loss(np.array([0]), np.array([[0.0, 1.0]])) == pytest.approx([23 * np.log(2)])
