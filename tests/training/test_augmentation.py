"""Augmentation: it changes each image of a batch independently and never waits for the device."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from convoy.recipe import AugmentConfig
from convoy.training.augmentation import POLICY_GROUPS, augment, mix

NOTHING = AugmentConfig(max_shift=0, hflip=False, auto_augment="none", random_erasing=0.0, mixup=0.0, cutmix=0.0)


def make_config(**changes: Any) -> AugmentConfig:
    """Settings that ask for these changes and no other."""
    return dataclasses.replace(NOTHING, **changes)


def describe(params: AugmentConfig) -> str:
    return " ".join(f"{key}={value}" for key, value in vars(params).items() if value != getattr(NOTHING, key))


every_policy = pytest.mark.parametrize("policy", ["trivial", "rand"])
grey_and_colour = pytest.mark.parametrize("channels", [1, 3])
EVERY_CHANGE = [
    make_config(max_shift=3),
    make_config(hflip=True),
    make_config(auto_augment="trivial"),
    make_config(auto_augment="rand"),
    make_config(random_erasing=0.5),
    make_config(max_shift=3, hflip=True, auto_augment="trivial", random_erasing=0.5),
]
every_change = pytest.mark.parametrize("changes", EVERY_CHANGE, ids=describe)
MIXED = [make_config(mixup=1.0), make_config(cutmix=1.0), make_config(mixup=1.0, cutmix=1.0)]
every_mix = pytest.mark.parametrize("mixed", MIXED, ids=describe)


def make_ramp(count: int = 200, height: int = 12, width: int = 10) -> Tensor:
    """The same image `count` times, each pixel with another value."""
    return torch.arange(height * width, dtype=torch.uint8).reshape(1, height, width, 1).repeat(count, 1, 1, 1)


def make_noise(count: int = 48, height: int = 12, width: int = 10, channels: int = 3) -> Tensor:
    """Images that all differ, the same at each call."""
    return torch.randint(
        256, (count, height, width, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Every change


def test_images_are_unchanged_without_augmentation() -> None:
    assert augment(make_noise(), NOTHING).equal(make_noise())


@every_change
@grey_and_colour
@pytest.mark.parametrize("count", [1, 33])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 4)], ids=str)
def test_augment_keeps_shape_and_dtype_and_its_input(
    changes: AugmentConfig, channels: int, count: int, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    pixels = make_noise(count, *size, channels)
    changed = augment(pixels, changes)
    assert changed.shape == pixels.shape
    assert changed.dtype == torch.uint8
    assert pixels.equal(make_noise(count, *size, channels))


@every_change
def test_augment_depends_on_the_state_of_the_generator(
    changes: AugmentConfig,
) -> None:
    def changed(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return augment(make_noise(), changes)

    assert changed(7).equal(changed(7))
    assert not changed(7).equal(changed(8))


@every_change
@grey_and_colour
def test_augment_never_synchronizes_with_the_device(changes: AugmentConfig, channels: int) -> None:
    for seed in range(3):  # a policy does something else each time
        torch.manual_seed(seed)
        augment(make_noise(channels=channels), changes)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        pixels = make_noise(channels=channels).to("meta")  # has no values, and raises where one is read
        changed = augment(pixels, changes)
        assert changed.device == pixels.device
        assert changed.shape == pixels.shape
        assert torch.get_rng_state().equal(after)  # the random numbers do not depend on the device


@every_change
def test_augment_uses_deterministic_operations(changes: AugmentConfig, deterministic: None) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        augment(make_noise(), changes)


@every_change
def test_non_contiguous_images_are_augmented_identically(changes: AugmentConfig) -> None:
    pixels = (
        torch.arange(12 * 10 * 3, dtype=torch.uint8).reshape(1, 3, 12, 10).permute(0, 2, 3, 1).expand(50, -1, -1, -1)
    )
    torch.manual_seed(0)
    changed = augment(pixels, changes)
    torch.manual_seed(0)
    assert changed.equal(augment(pixels.contiguous(), changes))


# Shift and flip


def shift_image(image: Tensor, down: int, right: int) -> Tensor:
    rows = (torch.arange(image.shape[0]) + down).clamp(0, image.shape[0] - 1)
    columns = (torch.arange(image.shape[1]) + right).clamp(0, image.shape[1] - 1)
    return image[rows][:, columns]


def is_among(image: Tensor, allowed: list[Tensor]) -> bool:
    return any(torch.equal(image, other) for other in allowed)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_image_is_shifted_up_to_the_maximum_and_maybe_flipped(shift: int, flip: bool) -> None:
    torch.manual_seed(0)
    image = make_ramp(1)[0]
    ways = range(-shift, shift + 1)
    allowed = [shift_image(image, down, right) for down in ways for right in ways]
    allowed += [other.flip(1) for other in allowed] if flip else []
    changed = augment(make_ramp(500), make_config(max_shift=shift, hflip=flip))
    assert all(is_among(other, allowed) for other in changed)
    assert len(changed.unique(dim=0)) == len(allowed)  # and every way comes up


def test_each_image_is_augmented_independently() -> None:
    torch.manual_seed(0)
    changed = augment(make_ramp(64), make_config(max_shift=2, hflip=True))
    assert len(changed.unique(dim=0)) > 20


@given(
    height=st.integers(1, 9), width=st.integers(1, 9), channels=st.sampled_from([1, 3]),
    shift=st.integers(0, 12), flip=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=50)
def test_shift_and_flip_invent_no_pixel(
    height: int, width: int, channels: int, shift: int, flip: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    pixels = torch.randint(0, 256, (4, height, width, channels), dtype=torch.uint8)
    before = pixels.clone()
    changed = augment(pixels, make_config(max_shift=shift, hflip=flip))
    assert changed.shape == pixels.shape
    assert changed.dtype == torch.uint8
    assert torch.equal(pixels, before)
    for image, other in zip(pixels, changed, strict=True):  # colours stay together
        assert set(map(tuple, other.flatten(0, 1).tolist())) <= set(map(tuple, image.flatten(0, 1).tolist()))


def augment_one_by_one(pixels: Tensor, params: AugmentConfig) -> Tensor:
    """What `augment` promises, an image at a time, from the same random numbers."""
    count = len(pixels)
    down = right = torch.zeros(count, 1, dtype=torch.int64)
    if params.max_shift:
        down, right = torch.randint(-params.max_shift, params.max_shift + 1, (2, count, 1))
    changed = torch.stack([shift_image(*each) for each in zip(pixels, down, right, strict=True)])
    if params.hflip:
        for image in (torch.rand(count, 1) < 0.5).flatten().nonzero().flatten():
            changed[image] = changed[image].flip(1)
    return changed


@given(
    count=st.integers(1, 20), height=st.integers(1, 9), width=st.integers(1, 9), channels=st.sampled_from([1, 3]),
    shift=st.integers(0, 20), flip=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=100)
def test_batch_is_augmented_as_its_images_one_by_one(
    count: int, height: int, width: int, channels: int, shift: int, flip: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    pixels = torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8)
    before = torch.get_rng_state()
    expected = augment_one_by_one(pixels, make_config(max_shift=shift, hflip=flip))
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    assert torch.equal(augment(pixels, make_config(max_shift=shift, hflip=flip)), expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_about_half_of_the_images_are_flipped_exactly() -> None:
    torch.manual_seed(0)
    image = make_ramp(1)[0]
    changed = augment(make_ramp(1000), make_config(max_shift=0, hflip=True))
    flipped = sum(torch.equal(other, image.flip(1)) for other in changed)
    kept = sum(torch.equal(other, image) for other in changed)
    assert flipped + kept == 1000
    assert 440 < flipped < 560


# Policies


@every_policy
@grey_and_colour
def test_policy_equals_that_of_torchvision(policy: str, channels: int) -> None:
    from torchvision.transforms.v2 import InterpolationMode, RandAugment, TrivialAugmentWide

    smooth = InterpolationMode.BILINEAR
    change = {"trivial": TrivialAugmentWide, "rand": RandAugment}[policy](interpolation=smooth)
    images = make_noise(10, channels=channels)
    torch.manual_seed(0)
    expected = [change(image.permute(2, 0, 1)).permute(1, 2, 0) for image in images]
    torch.manual_seed(0)
    assert augment(images, make_config(auto_augment=policy)).equal(torch.stack(expected))


@every_policy
def test_policy_is_drawn_per_image_or_per_group(policy: str) -> None:
    torch.manual_seed(0)
    image = make_noise(1)
    assert (
        len(augment(image.repeat(POLICY_GROUPS, 1, 1, 1), make_config(auto_augment=policy)).unique(dim=0))
        > POLICY_GROUPS / 2
    )
    groups = augment(image.repeat(4 * POLICY_GROUPS, 1, 1, 1), make_config(auto_augment=policy)).split(4)
    assert all(len(group.unique(dim=0)) == 1 for group in groups)
    assert len(torch.cat(groups).unique(dim=0)) > POLICY_GROUPS / 2


@every_policy
@grey_and_colour
def test_most_images_are_changed(policy: str, channels: int) -> None:
    torch.manual_seed(0)
    pixels = make_noise(channels=channels)
    batches = [augment(pixels, make_config(auto_augment=policy)) for _ in range(10)]
    changed = torch.stack([(batch != pixels).flatten(1).any(1) for batch in batches]).float().mean()
    assert 0.6 < changed < 1


@every_policy
@grey_and_colour
def test_every_operation_of_a_policy_occurs(policy: str, channels: int) -> None:
    torch.manual_seed(0)
    for _ in range(20):  # of 16 groups: that one of 14 changes never comes up has a chance of 1e-9
        changed = augment(make_noise(16, channels=channels), make_config(auto_augment=policy))
        assert changed.shape == (16, 12, 10, channels)


# Erasing


def erase(count: int, size: int, probability: float) -> tuple[Tensor, Tensor]:
    """Black images after erasing, and where they are not black: (N, H, W) bool."""
    torch.manual_seed(0)
    changed = augment(torch.zeros(count, size, size, 3, dtype=torch.uint8), make_config(random_erasing=probability))
    return changed, (changed > 0).any(dim=3)


def test_erased_area_is_a_rectangle_of_valid_size() -> None:
    _, where = erase(200, 64, 1.0)
    highs, wides = where.any(2).sum(1), where.any(1).sum(1)
    assert where.sum((1, 2)).equal(highs * wides)  # each row of the rectangle is as wide as the others
    for rows in (where.any(2), where.any(1)):
        assert ((rows[:, 1:] & ~rows[:, :-1]).sum(1) + rows[:, 0] == 1).all()  # and in one piece
    shares, ratios = highs * wides / 64**2, highs / wides
    assert 0.015 < shares.min() < 0.05
    assert 0.3 < shares.max() < 0.345
    assert 0.27 < ratios.min() < 0.4
    assert 2.6 < ratios.max() < 3.7
    assert 0.15 < shares.mean() < 0.2
    assert 0.4 < (ratios > 1).float().mean() < 0.6


def test_requested_fraction_of_images_is_erased() -> None:
    _, where = erase(2000, 16, 0.3)
    assert 0.26 < where.any(2).any(1).float().mean() < 0.34
    assert len(where.unique(dim=0)) > 400
    often = where.float().mean(0)
    assert often.min() > 0  # corners too
    assert torch.allclose(often, often.flip(0), atol=0.03)
    assert torch.allclose(often, often.flip(1), atol=0.03)


def test_erased_pixels_become_uniform_noise() -> None:
    changed, where = erase(200, 64, 1.0)
    assert len(changed[where].unique()) == 256
    assert 126 < changed[where].float().mean() < 129
    full = torch.zeros(200, 64, 64, 3, dtype=torch.uint8)
    other = augment(full, make_config(random_erasing=1.0))
    both = where & (other > 0).any(3)
    assert (changed[both] == other[both]).float().mean() < 0.01


# Mixing images with each other


def make_numbered(count: int = 5, height: int = 16, width: int = 10) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) whose every value is the number of the image, and the numbers, as labels (N,)."""
    numbers = torch.arange(count)
    return numbers.float()[:, None, None, None].repeat(1, 3, height, width), numbers


