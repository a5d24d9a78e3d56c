"""Networks of torchvision from a settings file to a registered champion, at a size of their own."""

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from convoy import models
from convoy.core import config
from convoy.tracking.store import open_store
from model_settings import NETWORKS, SHRUNK
from small_project import make_project, run_stages

BUILT = [name for name in NETWORKS if name not in models.names()]


def list_overrides(name: str, epochs: int, **more: Any) -> list[str]:
    changes = SHRUNK.get(name, {})
    arguments = {f"+arguments.{key}": value for key, value in changes.get("arguments", {}).items()}
    others = {key: value for key, value in changes.items() if key != "arguments"}
    settings = (
        {"size": 48, "recipe.batch_size": 8, "recipe.optimizer": "adamw", "recipe.lr": 0.003}
        | others
        | more
        | arguments
    )
    prefix = {key: "+model" if key.startswith("+") else "model" for key in settings}
    named = [f"{prefix[key]}.{name}.{key.removeprefix('+')}={value}" for key, value in settings.items()]
    return [f"model=[{name}]", f"train.max_epochs={epochs}", "trainer.threads=1", *named]


# Enough to predict better than one class alone.
EPOCHS = {"convnext_tiny": 15, "efficientnet_v2_s": 8, "mobilenet_v3_small": 2, "vit_b_16": 15}
GATE = ["register.gate.min_accuracy=0.0", "register.gate.min_test_images=1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_network_becomes_champion_and_starts_the_next(name: str, tmp_path: Path, embedded_store: None) -> None:
    root = make_project(tmp_path / "project", [*list_overrides(name, epochs=EPOCHS[name]), *GATE])
    run_stages(root)
    record = json.loads((root / f"artifacts/train/{name}/record.json").read_text())
    assert (record["dataset_info"]["size"], record["dataset_info"]["channels"]) == (48, 1)
    assert json.loads((root / "artifacts/preprocess/task.json").read_text())["size"] == 32
    with open_store(root, "convoy") as store:
        aliases = store.client.get_registered_model("convoy").aliases
        folder = Path(mlflow.artifacts.download_artifacts("models:/convoy/1", dst_path=str(tmp_path / "model")))
        model = mlflow.pyfunc.load_model("models:/convoy/1")
    # The batch norms of MobileNet take longer than this to follow the images, so that the gate refuses it.
    assert aliases.get("champion") == (None if name == "mobilenet_v3_small" else 1)
    # The ONNX file is registered only if it predicts as evaluated.
    assert (folder / "artifacts/model.onnx").is_file()
    assert f"{record['settings']['builder'].partition('/')[0]}==" in (folder / "requirements.txt").read_text()
    recorded = pd.read_parquet(root / f"artifacts/evaluate/{name}/predictions.parquet")
    images = pd.read_parquet(root / "artifacts/preprocess/images.parquet").query("split == 'test'")
    answer = model.predict([np.asarray(Image.open(root / path)) for path in images["path"]])
    probabilities = np.array([list(row.values()) for row in answer["probabilities"]])
    np.testing.assert_allclose(probabilities, recorded.filter(regex="^probability_").to_numpy(), atol=1e-5)

    config.compose(root, [*list_overrides(name, epochs=1, init="champion"), *GATE])
    run_stages(root, since="train", until="train")
    again = json.loads((root / f"artifacts/train/{name}/record.json").read_text())["initial_weights"]
    assert (again["init"], again["head"], again["verified"]) == ("champion", "kept", True)


def test_change_of_one_network_changes_no_other(tmp_path: Path) -> None:
    root = make_project(tmp_path / "project", ["model=[lenet,mobilenet_v3_small,convnext_tiny]"])
    text = (root / "dvc.yaml").read_text()
    assert "src/convoy/models/${item.module}.py" in text
    from dvc.repo import Repo

    Repo.init(str(root), no_scm=True).close()
    with Repo(str(root)) as repo:
        names = [f"train@{name}" for name in ("lenet", "mobilenet_v3_small", "convnext_tiny")]
        deps = {
            name: {dep.def_path for dep in repo.stage.load_one(str(root / "dvc.yaml"), name).deps} for name in names
        }
    assert "src/convoy/models/lenet.py" in deps["train@lenet"]
    assert "artifacts/resize/32" in deps["train@lenet"]
    for name in ("mobilenet_v3_small", "convnext_tiny"):
        assert {"src/convoy/models/builders.py", "artifacts/resize/224"} <= deps[f"train@{name}"]
    assert not {dep for dep in deps["train@lenet"] if "builders" in dep}
