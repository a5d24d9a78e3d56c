"""verify: whether a registered model is untouched, loads in a fresh process and answers as evaluated; no stage."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from convoy import config
from convoy.data.arrays import Images
from convoy.errors import ConvoyError
from convoy.evaluation.metrics import PREFIX
from convoy.registry import model_loader
from convoy.tracking.store import TrackingStore, open_store
from pipeline.stage import project_root

IMAGES = 200  # that it answers, at most


def main() -> None:
    """Check the files of MODEL, load it in a fresh process, and compare its answers with the recorded ones."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.verify", description=main.__doc__)
    parser.add_argument("model", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    parser.add_argument("evaluated", type=Path, help="folder with predictions.parquet, as artifacts/evaluate/lenet")
    parser.add_argument("prepared", type=Path, nargs="?", default=Path("artifacts/preprocess"))
    options = parser.parse_args()
    root = Path.cwd()
    try:
        name = config.load(root / "params.yaml")["register"]["name"]
        with open_store(project_root(root), name) as store:
            print(verify(store, options.model, options.evaluated, options.prepared))
    except ConvoyError as error:
        sys.exit(f"convoy: verify: {error}")


def verify(store: TrackingStore, uri: str, evaluated: Path, prepared: Path) -> str:
    """What was found, in words; raises ConvoyError where the model is not what was evaluated."""
    pixels, expected = sample(evaluated, prepared)
    difference = model_loader.verify(model_loader.find(store, uri), pixels, expected, store.scratch)
    return f"{uri} answers {len(pixels)} images as evaluated; probabilities differ by {difference:.1g} at most"


def sample(evaluated: Path, prepared: Path) -> tuple[np.ndarray, np.ndarray]:
    """Some test images (N, H, W, C) uint8 of every class, and the recorded probabilities (N, K) of each."""
    for file in (evaluated / "predictions.parquet", prepared / "task.json", prepared / "test_pixels.npy"):
        if not file.is_file():
            raise ConvoyError(f"there is no {file}: name the folder of an evaluation, as artifacts/evaluate/lenet")
    recorded = pd.read_parquet(evaluated / "predictions.parquet")
    classes = json.loads((prepared / "task.json").read_text())["classes"]
    columns = [f"{PREFIX}{name}" for name in classes]
    if not set(columns) <= set(recorded):
        raise ConvoyError(f"{evaluated} is of other classes than {prepared}: run `dvc repro`")
    expected = recorded[columns].to_numpy()
    test = Images.load(prepared, "test")
    if len(test) != len(expected):
        raise ConvoyError(f"{evaluated} is of {len(expected)} images and {prepared} of {len(test)}: run `dvc repro`")
    rows = np.unique(np.linspace(0, len(test) - 1, IMAGES).round().astype(int))  # of every class, as they lie in order
    return test.pixels[rows], expected[rows]


if __name__ == "__main__":
    main()
