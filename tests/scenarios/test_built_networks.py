"""Networks of torchvision from a settings file to a registered champion, at a size of their own."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from convoy import models
from convoy.core import config
from convoy.serving.app import create_app
from convoy.serving.deployment import Deployment
from convoy.serving.service import Limits, Service
from convoy.tracking.store import open_store
from model_settings import NETWORKS, SHRUNK
from small_project import ROOT, make_project, run_stages

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


# Enough to predict better than one class alone. The batch norms of MobileNet follow the images more slowly than others.
EPOCHS = {"convnext_tiny": 15, "efficientnet_v2_s": 15, "mobilenet_v3_small": 60, "vit_b_16": 15}
GATE = ["register.gate.min_accuracy=0.0", "register.gate.min_test_images=1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT)
def test_network_becomes_champion_is_served_and_starts_the_next(
    name: str, tmp_path: Path, embedded_store: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    root = make_project(tmp_path / "project", [*list_overrides(name, epochs=EPOCHS[name]), *GATE])
    run_stages(root)
    record = json.loads((root / f"artifacts/train/{name}/record.json").read_text())
    assert (record["dataset_info"]["size"], record["dataset_info"]["channels"]) == (48, 1)
    assert json.loads((root / "artifacts/preprocess/task.json").read_text())["size"] == 32
    with open_store(root, "convoy") as store:
        aliases = store.client.get_registered_model("convoy").aliases
        folder = Path(mlflow.artifacts.download_artifacts("models:/convoy/1", dst_path=str(tmp_path / "model")))
        model = mlflow.pyfunc.load_model("models:/convoy/1")
    assert aliases.get("champion") == 1
    # The ONNX file is registered only if it predicts as evaluated.
    assert (folder / "artifacts/model.onnx").is_file()
    assert f"{record['settings']['builder'].partition('/')[0]}==" in (folder / "requirements.txt").read_text()

    recorded = pd.read_parquet(root / f"artifacts/evaluate/{name}/predictions.parquet").filter(regex="^probability_")
    files = [
        root / path
        for path in pd.read_parquet(root / "artifacts/preprocess/images.parquet").query("split == 'test'")["path"]
    ]
    loaded = model.predict([np.asarray(Image.open(file)) for file in files])["probabilities"]
    served = predict_by_http(root, files)
    for answers in (loaded, served):
        probabilities = np.array([[answer[label] for label in record["dataset_info"]["classes"]] for answer in answers])
        np.testing.assert_allclose(probabilities, recorded.to_numpy(), atol=1e-5)

    # The next training starts where the champion is, and the gate compares the two.
    config.compose(root, [*list_overrides(name, epochs=1, init="champion"), *GATE])
    run_stages(root, since="train")
    again = json.loads((root / f"artifacts/train/{name}/record.json").read_text())
    start = again["initial_weights"]
    assert (start["init"], start["head"], start["verified"]) == ("champion", "kept", True)
    assert "version 1" in (root / "artifacts/verdict.md").read_text()


@pytest.mark.slow
def test_documented_file_adds_a_network_that_becomes_champion(tmp_path: Path, embedded_store: None) -> None:
    root = make_project(tmp_path / "project")
    page = (ROOT / "docs/models.md").read_text()
    (text,) = re.findall(r"```yaml\n(defaults:\n  - /builder@regnet_y_400mf:.*?)```", page, re.DOTALL)
    (root / "conf/model/regnet_y_400mf.yaml").write_text(text)
    config.compose(root, [*list_overrides("regnet_y_400mf", epochs=15, size=64), *GATE])
    run_stages(root)
    with open_store(root, "convoy") as store:
        assert store.client.get_registered_model("convoy").aliases["champion"] == 1


def predict_by_http(root: Path, files: Sequence[Path]) -> list[dict[str, float]]:
    """Serve the champion, and return the probabilities that it answers for each file."""
    deployment = Deployment("models:/convoy@champion", root, threads=1, interval=60)
    deployment.start()
    with TestClient(create_app(Service(deployment, 1, Limits(1 << 20, 1)), None)) as client:
        answers = [
            client.post("/predict", content=file.read_bytes(), headers={"Content-Type": "image/png"}) for file in files
        ]
    return [answer.json()["predictions"][0]["probabilities"] for answer in answers]


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
