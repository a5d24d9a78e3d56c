"""Random augmentation of image batches on the device that trains."""

from typing import Literal

import torch
from torch import Tensor

from convoy.recipe import AugmentConfig

# Number of groups in a batch that each share one draw of a policy; 64 groups would take twice as long.
POLICY_GROUPS = 16


def augment(pixels: Tensor, params: AugmentConfig) -> Tensor:
    """Apply the pixel augmentations of the settings to a batch of images.

    Random numbers are drawn from torch's global generator on the host, and nothing is read back from the device.

    Args:
        pixels: Images (N, H, W, C) uint8; not modified.
        params: Settings of the augmentation.

    Returns:
        The augmented images, with the shape and dtype of `pixels`.
    """
    count = len(pixels)
    if params.max_shift:
        down, right = torch.randint(-params.max_shift, params.max_shift + 1, (2, count, 1))
        pixels = translate(pixels, params.max_shift, down, right)
    # `TrainLoader` makes the flips that alternate, because they depend on the epoch.
    if params.hflip is True:
        pixels = flip(pixels, torch.rand(count) < 0.5)
    if params.auto_augment != "none":
        pixels = apply_policy(params.auto_augment, pixels)
    if params.random_erasing:
        pixels = erase(pixels, params.random_erasing)
    return pixels


def flip(pixels: Tensor, chosen: Tensor) -> Tensor:
    """Flip some images of a batch horizontally.

    Args:
        pixels: Images (N, H, W, C) uint8.
        chosen: Mask (N,) bool of the images to flip, on the host.

    Returns:
        The images, (N, H, W, C) uint8.
    """
    image = torch.arange(len(pixels)) + len(pixels) * chosen
    both = torch.cat([pixels, pixels.flip(2)])
    return both.index_select(0, image.to(pixels.device, non_blocking=True))


def translate(pixels: Tensor, shift: int, down: Tensor, right: Tensor) -> Tensor:
    """Translate each image, repeating the pixels at its edges to fill the gaps.

    Args:
        pixels: Images (N, H, W, C) uint8.
        shift: Largest translation, in pixels.
        down: Vertical offset (N, 1) of the visible window in pixels, in [-shift, shift], on the host.
        right: Horizontal offset (N, 1) of the visible window in pixels, in [-shift, shift], on the host.

    Returns:
        The translated images, (N, H, W, C) uint8.
    """
    count, height, width, channels = pixels.shape
    padded = torch.cat([pixels[:, :, :1]] * shift + [pixels] + [pixels[:, :, -1:]] * shift, dim=2)
    # Each row of the result is contiguous in `padded`, so complete rows are copied; indexing every pixel takes four
    # times as long.
    windows = padded.flatten().unfold(0, width * channels, channels)  # (N * H * (W + 2 * shift) - W + 1, W * C)
    row = (torch.arange(height) + down).clamp(0, height - 1) + height * torch.arange(count)[:, None]  # (N, H)
    window = row * (width + 2 * shift) + shift + right
    return windows.index_select(0, window.flatten().to(pixels.device, non_blocking=True)).view(pixels.shape)


def apply_policy(policy: Literal["trivial", "rand"], pixels: Tensor) -> Tensor:
    """Apply an augmentation policy of torchvision, filling gaps with black.

    The batch is split into up to `POLICY_GROUPS` groups, and the images of a group share one draw. Because batches are
    shuffled, other images share a draw in the next epoch.

    Args:
        policy: "trivial" is TrivialAugment with its wide search space (Müller & Hutter 2021), one change of random
            strength. "rand" is RandAugment (Cubuk et al. 2019), two changes of strength 9 of 30.
        pixels: Images (N, H, W, 1 or 3) uint8.

    Returns:
        The changed images, with the shape and dtype of `pixels`.
    """
    # Imported here because the import takes seconds.
    from torchvision.transforms.v2 import InterpolationMode, RandAugment, TrivialAugmentWide

    policy_class = TrivialAugmentWide if policy == "trivial" else RandAugment
    transform = policy_class(interpolation=InterpolationMode.BILINEAR)
    groups = pixels.permute(0, 3, 1, 2).chunk(POLICY_GROUPS)
    return torch.cat([transform(group) for group in groups]).permute(0, 2, 3, 1)


def erase(pixels: Tensor, probability: float) -> Tensor:
    """Replace a random rectangle of each image by noise (random erasing, Zhong et al. 2017).

    The rectangle covers 2 to 33 % of the area, has an aspect ratio (height over width) of 0.3 to 3.3, and is clipped to
    the image size. The images of a batch share one pattern of noise, and each shows the part inside its rectangle.

    Args:
        pixels: Images (N, H, W, C) uint8.
        probability: Probability that an image is changed, in [0, 1].

    Returns:
        The images with erased rectangles, (N, H, W, C) uint8.
    """
    count, height, width, channels = pixels.shape
    draw, area, ratio, down, right = torch.rand(5, count, 1)
    area = height * width * (0.02 + (0.33 - 0.02) * area)  # pixels
    # Height over width, log-uniform, so that tall and wide rectangles are equally frequent.
    ratio = 0.3 * (3.3 / 0.3) ** ratio
    high, wide = (area * ratio).sqrt(), (area / ratio).sqrt()
    erased = draw < probability
    rows = interval_mask(height, high, down) & erased
    columns = interval_mask(width, wide, right).repeat_interleave(channels, dim=1)
    noise = torch.randint(256, (height, width * channels), dtype=torch.uint8)
    rows, columns, noise = (each.to(pixels.device, non_blocking=True) for each in (rows, columns, noise))
    # Work on complete image rows: with the channels innermost in memory, the inner loops would have a length of 3.
    return torch.where(rows[:, :, None] & columns[:, None, :], noise, pixels.flatten(2)).view(pixels.shape)


def interval_mask(size: int, length: Tensor, position: Tensor) -> Tensor:
    """Compute a mask of the pixels inside an interval along one axis.

    Args:
        size: Number of pixels along the axis.
        length: Lengths (N, 1) of the intervals in pixels, rounded and clamped to [1, size].
        position: Positions (N, 1) in [0, 1), from the lowest possible start to the highest; uniform positions make all
            starts equally likely.

    Returns:
        The mask, (N, size) bool.
    """
    length = length.round().clamp(1, size)
    start = (position * (size - length + 1)).floor()
    pixel = torch.arange(size)
    return (pixel >= start) & (pixel < start + length)


def mix(x: Tensor, labels: Tensor, classes: int, params: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Mix each image and its target with the previous image of the batch by MixUp or CutMix.

    The batch must be shuffled. All its images share one mixing weight, which is drawn from torch's global generator on
    the host. Nothing is read back from the device.

    Args:
        x: Images (N, C, H, W) float; not modified.
        labels: Labels (N,) int64; not modified.
        classes: Number of classes K.
        params: Settings of the augmentation.

    Returns:
        The mixed images and their targets (N, K) float, the fraction of each class. If mixing is disabled, `x` and
        `labels` are returned unchanged.
    """
    if not (params.mixup or params.cutmix):
        return x, labels
    # Imported here because the import takes seconds.
    from torchvision.transforms import v2

    mixup = [v2.MixUp(alpha=params.mixup, num_classes=classes)] if params.mixup else []
    cutmix = [v2.CutMix(alpha=params.cutmix, num_classes=classes)] if params.cutmix else []
    return v2.RandomChoice([*mixup, *cutmix])(x, labels)
