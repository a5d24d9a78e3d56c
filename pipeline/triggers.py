"""When a retraining is due although only the data have changed: many new images, drift, or worse predictions."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from convoy.core.artifact_names import IMAGE_TABLE
from convoy.core.config import validate
from convoy.data.packed.packed_dataset import PackedDataset
from convoy.monitoring.config import RetrainConfig
from convoy.monitoring.drift import MIN_IMAGES
from pipeline import dvc_files
from pipeline.champion_images import Champion, compare, load_champion, read_images
from pipeline.stage import Stage

COLUMNS = ["path", "sha256", "label", "split"]
CHUNK_SIZE = 256  # images predicted at a time


class Due(NamedTuple):
    """Whether a retraining is due, and the facts that decide it, a sentence each."""

    is_due: bool
    reasons: list[str]


def check_triggers(root: Path, params: Mapping[str, Any], picture: Path) -> Due:
    """Return whether a retraining on the prepared images is due.

    Args:
        root: The project folder, in which the stages up to preprocess have run.
        params: The sections of params.yaml.
        picture: Image file to draw the most unusual images to.

    Raises:
        ConvoyError: If MLflow can't be reached, or the champion is missing or was modified.
    """
    settings = validate(RetrainConfig, params["retrain"], "retrain")
    before = dvc_files.read_locked_file(root, "register", "artifacts/preprocess", IMAGE_TABLE)
    if before is None:
        return Due(True, ["the images of the last run are neither in DVC's cache nor on its remote"])
    prepared = Stage(root, "report").input("preprocess")
    old = pd.read_parquet(io.BytesIO(before), columns=COLUMNS)
    now = pd.read_parquet(prepared / IMAGE_TABLE, columns=COLUMNS)
    count = len(list_changed(old, now))
    limit = f"retrain.min_new_images = {settings.min_new_images}"
    counted = f"{count} images are new, relabelled or gone since the last run"
    if count >= settings.min_new_images:
        return Due(True, [f"{counted}, which reaches {limit}"])
    reasons, is_due = [f"{counted}, fewer than {limit}"], False
    new = now[~now["sha256"].isin(old["sha256"])]
    if not settings.alpha or len(new) < MIN_IMAGES:
        return Due(False, reasons)
    champion = load_champion(root, params["register"]["name"])
    if champion is None:
        return Due(True, [*reasons, "there is no champion yet"])
    packed = PackedDataset.load(Stage(root, "preprocess").input("fetch"))
    paths = packed.table.read_columns("path")["path"].to_numpy(object)
    row_of = dict(zip(paths, range(len(paths)), strict=True))
    images = list(read_images(packed, [row_of[path] for path in new["path"]], champion.predictor.info))
    found = compare(champion, packed, new["path"].tolist(), images, picture)
    for is_reason, text in (
        (found.drift.p_value <= settings.alpha, f"drift of the new images: {found.drift.describe(settings.alpha)}"),
        judge_accuracy(champion, images, new["label"].to_numpy(object), settings.alpha),
    ):
        is_due |= is_reason
        reasons.append(text if is_reason else f"no {text}")
    return Due(is_due, reasons)


def list_changed(old: pd.DataFrame, now: pd.DataFrame) -> set[str]:
    """Return the sha256 of the images that are new, relabelled or gone."""
    before, after = (set(zip(table["sha256"], table["label"], strict=True)) for table in (old, now))
    return {sha256 for sha256, _ in before ^ after}


def judge_accuracy(
    champion: Champion, images: Sequence[np.ndarray], labels: np.ndarray, alpha: float
) -> tuple[bool, str]:
    """Return whether the champion's accuracy on newly labelled images is significantly below its interval.

    Args:
        champion: The champion.
        images: The N new images, as its network takes them.
        labels: (N,) names of their classes.
        alpha: Probability of a false alarm.
    """
    predictor = champion.predictor
    chunks = [images[start : start + CHUNK_SIZE] for start in range(0, len(images), CHUNK_SIZE)]
    predicted = np.concatenate([predictor.probabilities(np.stack(chunk)).argmax(axis=1) for chunk in chunks])
    correct = int((np.array(predictor.info.classes, object)[predicted] == labels).sum())
    low = champion.accuracy_low
    if low is None:
        return False, "test of the champion's accuracy: its run in MLflow has no interval"
    p_value = binomtest(correct, len(labels), low, alternative="less").pvalue
    return p_value <= alpha, (
        f"loss of accuracy: {champion.name} is correct on {correct / len(labels):.1%} of {len(labels)} newly labelled "
        f"images, its interval begins at {low:.1%} (p = {p_value:.4g})"
    )