def roll_batch(values: Tensor) -> Tensor:
    return values.roll(1, 0)


def test_batch_is_unchanged_without_mixing() -> None:
    x, labels = make_numbered()
    state = torch.get_rng_state()
    images, targets = mix(x, labels, 5, make_config(max_shift=2, auto_augment="rand", random_erasing=1.0))
    assert images is x
    assert targets is labels
    assert torch.get_rng_state().equal(state)


@every_mix
@pytest.mark.parametrize("count", [1, 2, 5])
def test_mixed_targets_are_weights_of_two_classes(mixed: AugmentConfig, count: int) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        x, labels = make_numbered(count)
        images, targets = mix(x, labels, 7, mixed)
        assert images.shape == x.shape
        assert images.dtype == x.dtype
        assert targets.shape == (count, 7)
        assert targets.dtype == torch.float32
        assert targets.min() >= 0
        torch.testing.assert_close(targets.sum(1), torch.ones(count))
        own, other = (torch.nn.functional.one_hot(each, 7).bool() for each in (labels, roll_batch(labels)))
        assert (targets[~(own | other)] == 0).all()
        assert len(targets[own].unique()) == 1  # one share for the batch
        assert x.equal(make_numbered(count)[0])
        assert labels.equal(make_numbered(count)[1])


