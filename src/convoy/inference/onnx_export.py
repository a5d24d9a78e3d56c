"""ONNX export of a predictor, for use without this library and without PyTorch."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from convoy.core.errors import ConvoyError, describe_error
from convoy.inference.predictor import Predictor

ONNX_FILE = "model.onnx"
BATCH_SIZE = 32  # images per call of onnxruntime
DESCRIPTION = (
    "pixels (N, {size}, {size}, {channels}) uint8: the middle square of an upright {colours} image, reduced to "
    "{longest_side} pixels at most and then resized, both with anti-aliasing (Pillow's thumbnail and ImageOps.fit, "
    "BILINEAR). probabilities (N, {k}) float: calibrated, of `classes` in their order. Normalisation, softmax and "
    "temperature are inside."
)
MAPS_DESCRIPTION = " feature_maps (N, {shape}) float: the last feature maps, of the layer {layer}."
WEIGHTS_DESCRIPTION = (
    " class_weights (N, {channels}) float: the weight of each feature map in the logit of the most probable class. "
    "The weighted sum of the maps shows where the network saw that class (a class activation map)."
)
# The last feature maps with at least this height and width show where something is in an image.
MIN_MAP_SIZE = 3


class OnnxWrapper(nn.Module):
    """A complete predictor as one network, from images (N, H, W, C) uint8 to probabilities and feature maps.

    Args:
        predictor: The predictor.
        pixels: Images (N, H, W, C) uint8, by which the layer with the last feature maps is found.
    """

    def __init__(self, predictor: Predictor, pixels: Tensor) -> None:
        super().__init__()
        self.classifier = predictor.classifier
        self.temperature = predictor.temperature
        self.layer, self.map_shape = find_last_maps(self.classifier, pixels)
        self.class_weights = self._find_class_weights(pixels)

    @property
    def outputs(self) -> list[str]:
        """Return the names of the outputs of `forward`."""
        maps = ["feature_maps"] * bool(self.layer)
        return ["probabilities", *maps, *["class_weights"] * (self.class_weights is not None)]

    def describe_maps(self) -> str:
        """Describe the outputs other than the probabilities."""
        if not self.layer:
            return ""
        text = MAPS_DESCRIPTION.format(shape=", ".join(map(str, self.map_shape)), layer=self.layer)
        return text if self.class_weights is None else text + WEIGHTS_DESCRIPTION.format(channels=self.map_shape[0])

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Compute the probabilities (N, K), and with them feature maps (N, C, h, w) and class weights (N, C)."""
        logits, maps = self._run(pixels)
        probabilities = (logits / self.temperature).softmax(dim=1)
        if maps is None:
            return (probabilities,)
        if self.class_weights is None:
            return probabilities, maps
        return probabilities, maps, self.class_weights[logits.argmax(dim=1)]

    def _run(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the logits (N, K) and the last feature maps."""
        if not self.layer:
            return self.classifier(pixels), None
        kept: list[Tensor] = []
        layer = self.classifier.get_submodule(self.layer)
        handle = layer.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        try:
            return self.classifier(pixels), kept[-1]
        finally:
            handle.remove()

    def _find_class_weights(self, pixels: Tensor) -> Tensor | None:
        """Return the weights (K, C) of a linear layer on averaged feature maps, or None if the head is another one."""
        with torch.no_grad():
            logits, maps = self._run(pixels)
            if maps is None:
                return None
            shape = logits.shape[1], maps.shape[1]
            linear = [layer for layer in self.classifier.modules() if isinstance(layer, nn.Linear)]
            for layer in (layer for layer in linear if layer.weight.shape == shape):
                # The comparison shows whether the layer is the whole head, whatever the network calls its parts.
                if torch.allclose(layer(maps.mean((2, 3))), logits, rtol=1e-3, atol=1e-4):
                    return layer.weight.detach()
        return None


def find_last_maps(classifier: nn.Module, pixels: Tensor) -> tuple[str, tuple[int, ...]]:
    """Find the layer whose output are the last feature maps that are large enough to show a place in the image.

    Args:
        classifier: The network, in evaluation mode.
        pixels: Images (N, H, W, C) uint8.

    Returns:
        The name of the layer and the shape (C, h, w) of its output; "" and () if there are none.
    """
    found: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, module in classifier.named_modules():

        def keep(_module: nn.Module, _inputs: object, output: object, name: str = name) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) >= MIN_MAP_SIZE:
                found.pop(name, None)
                found[name] = tuple(output.shape[1:])

        handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        classifier(pixels)
    for handle in handles:
        handle.remove()
    return list(found.items())[-1] if found else ("", ())


def export(predictor: Predictor, file: Path) -> None:
    """Write a predictor to a single ONNX file.

    The file contains the weights, and its metadata describes the input and the outputs: the probabilities, and the last
    feature maps where the network has some. Repeated exports are bit-identical.

    Args:
        predictor: The predictor to export.
        file: The file to write.

    Raises:
        ConvoyError: If PyTorch can't export the network; the message contains the reason.
    """
    info = predictor.info
    # A batch of two images, because torch would treat a size of one as a constant.
    pixels = torch.zeros(2, info.size, info.size, info.channels, dtype=torch.uint8)
    colours = "RGB" if info.channels == 3 else "grey"
    try:
        with _suppress_output():
            # Imported here, because the import takes seconds and only this function needs it.
            from onnxscript import ir

            wrapper = OnnxWrapper(predictor, pixels).eval()
            program = torch.onnx.export(
                wrapper,
                (pixels,),
                input_names=["pixels"],
                output_names=wrapper.outputs,
                dynamic_shapes=({0: torch.export.Dim("N")},),
                verbose=False,
            )
            # `torch.onnx.export` returns `None` only if it is given a file.
            assert program is not None
            model = program.model
            # Remove the metadata about source lines, which contains paths of this machine.
            model.graph.metadata_props.clear()
            for node in model.graph.all_nodes():
                node.metadata_props.clear()
            description = DESCRIPTION.format(**vars(info), colours=colours, k=len(info.classes))
            model.doc_string = description + wrapper.describe_maps()
            explained = {
                "architecture": predictor.architecture,
                "dataset": info.dataset,
                "classes": json.dumps(info.classes),
                "size": str(info.size),
                "channels": str(info.channels),
                "longest_side": str(info.longest_side),
                "feature_maps": wrapper.layer,
            }
            model.metadata_props.update(explained)
            # Saves the weights inside the file. Raises an error above 2 GB, the limit of ONNX.
            ir.save(model, file)
    except OSError:
        raise
    except Exception as error:
        # Both the network and torch can raise errors of many types.
        raise ConvoyError(f"torch can't export it ({_root_cause(error)})") from error


def max_difference(file: Path, pixels: np.ndarray, expected: np.ndarray) -> float:
    """Compare the predictions of an ONNX file with the expected ones.

    Args:
        file: The ONNX file.
        pixels: (N, H, W, C) uint8 images.
        expected: (N, K) expected probabilities.

    Returns:
        The largest absolute difference of a probability, as computed by `max_absolute_difference`.

    Raises:
        ConvoyError: If onnxruntime can't run the file.
    """
    try:
        with _suppress_output():
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            # By default onnxruntime pins one thread to each core.
            options.intra_op_num_threads = torch.get_num_threads()
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            batches = [pixels[start : start + BATCH_SIZE] for start in range(0, len(pixels), BATCH_SIZE)]
            predicted = np.concatenate([session.run(["probabilities"], {"pixels": batch})[0] for batch in batches])
    except OSError:
        raise
    except Exception as error:
        # The errors of onnxruntime have no common base class.
        raise ConvoyError(f"onnxruntime can't run {file.name} ({_root_cause(error)})") from error
    return max_absolute_difference(predicted, expected)


def max_absolute_difference(predicted: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference of two (N, K) tables of probabilities, or inf if the shapes differ."""
    return float(np.abs(predicted - expected).max()) if predicted.shape == expected.shape else np.inf


@contextlib.contextmanager
def _suppress_output() -> Iterator[None]:
    """Suppress printed output, log records and warnings of other libraries, whose errors are reported anyway."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(record=True),
        ):
            yield
    finally:
        logging.disable(before)


def _root_cause(error: BaseException) -> str:
    """Return the message of the original cause of an error, shortened to 200 characters."""
    while error.__cause__:
        error = error.__cause__
    return describe_error(error, 200)
