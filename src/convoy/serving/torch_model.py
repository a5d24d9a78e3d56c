"""A model that PyTorch runs, for versions that have no ONNX file. This is the only module that imports PyTorch."""

from pathlib import Path

import numpy as np

from convoy.serving.onnx_model import Heatmaps, InputSpec


class TorchModel:
    """A model restored from its record, weights and calibration.

    Args:
        folder: The folder with these files.
        threads: The number of threads of a prediction.
    """

    runtime = "torch"

    def __init__(self, folder: Path, threads: int) -> None:
        # Imported here, because it takes seconds and most models have an ONNX file.
        import torch

        from convoy.inference import predictor

        torch.set_num_threads(threads)
        self._predictor = predictor.restore(folder)
        info = self._predictor.info
        self.architecture = self._predictor.architecture
        self.classes = info.classes
        self.spec = InputSpec(info.longest_side, info.size, info.channels)

    def probabilities(self, pixels: np.ndarray) -> np.ndarray:
        """Predict probabilities (N, K) float32 of preprocessed images (N, H, W, C) uint8."""
        return self._predictor.probabilities(pixels).astype(np.float32)

    def explain(self, pixels: np.ndarray) -> Heatmaps | None:
        """Return None: only ONNX files give their feature maps."""
        return None
