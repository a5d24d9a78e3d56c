"""Augmentation: random changes to whole batches of images, on the device that trains."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.distributions import Beta

from convoy.recipe import AugmentConfig

GROUPS = 16  # that share a batch's draws of a policy: 64 would take twice as long


def augment(pixels: Tensor, params: AugmentConfig) -> Tensor:
    """`pixels` (N, H, W, C) uint8 with random changes, drawn from torch's global generator on the host.

    The tensor given stays as it is, and nothing is read back from its device.
    """
    count = len(pixels)
    if params.shift:
        down, right = torch.randint(-params.shift, params.shift + 1, (2, count, 1))
        pixels = move(pixels, params.shift, down, right)
    if params.flip:
        image = torch.arange(count) + count * (torch.rand(count) < 0.5)
        both = torch.cat([pixels, pixels.flip(2)])
        pixels = both.index_select(0, image.to(pixels.device, non_blocking=True))
    if params.policy != "none":
        pixels = follow(params.policy, pixels)
    if params.erase:
        pixels = erase(pixels, params.erase)
    return pixels


def move(pixels: Tensor, shift: int, down: Tensor, right: Tensor) -> Tensor:
    """Each image as seen from `down` and `right` of it, on the host, (N, 1) pixels in -shift..shift."""
    count, height, width, channels = pixels.shape
    wide = torch.cat([pixels[:, :, :1]] * shift + [pixels] + [pixels[:, :, -1:]] * shift, dim=2)
    # A row of the result lies in `wide` in one piece, so whole rows are copied: an index of every pixel takes
    # four times as long.
    pieces = wide.flatten().unfold(0, width * channels, channels)  # (N * H * (W + 2 * shift) - W + 1, W * C)
    row = (torch.arange(height) + down).clamp(0, height - 1) + height * torch.arange(count)[:, None]  # (N, H)
    piece = row * (width + 2 * shift) + shift + right
    return pieces.index_select(0, piece.flatten().to(pixels.device, non_blocking=True)).view(pixels.shape)


def follow(policy: Literal["trivial", "rand"], pixels: Tensor) -> Tensor:
    """`pixels` (N, H, W, 1 or 3) uint8, changed by a published policy as torchvision has it; black fills the gaps.

    "trivial" is TrivialAugment, its wide space (Müller & Hutter 2021): one change of a random strength. "rand" is
    RandAugment (Cubuk et al. 2019): two changes, each of strength 9 of 30. A batch is cut into up to 16 groups, and
    the images of a group share a draw: batches are shuffled, so it is others that share one in the next epoch.
    """
    from torchvision.transforms.v2 import InterpolationMode, RandAugment, TrivialAugmentWide  # takes seconds

    smooth = InterpolationMode.BILINEAR
    change = TrivialAugmentWide(interpolation=smooth) if policy == "trivial" else RandAugment(interpolation=smooth)
    groups = pixels.permute(0, 3, 1, 2).chunk(GROUPS)
    return torch.cat([change(group) for group in groups]).permute(0, 2, 3, 1)


def erase(pixels: Tensor, probability: float) -> Tensor:
    """`pixels` (N, H, W, C) uint8, each with a rectangle of noise in it at this probability.

    Random erasing (Zhong et al. 2017) of 2 to 33 % of the area, 0.3 to 3.3 times as high as wide, cut to what fits in
    the image. The images of a batch share one pattern of noise, and each shows it where its rectangle lies.
    """
    count, height, width, channels = pixels.shape
    chance, area, ratio, down, right = torch.rand(5, count, 1)
    area = height * width * (0.02 + (0.33 - 0.02) * area)  # pixels
    ratio = 0.3 * (3.3 / 0.3) ** ratio  # high over wide; upright as often as lying
    high, wide = (area * ratio).sqrt(), (area / ratio).sqrt()
    erased = chance < probability
    rows = within(height, high, down) & erased
    columns = within(width, wide, right).repeat_interleave(channels, dim=1)
    noise = torch.randint(256, (height, width * channels), dtype=torch.uint8)
    rows, columns, noise = (each.to(pixels.device, non_blocking=True) for each in (rows, columns, noise))
    # whole rows at a time: over channels that lie side by side, the loops would be three values long
    return torch.where(rows[:, :, None] & columns[:, None, :], noise, pixels.flatten(2)).view(pixels.shape)


def within(size: int, length: Tensor, place: Tensor) -> Tensor:
    """Which of `size` pixels lie in a stretch of `length` (N, 1) pixels, at least one: (N, size) bool.

    `place` (N, 1) in [0, 1) says where it lies, from the low end to the high, each whole pixel as likely.
    """
    length = length.round().clamp(1, size)
    start = (place * (size - length + 1)).floor()
    pixel = torch.arange(size)
    return (pixel >= start) & (pixel < start + length)


def mix(x: Tensor, labels: Tensor, classes: int, params: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Each image mixed with the one before it in the batch, and its target likewise; batches are shuffled.

    `x` (N, C, H, W) float and `labels` (N,) int64 -> x and targets (N, K) float, the share of each class; both as they
    were given where `params` asks for no mixing. One share for a batch, drawn from torch's global generator on the
    host; the tensors given stay as they are, and nothing is read back from their device.
    """
    if not (params.mixup or params.cutmix):
        return x, labels
    both = params.mixup > 0 and params.cutmix > 0
    blended = float(torch.rand(())) < 0.5 if both else params.mixup > 0
    x, share = mixup(x, params.mixup) if blended else cutmix(x, params.cutmix)
    targets = (labels[:, None] == torch.arange(classes, device=labels.device)).float()
    return x, torch.lerp(before(targets), targets, share)


def mixup(x: Tensor, alpha: float) -> tuple[Tensor, float]:
    """A weighted mean of each image and the one before it, and its own weight, of Beta(alpha) (Zhang et al. 2018)."""
    share = float(Beta(alpha, alpha).sample())
    return torch.lerp(before(x), x, share), share


def cutmix(x: Tensor, alpha: float) -> tuple[Tensor, float]:
    """Each image with a rectangle of the one before it, and the share of its own pixels left (Yun et al. 2019).

    1 - Beta(alpha) of the area, as high to wide as the image, the centre anywhere: cut where it leaves the image.
    """
    height, width = x.shape[2:]
    side = math.sqrt(1 - float(Beta(alpha, alpha).sample()))  # of the image's
    down, right = torch.rand(2).tolist()
    top, bottom = stretch(height, side, down)
    left, end = stretch(width, side, right)
    mixed = x.clone()
    mixed[:, :, top:bottom, left:end] = before(x[:, :, top:bottom, left:end])
    return mixed, 1 - (bottom - top) * (end - left) / (height * width)


def stretch(size: int, share: float, centre: float) -> tuple[int, int]:
    """First and one past the last of `size` pixels in a stretch of `share` of them about `centre`, in [0, 1)."""
    length = round(share * size)
    first = int(centre * size) - length // 2
    return max(first, 0), min(first + length, size)


def before(values: Tensor) -> Tensor:
    """Of each of N entries, the one before it; of the first, the last. Channels that lie last in memory stay there."""
    return torch.cat([values[-1:], values[:-1]])
