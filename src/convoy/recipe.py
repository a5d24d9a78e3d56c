"""The recipe: how networks are trained."""

from typing import Literal

from convoy.config import Count, Decay, NotNegative, Positive, Share, Whole, schema

Balance = Literal["none", "loss", "sampler"]


@schema
class AugmentConfig:
    """Random changes to training images: of pixels (`augment`), and of pairs of images with their labels (`mix`)."""

    shift: Whole  # pixels: moved by up to this far each way, the edge repeated into the gap
    flip: bool  # left to right, every second image; not for digits or letters
    policy: Literal["none", "trivial", "rand"]  # one, or two, of 14 changes of place or colour
    erase: Share  # probability that a rectangle of an image is erased
    mixup: NotNegative  # alpha of the Beta distribution; 0: none
    cutmix: NotNegative  # likewise; with both, each batch takes one of them


@schema
class TrainConfig:
    """What all architectures have in common when they are trained."""

    max_epochs: Count
    patience: Whole  # epochs without a better one after which to stop; 0: never
    max_minutes: NotNegative  # of training after which no epoch begins; 0: no limit
    checkpoint_minutes: Positive  # between checkpoints within an epoch; there is one at the end of each anyway


@schema
class RecipeConfig:
    """How one architecture is trained."""

    batch_size: Count  # images in an optimizer step, over all devices
    accumulate: Count  # pieces that a batch is computed in, one after the other: less memory
    optimizer: Literal["sgd", "adamw"]  # sgd is with Nesterov momentum
    schedule: Literal["cosine", "one_cycle"]  # after the warm-up; one_cycle moves momentum against the learning rate
    lr: Positive  # the highest learning rate, reached after the warm-up
    body_lr: Share  # of lr, for all layers but the heads; 0 freezes them
    momentum: Decay  # of sgd; beta1 of adamw
    weight_decay: NotNegative  # on weights; never on biases and norms
    warmup: Share  # of all steps: linear from 0 to lr, then a cosine to 0
    label_smoothing: Share  # probability mass moved from the true class to all classes
    clip_norm: NotNegative  # the gradient's norm is cut to this; 0: never
    ema: Decay  # decay, in a step, of the running mean of the weights that is judged and kept; 0: none
    balance: Balance  # of classes: none, weights in the loss, or a sampler that draws each class as often
    augment: AugmentConfig
