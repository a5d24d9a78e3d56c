"""Export: a predictor as an ONNX file, for whoever has neither this library nor torch."""

import contextlib
import io
import json
import logging
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from convoy.errors import ConvoyError
from convoy.inference.predictor import Predictor

FILE = "model.onnx"
BATCH = 32  # images that it answers at a time here
MEANING = (
    "pixels (N, {size}, {size}, {channels}) uint8: the middle square of an upright {colours} image, reduced to "
    "{longest_side} pixels at most and then resized, both with anti-aliasing (Pillow's thumbnail and ImageOps.fit, "
    "BILINEAR). probabilities (N, {k}) float: calibrated, of `classes` in their order. Normalisation, softmax and "
    "temperature are inside."
)


class OnnxWrapper(nn.Module):
    """All of a predictor as one network: images (N, H, W, C) uint8 -> probabilities (N, K) float."""

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self.classifier = predictor.classifier
        self.temperature = predictor.temperature

    def forward(self, pixels: Tensor) -> Tensor:
        return (self.classifier(pixels) / self.temperature).softmax(dim=1)


def export(predictor: Predictor, file: Path) -> None:
    """Write a predictor into one ONNX file, which says itself what goes in and comes out; its bytes are reproducible.

    Raises ConvoyError that says why, where torch can't.
    """
    task = predictor.task
    # two images: torch would take a one for a constant
    pixels = torch.zeros(2, task.size, task.size, task.channels, dtype=torch.uint8)
    colours = "RGB" if task.channels == 3 else "grey"
    try:
        with _quiet():
            from onnxscript import ir  # seconds, and nobody else needs it

            program = torch.onnx.export(
                OnnxWrapper(predictor).eval(),
                (pixels,),
                input_names=["pixels"],
                output_names=["probabilities"],
                dynamic_shapes=({0: torch.export.Dim("N")},),
                verbose=False,
            )
            assert program is not None  # as it would be, were it told the file
            model = program.model
            model.graph.metadata_props.clear()
            for node in model.graph.all_nodes():
                node.metadata_props.clear()  # lines of our source, with the paths of this machine
            model.doc_string = MEANING.format(**vars(task), colours=colours, k=len(task.classes))
            explained = {
                "architecture": predictor.architecture,
                "dataset": task.dataset,
                "classes": json.dumps(task.classes),
                "size": str(task.size),
                "channels": str(task.channels),
            }
            model.metadata_props.update(explained)
            ir.save(model, file)  # weights inside; of more than 2 GB, ONNX's limit, it refuses
    except OSError:
        raise
    except Exception as error:  # of the network or of torch: it fails in many ways
        raise ConvoyError(f"torch can't export it ({_reason(error)})") from error


def max_difference(file: Path, pixels: np.ndarray, expected: np.ndarray) -> float:
    """The `difference` between what `file` answers to images (N, H, W, C) uint8 and `expected` (N, K).

    Raises ConvoyError where onnxruntime can't run the file.
    """
    try:
        with _quiet():
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            options.intra_op_num_threads = torch.get_num_threads()  # its own choice is a thread pinned to each core
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            batches = [pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH)]
            answered = np.concatenate([session.run(["probabilities"], {"pixels": batch})[0] for batch in batches])
    except OSError:
        raise
    except Exception as error:  # its errors have no type of their own
        raise ConvoyError(f"onnxruntime can't run {file.name} ({_reason(error)})") from error
    return difference(answered, expected)


def difference(answered: np.ndarray, expected: np.ndarray) -> float:
    """The largest of two tables of probabilities (N, K); inf where the shapes differ."""
    return float(np.abs(answered - expected).max()) if answered.shape == expected.shape else np.inf


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what others print, log and warn of on their way: what matters is in their error."""
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


def _reason(error: BaseException) -> str:
    """The first lines of what began it."""
    while error.__cause__:
        error = error.__cause__
    return textwrap.shorten(str(error) or repr(error), 200)
