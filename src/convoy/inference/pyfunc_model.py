"""The MLflow pyfunc model, which serves a trained classifier."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image

from convoy.core.hashing import verify_checksums
from convoy.data import image_io
from convoy.inference import predictor
from convoy.inference.image_text import decode_text


class RefusedImageError(MlflowException):
    """An image that can't be used.

    MLflow's server puts the whole request, which may have megabytes, in front of the message of an error. This message
    can't be changed.
    """

    def __init__(self, message: str) -> None:
        self._message = message
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        """Return the message."""
        return self._message

    @message.setter
    def message(self, _message: str) -> None:
        pass


class ImageClassifier(PythonModel):
    """An MLflow model that predicts a label, its probability and the probabilities of all classes for each image."""

    def load_context(self, context: PythonModelContext) -> None:
        """Restore the classifier from its verified record, weights and calibration, without unpickling anything."""
        folder = Path(context.artifacts["record"]).parent
        verify_checksums(folder, json.loads(Path(context.artifacts["hashes"]).read_text()))
        self.predictor = predictor.restore(folder)

    # `model_input` has no type hint, because MLflow would use it as a schema and reject the inputs documented here.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        """Predict the class of each image.

        Args:
            context: The MLflow context, which is not used.
            model_input: One of the following, where integer pixels are in [0, 255]:

                - an integer array (H, W), (H, W, C), (N, H, W) or (N, H, W, C), with 1 to 4 channels (grey, grey and
                  alpha, RGB, RGBA);
                - a PIL image;
                - the bytes of an image file, their base64 text or a `data:` URI;
                - images in any of these forms, in a list or in the first column of a table.
            params: MLflow inference parameters, which are not used.

        Returns:
            A table with one row per image and the columns `label`, `probability` and `probabilities`, the last by the
            names of the classes and in their order.

        Raises:
            MlflowException: If the input has any other form, such as an array with the channels first, (3, H, W).
        """
        info = self.predictor.info
        shape = (0, info.size, info.size, info.channels)
        given = _split_input(model_input)
        images = [self._preprocess(image, position, len(given)) for position, image in enumerate(given)]
        probabilities = self.predictor.probabilities(np.stack(images) if images else np.empty(shape, np.uint8))
        best = probabilities.argmax(axis=1)
        return pd.DataFrame(
            {
                "label": [info.classes[label] for label in best],
                "probability": probabilities[np.arange(len(best)), best],
                "probabilities": [dict(zip(info.classes, row, strict=True)) for row in probabilities.tolist()],
            }
        )

    def _preprocess(self, image: Any, position: int, count: int) -> np.ndarray:
        info = self.predictor.info
        try:
            if isinstance(image, str):
                image = decode_text(image)
            if isinstance(image, bytes):
                return self.predictor.preprocess(image)
            if isinstance(image, Image.Image):
                pixels = image_io.to_grey_or_rgb(image, info.longest_side)
            else:
                pixels = _to_grey_or_rgb(image, info.longest_side)
            return image_io.center_crop_resize(pixels, info.size, info.channels)
        except image_io.InvalidImageError as fault:
            where = f" at position {position}" if count > 1 else ""
            raise RefusedImageError(f"the image{where} {fault}") from None


def _split_input(model_input: Any) -> list[Any]:
    if isinstance(model_input, pd.DataFrame):
        return model_input.iloc[:, 0].tolist()
    if isinstance(model_input, bytes | str | Image.Image):
        return [model_input]
    if hasattr(model_input, "__array__"):
        pixels = np.asarray(model_input)
        if pixels.dtype != object:
            return _split_array(pixels)
    return list(model_input)


def _split_array(pixels: np.ndarray) -> list[np.ndarray]:
    """Split an array into images, where three axes without a channel axis at the end are N grey images."""
    if pixels.ndim == 3 and pixels.shape[2] > 4 and pixels.shape[0] in (3, 4):
        channels = pixels.shape[0]
        raise MlflowException.invalid_parameter_value(
            f"an array of the shape {pixels.shape} is refused: channels come last, (H, W, {channels}), as in "
            f"array.transpose(1, 2, 0). For {channels} grey images pass ({channels}, H, W, 1), or a list of arrays"
        )
    one = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] <= 4)
    return [pixels] if one else list(pixels)


def _to_grey_or_rgb(image: Any, longest_side: int) -> np.ndarray:
    """Convert the pixels of one image to (H, W, 1 or 3) uint8, with no side longer than `longest_side`."""
    pixels = np.asarray(image)
    if pixels.size == 0:
        raise image_io.InvalidImageError("has no pixels")
    if not np.issubdtype(pixels.dtype, np.integer) or pixels.min() < 0 or pixels.max() > 255:
        raise image_io.InvalidImageError(f"has pixels of type {pixels.dtype}; they must be whole numbers from 0 to 255")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    mode = {(2, 1): "L", (3, 2): "LA", (3, 3): "RGB", (3, 4): "RGBA"}
    if (pixels.ndim, pixels.shape[2] if pixels.ndim == 3 else 1) not in mode:
        raise image_io.InvalidImageError(
            f"has the shape {pixels.shape}; it must be (H, W) or (H, W, 1 to 4), channels last"
        )
    return image_io.to_grey_or_rgb(Image.fromarray(pixels.astype(np.uint8)), longest_side)


# MLflow creates the model by running this file ("models from code") and uses the object that is set here.
set_model(ImageClassifier())