@every_mix
def test_batch_of_one_class_has_that_class_alone_as_its_target(mixed: AugmentConfig) -> None:
    x, labels = make_numbered()
    assert mix(x, labels * 0 + 2, 3, mixed)[1].equal(torch.tensor([[0.0, 0.0, 1.0]]).repeat(5, 1))


@every_mix
def test_single_image_of_a_batch_is_not_mixed(mixed: AugmentConfig) -> None:
    x = torch.randn(1, 3, 8, 8)
    images, targets = mix(x, torch.tensor([1]), 3, mixed)
    torch.testing.assert_close(images, x)
    torch.testing.assert_close(targets, torch.tensor([[0.0, 1.0, 0.0]]))


def test_mixup_blends_images_by_their_target_weights() -> None:
    x, labels = torch.randn(6, 3, 8, 8), torch.arange(6)
    shares = []
    for seed in range(300):
        torch.manual_seed(seed)
        images, targets = mix(x, labels, 6, make_config(mixup=0.2))
        share = targets[0, 0]
        torch.testing.assert_close(images, share * x + (1 - share) * roll_batch(x))
        shares.append(share)
    # the mean and variance of Beta(0.2, 0.2)
    assert 0.4 < torch.stack(shares).mean() < 0.6
    assert torch.stack(shares).var().item() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), rel=0.15)


