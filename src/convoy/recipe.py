"""The schema of a training recipe: optimizer, learning-rate schedule, regularisation and augmentation."""

from typing import Literal

from convoy.core.config import (
    Decay,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    SelectionMetric,
    schema,
)


@schema
class AugmentConfig:
    """Settings of the random changes to training images.

    `max_shift`, `hflip`, `auto_augment` and `random_erasing` change the pixels of single images. `mixup` and `cutmix`
    combine pairs of images and their labels.
    """

    max_shift: NonNegativeInt  # pixels; largest translation in each direction, gaps are filled by repeating the edge
    # Horizontal flips, unsuitable for digits and letters: with probability 0.5, or of each image in every second epoch.
    hflip: Literal[False, True, "alternate"]
    # TrivialAugment applies one of 14 geometric or colour changes, RandAugment two.
    auto_augment: Literal["none", "trivial", "rand"]
    random_erasing: Fraction  # probability that a rectangle of the image is replaced by noise
    mixup: NonNegativeFloat  # alpha of the Beta distribution; 0 disables MixUp
    # If both mixup and cutmix are set, each batch uses one of them.
    cutmix: NonNegativeFloat  # alpha of the Beta distribution; 0 disables CutMix


@schema
class TrainConfig:
    """Training settings that all architectures share."""

    seed: Seed  # of the random weights, the order of the images and their augmentation
    max_epochs: PositiveInt
    patience: NonNegativeInt  # epochs without improvement before training stops; 0 disables early stopping
    checkpoint_minutes: PositiveFloat  # interval between checkpoints within an epoch; each epoch's end also writes one
    # Metric on the validation images by which the best epoch is kept. Records of earlier versions have none.
    selection_metric: SelectionMetric = "accuracy"


@schema
class RecipeConfig:
    """Training settings of one architecture."""

    batch_size: PositiveInt  # images per optimizer step, over all devices
    accumulate_grad_batches: PositiveInt  # micro-batches that a batch is split into to save memory
    optimizer: Literal["sgd", "adamw"]  # sgd uses Nesterov momentum
    # How the learning rate falls to 0: by a cosine, which one_cycle combines with a momentum that rises meanwhile, or
    # linearly.
    schedule: Literal["cosine", "one_cycle", "linear"]
    lr: PositiveFloat  # peak learning rate, reached after the warm-up
    # Batch size that lr is meant for: lr is multiplied by batch_size / lr_batch_size (Goyal et al. 2017). 0 disables
    # it, as in recipes from before this setting existed.
    lr_batch_size: NonNegativeInt = 0
    bias_lr_scale: PositiveFloat = 1.0  # factor of lr for biases, also those of normalisation layers
    backbone_lr_scale: Fraction  # fraction of lr for all layers except the heads; 0 freezes these layers
    momentum: Decay  # momentum of sgd, beta1 of adamw
    weight_decay: NonNegativeFloat  # applied to weights, never to biases and normalisation layers
    warmup_fraction: Fraction  # fraction of all steps; linear from 0 to lr, before it falls to 0
    label_smoothing: Fraction  # probability mass moved from the true class to all classes
    grad_clip_norm: NonNegativeFloat  # maximum norm of the gradient; 0 disables clipping
    ema_decay: Decay  # decay per step of the weight average that is validated and saved; 0 disables it
    # weighted_loss weights the classes in the loss; sampler draws all classes equally often.
    class_balance: Literal["none", "weighted_loss", "sampler"]
    augment: AugmentConfig
