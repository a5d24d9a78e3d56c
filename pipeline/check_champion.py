"""Command that checks whether the prepared images allow a comparison with the current champion.

The preprocess stage runs it as a separate process, so that a comparison that the gate would refuse is refused before
the training.
"""

import argparse
import os
import tempfile
from pathlib import Path

import pandas as pd

from convoy.core import config
from convoy.core.artifact_names import (
    CHAMPION_NOTES,
    CROSS_SPLIT_DUPLICATES,
    DATASET_INFO,
    IMAGE_TABLE,
    RECORD,
    TRAINING_HASHES,
)
from convoy.core.errors import ConvoyError
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.inference import predictor
from convoy.promotion import champion
from convoy.promotion.evidence import TrainingScope, check_comparable
from convoy.registry import model_loader
from convoy.tracking.store import REQUEST_TIMEOUT, TrackingStore, open_store
from convoy.training.record import TrainingRecord
from pipeline.errors import exit_on_error
from pipeline.stage import project_root

# For requests to a server. One that is too slow for this check is queried again by the gate.
REQUEST_TIMEOUT_S, MAX_RETRIES = "5", "0"


def main() -> None:
    """Check whether the preprocessed images in FOLDER allow a comparison with the champion."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.check_champion", description=main.__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    root = Path.cwd()
    os.environ.setdefault(REQUEST_TIMEOUT, REQUEST_TIMEOUT_S)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", MAX_RETRIES)
    with exit_on_error("check_champion"):
        name = config.load(root / "params.yaml")["register"]["name"]
        if old := find_champion(project_root(root), name):
            check(folder, old)


def find_champion(project: Path, name: str) -> TrainingScope | None:
    """Return the champion of a registered model, or None if there is none or MLflow can't be reached.

    Args:
        project: The project folder.
        name: The name of the registered model.

    Raises:
        ConvoyError: If the model had a champion that is missing or was modified.
    """
    # Opening the store would create mlflow.db, which this check must not do.
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (project / "mlflow.db").exists():
        champion.check_champion_note(project / CHAMPION_NOTES, name)
        return None
    refusal: ConvoyError | None = None
    try:
        with open_store(project, name) as store:
            try:
                return describe_champion(store, name)
            except model_loader.DownloadError as error:
                # With a server this may be a temporary outage.
                refusal = None if os.environ.get("MLFLOW_TRACKING_URI") else error
            except ConvoyError as error:
                refusal = error
    except ConvoyError:
        return None
    if refusal:
        raise refusal
    return None


def describe_champion(store: TrackingStore, name: str) -> TrainingScope | None:
    """Verify the files of the champion and return what the gate needs to know of it, or None if there is none."""
    version = champion.current_version(store, name)
    if version is None:
        return None
    model = model_loader.find(store, f"models:/{name}/{version}")
    with tempfile.TemporaryDirectory(dir=store.scratch) as scratch:
        model_loader.fetch(model, Path(scratch), [f"artifacts/{file}" for file in predictor.PREDICTOR_FILES])
        record = TrainingRecord.load(Path(scratch, "artifacts", RECORD))
    title = f"the champion {record.architecture} (version {version})"
    return TrainingScope(title, record.dataset_info.classes, model_loader.all_training_hashes(store, model))


def check(folder: Path, old: TrainingScope) -> None:
    """Check that a model trained on the preprocessed images could be compared with the champion.

    Args:
        folder: A folder with the outputs of preprocessing.
        old: The champion.

    Raises:
        ConvoyError: If the models could not be compared.
    """
    images = pd.read_parquet(folder / IMAGE_TABLE, columns=["path", "sha256", "label", "split"])
    images = images[images["split"] == "test"]
    training_hashes = (folder / TRAINING_HASHES).read_text().split()
    new = TrainingScope("a model of these images", DatasetInfo.load(folder / DATASET_INFO).classes, training_hashes)
    paths = dict(zip(images["sha256"], images["path"], strict=True))
    hashes, actual = (images[column].to_numpy(object) for column in ("sha256", "label"))
    check_comparable(hashes, actual, [new, old], pd.read_parquet(folder / CROSS_SPLIT_DUPLICATES), paths)


if __name__ == "__main__":
    main()
