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


def list_overrides(name: str, **more: Any) -> list[str]:
    changes = SHRUNK.get(name, {})
    arguments = {f"+arguments.{key}": value for key, value in changes.get("arguments", {}).items()}
    others = {key: value for key, value in changes.items() if key != "arguments"}
    settings = {"size": 48, "recipe.batch_size": 16} | others | more | arguments
    prefix = {key: "+model" if key.startswith("+") else "model" for key in settings}
    named = [f"{prefix[key]}.{name}.{key.removeprefix('+')}={value}" for key, value in settings.items()]
    return [f"model=[{name}]", "train.max_epochs=1", "trainer.threads=1", *named]


GATE = ["register.gate.min_accuracy=0.0", "register.gate.min_test_images=1"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "mobilenet_v3_small" else pytest.mark.slow) for name in BUILT]
)
def test_network_becomes_champion_and_starts_the_next(name: str, tmp_path: Path, embedded_store: None) -> None:
    root = make_project(tmp_path / "project", [*list_overrides(name), *GATE])
    run_stages(root)
    record = json.loads((root / f"artifacts/train/{name}/record.json").read_text())
    assert (record["dataset_info"]["size"], record["dataset_info"]["channels"]) == (48, 1)
    assert json.loads((root / "artifacts/preprocess/task.json").read_text())["size"] == 32
    with open_store(root, "convoy") as store:
        version = store.client.get_model_version_by_alias("convoy", "champion")
        folder = Path(mlflow.artifacts.download_artifacts("models:/convoy@champion", dst_path=str(tmp_path / "model")))
        model = mlflow.pyfunc.load_model("models:/convoy@champion")
    assert int(version.version) == 1
    # The ONNX file is registered only if it predicts as evaluated.
    assert (folder / "artifacts/model.onnx").is_file()
    assert "torchvision==" in (folder / "requirements.txt").read_text()
    recorded = pd.read_parquet(root / f"artifacts/evaluate/{name}/predictions.parquet")
    images = pd.read_parquet(root / "artifacts/preprocess/images.parquet").query("split == 'test'")
    answer = model.predict([np.asarray(Image.open(root / path)) for path in images["path"]])
    probabilities = np.array([list(row.values()) for row in answer["probabilities"]])
    np.testing.assert_allclose(probabilities, recorded.filter(regex="^probability_").to_numpy(), atol=1e-5)

    config.compose(root, [*list_overrides(name, init="champion"), *GATE])
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
        deps = {
            stage.addressing: {dep.def_path for dep in stage.deps}
            for stage in repo.index.stages
            if stage.addressing.startswith("train@")
        }
    assert "src/convoy/models/lenet.py" in deps["train@lenet"]
    assert "artifacts/resize/32" in deps["train@lenet"]
    for name in ("mobilenet_v3_small", "convnext_tiny"):
        assert {"src/convoy/models/builders.py", "artifacts/resize/224"} <= deps[f"train@{name}"]
    assert not {dep for dep in deps["train@lenet"] if "builders" in dep}
