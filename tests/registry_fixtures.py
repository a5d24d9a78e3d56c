"""A registered model for tests: an untrained network in a store of its own."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from mlflow.entities.model_registry import ModelVersion
from safetensors.torch import save_file

import convoy
from convoy import models
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.registry import versions
from convoy.tracking.store import open_store
from model_settings import load_model_settings
from record_factory import make_record

LIBRARY = Path(convoy.__file__).parent
CLASSES = ["cat", "dog", "fox"]


def write_trained_files(folder: Path, channels: int = 1, more: Mapping[str, object] | None = None) -> dict[str, Path]:
    """What training and evaluation leave of a LeNet: record, weights and calibration."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = load_model_settings("lenet")
    info = {"dataset": "pets", "classes": CLASSES, "size": 32, "channels": channels}
    info |= {"mean": [0.5] * channels, "std": [0.25] * channels}
    torch.manual_seed(0)
    save_file(models.build("lenet", settings, DatasetInfo(**info)).state_dict(), folder / "weights.safetensors")
    record = make_record(settings=settings, dataset_info=DatasetInfo(**info)).model_dump(mode="json")
    (folder / "record.json").write_text(json.dumps(record | dict(more or {})))
    (folder / "calibration.json").write_text(json.dumps({"temperature": 1.5, "val_log_loss": 0.1}))
    named = {"record": "record.json", "weights": "weights.safetensors", "calibration": "calibration.json"}
    return {key: folder / name for key, name in named.items()}


def register_model(root: Path) -> ModelVersion:
    """A version in the embedded store of the project folder `root`, and the champion's alias on it."""
    files = write_trained_files(root / "left")
    root.joinpath("params.yaml").write_text("register:\n  name: convoy\ntrainer:\n  accelerator: auto\n")
    with open_store(root, "convoy") as store:
        run = store.client.create_run(store.experiment.experiment_id).info.run_id
        version = versions.register(
            store,
            name="convoy",
            run_id=run,
            identity="made here",
            model=LIBRARY / "inference/pyfunc_model.py",
            files=files,
            code=LIBRARY,
            step=1,
        )
        store.client.set_registered_model_alias("convoy", "champion", version.version)
    return version


def find_model_folder(root: Path) -> Path:
    """Where the files of the one registered model lie."""
    (found,) = root.glob("mlartifacts/convoy/models/*/artifacts")
    return found
