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
    fit = fit_temperature(labels, softmax(logits * planted))
    assert fit.fitted == pytest.approx(planted, rel=0.05)
    assert fit.temperature == (1 if planted == 1 else fit.fitted)


def test_temperature_divides_the_logits() -> None:
    _, logits = draw_labels(0, 50, 7)
    for temperature in (0.1, 1.0, 7.0):
        np.testing.assert_allclose(
            apply_temperature(softmax(logits), temperature), softmax(logits / temperature), atol=1e-12
        )
        back = apply_temperature(apply_temperature(softmax(logits), temperature), 1 / temperature)
        np.testing.assert_allclose(back, softmax(logits), atol=1e-9)


def test_temperature_that_fits_noise_is_not_used() -> None:
    """On 322 images, probabilities that are already calibrated are left alone in at least 9 of 10 cases."""
    left_alone = []
    for seed in range(40):
        labels, logits = draw_labels(seed, 322, 10)
        fit = fit_temperature(labels, softmax(logits))
        assert fit.fitted != 1
        left_alone.append(fit.temperature == 1)
    assert np.mean(left_alone) >= 0.9


def test_gain_within_its_standard_error_is_not_used() -> None:
    fits = [
        fit_temperature(labels, softmax(1.2 * logits))
        for labels, logits in (draw_labels(seed, 100, 10) for seed in range(12))
    ]
    uncertain = [fit for fit in fits if fit.p_value < 0.05 and 0 < fit.gain < fit.gain_error]
    assert uncertain
    assert {fit.temperature for fit in uncertain} == {1}


def test_kept_temperature_lowers_the_loss_of_other_images() -> None:
    labels, logits = draw_labels(0, 600, 10)
    fit = fit_temperature(labels[:300], softmax(1.7 * logits[:300]))
    others = softmax(1.7 * logits[300:])
    saved = per_image_log_loss(labels[300:], others) - per_image_log_loss(
        labels[300:], apply_temperature(others, fit.temperature)
    )
    assert saved.mean() > 0
    assert fit.describe().startswith(f"temperature {fit.temperature:.3f}, which saves ")
    assert fit.gain == pytest.approx(saved.mean(), abs=3 * fit.gain_error)


def test_description_says_why_no_temperature_is_used() -> None:
    labels, logits = draw_labels(1, 322, 10)
    message = fit_temperature(labels, softmax(logits)).describe()
    assert message.startswith("no temperature, as one of ")
    assert message.endswith(" that none is needed)")


def test_hardly_any_errors_do_not_prove_certainty() -> None:
    """Where accuracy is 0.98, luck on 322 images is taken for certainty at most once in 10 cases."""
    used = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        logits = 100 * random.gamma(2, 0.5, (322, 1)) * random.normal(size=(322, 10))
        labels = (softmax(logits).cumsum(axis=1) < random.random((322, 1))).sum(axis=1).clip(0, 9)
        used.append(fit_temperature(labels, softmax(logits)).temperature != 1)
    assert np.mean(used) <= 0.1


def test_single_image_gives_no_temperature() -> None:
    assert fit_temperature(np.array([0]), np.array([[0.9, 0.1]])).temperature == 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 12), st.floats(0.01, 200), st.booleans())
def test_temperature_never_raises_loss_nor_changes_predictions(
    seed: int, images: int, classes: int, sharpness: float, shuffled: bool
) -> None:
    labels, logits = draw_labels(seed, images, classes)
    probabilities = softmax((logits * sharpness).astype(np.float32).astype(float))
    labels = labels[::-1] if shuffled else labels
    temperature = fit_temperature(labels, probabilities).temperature
    after = apply_temperature(probabilities, temperature)
    assert 0.05 <= temperature <= 20
    assert per_image_log_loss(labels, after).mean() <= per_image_log_loss(labels, probabilities).mean()
    assert (after.argmax(axis=1) == probabilities.argmax(axis=1)).all()
    assert after.sum(axis=1) == pytest.approx(np.ones(images))


def test_few_correct_predictions_do_not_prove_certainty() -> None:
    labels = np.zeros(30, int)
    probabilities = np.array([[0.9, 0.1]] * 30)
    fit = fit_temperature(labels, probabilities)
    assert 0.2 < fit.fitted < 1
    assert apply_temperature(probabilities, fit.fitted).max() < 0.9999
    assert fit.temperature == 1


def test_one_confident_error_does_not_outweigh_all_others() -> None:
    assert per_image_log_loss(np.array([0]), np.array([[0.0, 1.0]])) == pytest.approx([23 * np.log(2)])
