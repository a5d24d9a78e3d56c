"""A model file that ONNX runtime runs: what it expects, and its predictions."""

import dataclasses
import json
import re
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from convoy.core.errors import ConvoyError, describe_error

# The name of the file, in registered models and in packages.
ONNX_FILE = "model.onnx"
# `longest_side` of files that were exported before the metadata named it, and only the description did.
LONGEST_SIDE = re.compile(r"reduced to (\d+) pixels at most")
# Decimal places of a probability in an answer: those that single precision has.
DECIMALS = 7


class InputSpec(NamedTuple):
    """What a network expects of an image."""

    longest_side: int  # pixels; larger images are first reduced to it, as in training
    size: int  # height and width, in pixels
    channels: int  # 1 grey or 3 RGB

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape (H, W, C) of a preprocessed image."""
        return self.size, self.size, self.channels


@dataclasses.dataclass(frozen=True)
class Heatmaps:
    """Where a network looked, for each of N images."""

    values: np.ndarray  # (N, h, w) float, from 0 to 1
    kind: str  # what the values mean


class ServedModel(Protocol):
    """A loaded model, whatever runs it."""

    architecture: str
    classes: list[str]  # K names
    spec: InputSpec
    runtime: str  # the name of what runs it

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """Predict probabilities (N, K) of preprocessed images (N, H, W, C) uint8."""

    def explain(self, pixels: np.ndarray) -> Heatmaps | None:
        """Compute where the network looked, or return None if it can't tell."""


class OnnxModel:
    """A model in an ONNX file.

    Args:
        file: The file, as `convoy.inference.onnx_export` writes it.
        threads: The number of threads of a prediction.

    Raises:
        ConvoyError: If ONNX runtime can't load the file, or its metadata is not that of convoy's files.
    """

    runtime = "onnxruntime"

    def __init__(self, file: Path, threads: int) -> None:
        # Imported here, so that a command can first look at its arguments.
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # Errors are raised, and warnings would go to the terminal.
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        # Threads that spin while they wait take the processor from the decoding of the next images.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            meta = self._session.get_modelmeta()
            facts = meta.custom_metadata_map
            match = LONGEST_SIDE.search(meta.description)
            longest_side = facts.get("longest_side") or (match[1] if match else "4096")
            self.architecture: str = facts["architecture"]
            self.classes: list[str] = json.loads(facts["classes"])
            self.spec = InputSpec(int(longest_side), int(facts["size"]), int(facts["channels"]))
            self._outputs = [output.name for output in self._session.get_outputs()]
        except OSError:
            raise
        except KeyError as error:
            raise ConvoyError(f"{file} has no {error} in its metadata: convoy did not export it") from error
        # The errors of onnxruntime have no common base class.
        except Exception as error:
            raise ConvoyError(f"onnxruntime can't load {file} ({describe_error(error, 200)})") from error

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """Predict probabilities (N, K) float32 of preprocessed images (N, H, W, C) uint8."""
        return self._session.run(["probabilities"], {"pixels": pixels})[0]

    def explain(self, pixels: np.ndarray) -> Heatmaps | None:
        """Compute where the network looked, from its last feature maps.

        Where the head of the network is linear on the averaged maps, this is the class activation map of the most
        probable class (Zhou et al. 2016); for other networks it is the mean strength of the maps.

        Args:
            pixels: (N, H, W, C) uint8.

        Returns:
            The heat maps; None if the file gives no feature maps.
        """
        if "feature_maps" not in self._outputs:
            return None
        if "class_weights" in self._outputs:
            maps, weights = self._session.run(["feature_maps", "class_weights"], {"pixels": pixels})
            values = np.maximum(np.einsum("nchw,nc->nhw", maps, weights), 0)
            kind = "class activation map"
        else:
            (maps,) = self._session.run(["feature_maps"], {"pixels": pixels})
            values = np.abs(maps).mean(axis=1)
            kind = "strength of the last feature maps"
        values = values - values.min(axis=(1, 2), keepdims=True)
        return Heatmaps(values / np.maximum(values.max(axis=(1, 2), keepdims=True), 1e-12), kind)


def check(model: ServedModel) -> None:
    """Run a model once, before it takes the place of another.

    Raises:
        ConvoyError: If it fails, or does not give a probability for each class.
    """
    pixels = np.full((2, *model.spec.shape), 128, np.uint8)
    try:
        found = model.probabilities(pixels)
    except Exception as error:
        raise ConvoyError(f"the model can't be run ({describe_error(error, 200)})") from error
    expected = 2, len(model.classes)
    if found.shape != expected or not np.allclose(found.sum(axis=1), 1, atol=1e-3):
        raise ConvoyError(f"the model does not give probabilities of its {expected[1]} classes")


def rank(model: ServedModel, probabilities: np.ndarray, top_k: int | None) -> list[dict[str, float]]:
    """Name the probabilities of each image, the highest first.

    Args:
        model: The model.
        probabilities: (N, K).
        top_k: The number of classes; None for all.

    Returns:
        For each image, the probability by the name of the class.
    """
    # A stable sort keeps the order of the classes where probabilities are equal.
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    values = np.take_along_axis(probabilities, order, axis=1).astype(np.float64).round(DECIMALS).tolist()
    names = model.classes
    return [
        dict(zip([names[index] for index in row], numbers, strict=True))
        for row, numbers in zip(order.tolist(), values, strict=True)
    ]
