"""A look into a trained network: its layers, its first filters, its feature maps, and where it looks."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convoy.models.base import Classifier

# Grad-CAM explains the last layer whose feature maps have at least this height; smaller ones locate nothing.
MIN_CAM_SIZE = 4  # pixels


@dataclasses.dataclass(frozen=True)
class Maps:
    """Feature maps of one image after a block of layers."""

    layer: str  # name of the block's first layer, such as "features.0"
    kinds: str  # types of its layers, such as "Conv2d, ReLU, MaxPool2d"
    values: np.ndarray  # (C, H, W) float32


@contextlib.contextmanager
def record_outputs(modules: dict[str, nn.Module]) -> Iterator[list[tuple[str, Tensor]]]:
    """Record the outputs of modules in the order in which they run.

    Args:
        modules: Modules by name. A module may run several times.

    Yields:
        The name and the output of each module that has run.
    """
    outputs: list[tuple[str, Tensor]] = []

    def make_hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        # A copy, because the next layer may change the output in place.
        return lambda module, inputs, output: outputs.append((name, output.clone()))

    handles = [module.register_forward_hook(make_hook(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def list_steps(classifier: Classifier) -> dict[str, nn.Module]:
    """Return the steps of a network by name: its direct parts, or the parts of those that are sequences."""
    steps: dict[str, nn.Module] = {}
    parts = dict(classifier.named_children())
    # A network of another library is the only part, and its own parts are the steps.
    if len(parts) == 1:
        ((outer, network),) = parts.items()
        parts = {f"{outer}.{name}": part for name, part in network.named_children()}
    for name, part in parts.items():
        inner = part.named_children() if isinstance(part, nn.Sequential) else [("", part)]
        steps |= {f"{name}.{inner_name}".rstrip("."): module for inner_name, module in inner}
    return steps


@torch.no_grad()
def compute_feature_maps(classifier: Classifier, pixels: np.ndarray) -> list[Maps]:
    """Compute the feature maps of one image after each block, which is a convolution and what follows it.

    Args:
        classifier: The network, in evaluation mode.
        pixels: (H, W, C) uint8.

    Returns:
        The feature maps in the order of the blocks.
    """
    steps = list_steps(classifier)
    with record_outputs(steps) as outputs:
        classifier(torch.tensor(pixels[None]))
    blocks: list[list[tuple[str, Tensor]]] = []
    for name, output in outputs:
        if output.ndim != 4 or isinstance(steps[name], nn.Identity):
            continue
        if not blocks or any(isinstance(layer, nn.Conv2d) for layer in steps[name].modules()):
            blocks.append([])
        blocks[-1].append((name, output))
    return [
        Maps(block[0][0], ", ".join(_describe(steps[name]) for name, _ in block), block[-1][1][0].numpy())
        for block in blocks
    ]


def _describe(step: nn.Module) -> str:
    """Return the type of a step, or the types of the layers of a small sequence."""
    if isinstance(step, nn.Sequential):
        return ", ".join(type(layer).__name__ for layer in step)
    return type(step).__name__


def first_filters(classifier: Classifier) -> np.ndarray | None:
    """Return the filters (O, C, H, W) of the first convolution, or None if there is none."""
    layers = (layer for layer in classifier.modules() if isinstance(layer, nn.Conv2d))
    layer = next(layers, None)
    return None if layer is None else layer.weight.detach().numpy()


def compute_grad_cam(classifier: Classifier, pixels: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, str]:
    """Compute where images hold evidence for a class, by Grad-CAM (Selvaraju et al. 2017).

    Each feature map of a late layer is weighted by the mean gradient of the class's logit. Negative evidence is left
    out (equations 1 and 2 of the paper). The layer is the last one whose maps have 4x4 pixels or more.

    Args:
        classifier: The network, in evaluation mode.
        pixels: (N, H, W, C) uint8.
        classes: (N,) class indices to explain.

    Returns:
        The evidence (N, h, w) float32, scaled to [0, 1] for each image, and the name of the layer.
    """
    steps = list_steps(classifier)
    with torch.no_grad(), record_outputs(steps) as outputs:
        classifier(torch.tensor(pixels[:1]))
    runs = Counter(name for name, _ in outputs)
    maps = [(name, output) for name, output in outputs if output.ndim == 4 and runs[name] == 1]
    large = [name for name, output in maps if min(output.shape[2:]) >= MIN_CAM_SIZE]
    layer = (large or [name for name, _ in maps])[-1]
    with torch.enable_grad():
        kept: list[Tensor] = []

        def keep(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            kept.append(output.clone())
            # The next layer may change its input in place.
            return kept[0].clone()

        handle = steps[layer].register_forward_hook(keep)
        try:
            logits = classifier(torch.tensor(pixels))
        finally:
            handle.remove()
        (gradient,) = torch.autograd.grad(logits[torch.arange(len(classes)), torch.tensor(classes)].sum(), kept[0])
    weights = gradient.mean(dim=(2, 3), keepdim=True)  # (N, C, 1, 1)
    evidence = (weights * kept[0]).sum(dim=1).relu().detach()  # (N, h, w)
    highest = evidence.amax(dim=(1, 2), keepdim=True)
    return (evidence / highest.clamp(min=1e-12)).numpy(), layer


@torch.no_grad()
def list_layers(classifier: Classifier) -> pd.DataFrame:
    """List the layers that compute the logits of one image, in the order in which they run.

    Args:
        classifier: The network, in evaluation mode.

    Returns:
        A table with the columns layer, type, output (shape without the batch), parameters and macs.
    """
    info = classifier.info
    leaves = {name: layer for name, layer in classifier.named_modules() if name and not any(layer.children())}
    x = torch.zeros(1, info.size, info.size, info.channels, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, record_outputs(leaves) as outputs:
        classifier(x)
    root = type(classifier).__name__
    flops = {name.removeprefix(f"{root}."): sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    return pd.DataFrame(
        [
            {
                "layer": name,
                "type": type(leaves[name]).__name__,
                "output": "x".join(str(length) for length in output.shape[1:]),
                "parameters": sum(parameter.numel() for parameter in leaves[name].parameters()),
                "macs": flops.get(name, 0) // 2,
            }
            for name, output in outputs
            if not isinstance(leaves[name], nn.Identity)
        ]
    )