def test_cutmix_weighs_targets_by_the_pasted_area() -> None:
    x, labels = make_numbered()
    seen = torch.zeros(16, 10)
    for seed in range(300):
        torch.manual_seed(seed)
        images, targets = mix(x, labels, 5, make_config(cutmix=1.0))
        pasted = images[0, 0] != x[0, 0]  # (H, W)
        assert images.equal(torch.where(pasted, roll_batch(x), x))
        high, wide = pasted.any(1).sum(), pasted.any(0).sum()
        assert pasted.sum() == high * wide
        for lines in (pasted.any(1), pasted.any(0)):  # in one piece
            assert (lines[1:] & ~lines[:-1]).sum() + lines[0] == lines.any()
        torch.testing.assert_close(targets.diag(), 1 - pasted.float().mean().expand(5))
        seen += pasted
    assert seen.min() > 10  # anywhere, corners too
    assert torch.allclose(seen, seen.flip(0), atol=50)
    assert torch.allclose(seen, seen.flip(1), atol=50)


def test_mixup_and_cutmix_are_equally_frequent() -> None:
    x, labels = make_numbered()
    pasted = 0
    for seed in range(400):
        torch.manual_seed(seed)
        images, _ = mix(x, labels, 5, make_config(mixup=1.0, cutmix=1.0))
        pasted += images.frac().eq(0).all().item()
    assert 160 < pasted < 240


@every_mix
def test_mix_depends_on_the_state_of_the_generator(mixed: AugmentConfig) -> None:
    def after(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return mix(*make_numbered(), 5, mixed)

    assert all(one.equal(other) for one, other in zip(after(1), after(1), strict=True))
    assert not after(1)[1].equal(after(2)[1])


@every_mix
def test_mix_keeps_the_memory_format(mixed: AugmentConfig) -> None:
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    images, _ = mix(x, torch.arange(4), 4, mixed)
    assert images.is_contiguous(memory_format=torch.channels_last)


@every_mix
def test_mix_is_deterministic_and_never_synchronizes(mixed: AugmentConfig, deterministic: None) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        mix(*make_numbered(), 5, mixed)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        x, labels = (each.to("meta") for each in make_numbered())
        images, targets = mix(x, labels, 5, mixed)
        assert images.device == targets.device == x.device
        assert torch.get_rng_state().equal(after)
