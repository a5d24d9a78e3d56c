"""Test of unlabelled images for drift: a folder of images, or the log of a server."""

import json
from pathlib import Path

import numpy as np

from convoy.core import config
from convoy.core.errors import ConvoyError
from convoy.data.image_io import InvalidImageError
from convoy.data.packed.packed_dataset import PackedDataset
from convoy.inference.predictor import Predictor
from convoy.monitoring.drift import MAX_IMAGES, sample_rows
from convoy.serving.request_log import read_images
from pipeline.champion_images import SEED, compare, load_champion
from pipeline.predict import escape_unprintable, find_images
from pipeline.stage import Stage

DRIFT_STATUS = 3
PICTURE = Path("artifacts/monitor/unusual.png")


def monitor(root: Path, source: Path, alpha: float, *, as_json: bool = False) -> int:
    """Test images for drift from those that the champion was trained on, and print the result.

    Args:
        root: The project folder.
        source: A folder of images or of the log of a server.
        alpha: Probability of a false alarm.
        as_json: Whether to print JSON.

    Returns:
        `DRIFT_STATUS` if there is drift, else 0.

    Raises:
        ConvoyError: If there is no champion, or there are too few images.
    """
    if not source.is_dir():
        raise ConvoyError(f"{source} is not a folder: name one with images, or that of `convoy serve --log`")
    name = config.load(root / "params.yaml")["register"]["name"]
    champion = load_champion(root, name)
    if champion is None:
        raise ConvoyError(f"model {name} has no champion to compare with: `convoy run` promotes one")
    packed = PackedDataset.load(Stage(root, "preprocess").input("fetch"))
    names, images = decode(list_files(source), champion.predictor)
    found = compare(champion, packed, names, images, root / PICTURE)
    is_drift = found.drift.p_value <= alpha
    if as_json:
        values = {"drift": is_drift, "p_value": found.drift.p_value, "effect": round(found.drift.effect, 4)}
        print(json.dumps(values | {"new": found.new, "reference": found.reference, "picture": str(PICTURE)}))
    else:
        print(f"{found.new:,} new images, compared with {found.reference:,} training images of {champion.name}")
        print(f"{'drift' if is_drift else 'no drift'}: {found.drift.describe(alpha)}")
        print("predicted classes: " + "; ".join(found.shifts))
        print(f"the most unusual images: {PICTURE}")
    return DRIFT_STATUS if is_drift else 0


def list_files(source: Path) -> list[tuple[str, bytes | Path]]:
    """Return the name and the file, or its content, of each image of a folder or of the newest in a server's log."""
    if any(source.glob("*.parquet")) or any(source.glob("*.jsonl")):
        return list(read_images(source, MAX_IMAGES).items())
    files = list(find_images([str(source)]))
    return [(str(files[row].relative_to(source)), files[row]) for row in sample_rows(len(files), SEED)]


def decode(files: list[tuple[str, bytes | Path]], predictor: Predictor) -> tuple[list[str], list[np.ndarray]]:
    """Decode image files as a network takes them, and print which of them are no valid images."""
    names, images = [], []
    for name, file in files:
        try:
            content = file.read_bytes() if isinstance(file, Path) else file
            images.append(predictor.preprocess(content))
            names.append(name)
        except (InvalidImageError, OSError) as error:
            print(f"{escape_unprintable(name)} is left out: {error}")
    return names, images
