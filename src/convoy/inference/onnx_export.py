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


class OnnxWrapper(nn.Module):
    """A complete predictor as one network, from images (N, H, W, C) uint8 to probabilities (N, K) float."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.classifier = predictor.classifier
        self.temperature = predictor.temperature

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute the probabilities (N, K) of images (N, H, W, C) uint8."""
        return (self.classifier(pixels) / self.temperature).softmax(dim=1)


def export(predictor: Predictor, file: Path) -> None:
    """Write a predictor to a single ONNX file.

    The file contains the weights, and its metadata describes the input and the output. Repeated exports are
    bit-identical.

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

            program = torch.onnx.export(
                OnnxWrapper(predictor).eval(),
                (pixels,),
                input_names=["pixels"],
                output_names=["probabilities"],
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
            model.doc_string = DESCRIPTION.format(**vars(info), colours=colours, k=len(info.classes))
            explained = {
                "architecture": predictor.architecture,
                "dataset": info.dataset,
                "classes": json.dumps(info.classes),
                "size": str(info.size),
                "channels": str(info.channels),
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
