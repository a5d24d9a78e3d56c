"""The frozen backbone of a classifier of which only the heads are trained."""

from torch import nn

from convoy.models.base import Classifier


def freeze_backbone(classifier: Classifier) -> None:
    """Exclude all parameters except those of the heads from training."""
    for name, parameter in classifier.named_parameters():
        parameter.requires_grad_(classifier.is_in_head(name))


def freeze_running_statistics(classifier: Classifier) -> None:
    """Switch the batch norms of the backbone to evaluation mode, so that they do not update their statistics."""
    for name, layer in classifier.named_modules():
        if isinstance(layer, nn.BatchNorm2d) and not classifier.is_in_head(name):
            layer.eval()
