"""Serving: a trained classifier as the MLflow model that takes plain images."""

import base64
import binascii
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image

from convoy import images, models
from convoy.classifier import predict
from convoy.task import Task

LONGEST_SIDE = 4096  # pixels of an image that comes as a file; larger ones are reduced


class ImageClassifier(PythonModel):
    """Images in, a table out: label, its probability, and the probabilities of all classes."""

    def load_context(self, context: PythonModelContext) -> None:
        """Rebuild the network from its record and weights; nothing is unpickled."""
        record = json.loads(Path(context.artifacts["record"]).read_text())
        self.task = Task(**record["task"])
        weights = Path(context.artifacts["weights"])
        self.classifier = models.restore(record["architecture"], record["settings"], self.task, weights)

    # model_input has no type hint: MLflow would take one for a schema, and refuse what is documented here
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        """A row for each image: `label`, `probability`, and `probabilities` in the order of the model's classes.

        `model_input` is a uint8 array (H, W), (H, W, C), (N, H, W) or (N, H, W, C) with 1 to 4 channels (grey, grey
        and alpha, RGB, RGBA); a list of arrays of any sizes; the bytes of image files, or their base64 text, in a
        list or in the first column of a table. Raises MlflowException for anything else.
        """
        plain = [self._fitted(image) for image in _each(model_input)]
        shape = (0, self.task.size, self.task.size, self.task.channels)
        pixels = np.stack(plain) if plain else np.empty(shape, np.uint8)
        probabilities = predict(self.classifier, pixels, 256) if plain else np.empty((0, len(self.task.classes)))
        best = probabilities.argmax(axis=1)
        return pd.DataFrame(
            {
                "label": [self.task.classes[label] for label in best],
                "probability": probabilities[np.arange(len(best)), best],
                "probabilities": probabilities.tolist(),
            }
        )

    def _fitted(self, image: Any) -> np.ndarray:
        try:
            return images.fit(_pixels(image), self.task.size, self.task.channels)
        except images.BadImage as fault:
            raise MlflowException.invalid_parameter_value(f"the image {fault}") from None


def _each(model_input: Any) -> list[Any]:
    if isinstance(model_input, pd.DataFrame):
        return model_input.iloc[:, 0].tolist()
    if isinstance(model_input, np.ndarray) and model_input.dtype != object:
        # (H, W) or (H, W, C) is one image; three axes without a last one of channels are N grey images
        one = model_input.ndim == 2 or (model_input.ndim == 3 and model_input.shape[2] <= 4)
        return [model_input] if one else list(model_input)
    return [model_input] if isinstance(model_input, bytes | str) else list(model_input)


def _pixels(image: Any) -> np.ndarray:
    if isinstance(image, str):
        try:
            image = base64.b64decode(image, validate=True)
        except binascii.Error:
            raise images.BadImage("is text, but not the base64 of an image file") from None
    if isinstance(image, bytes):
        return images.decode(image, LONGEST_SIDE).pixels
    pixels = np.asarray(image)
    if pixels.size == 0:
        raise images.BadImage("has no pixels")
    if not np.issubdtype(pixels.dtype, np.integer) or pixels.min() < 0 or pixels.max() > 255:
        raise images.BadImage(f"has pixels of type {pixels.dtype}; they must be whole numbers from 0 to 255")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    mode = {(2, 1): "L", (3, 2): "LA", (3, 3): "RGB", (3, 4): "RGBA"}
    if (pixels.ndim, pixels.shape[2] if pixels.ndim == 3 else 1) not in mode:
        raise images.BadImage(f"has the shape {pixels.shape}; it must be (H, W) or (H, W, 1 to 4)")
    return images.plain(Image.fromarray(pixels.astype(np.uint8)), LONGEST_SIDE)


set_model(ImageClassifier())  # MLflow runs this file to make the model ("models from code"), and takes what is set here
