"""A tiny model for tests of serving: it takes an image for a cat, a dog or a fox by its red, green and blue."""

import io
import json
import sqlite3
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from convoy.core.hashing import sha256

CLASSES = ["cat", "dog", "fox"]
COLOURS = {"cat": (250, 10, 10), "dog": (10, 250, 10), "fox": (10, 10, 250)}
SIZE = 8


def write_onnx(file: Path, classes: list[str] = CLASSES, sharpness: float = 0.1) -> Path:
    """Write a model with the inputs, outputs and metadata of those that convoy exports."""
    constants = {
        "sharpness": np.array(sharpness, np.float32),
        "axes": np.array([1, 2], np.int64),
        "weights": np.eye(3, dtype=np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["pixels"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["numbers"], ["feature_maps"], perm=[0, 3, 1, 2]),
        helper.make_node("ReduceMean", ["numbers", "axes"], ["means"], keepdims=0),
        helper.make_node("Mul", ["means", "sharpness"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0),
        helper.make_node("Gather", ["weights", "best"], ["class_weights"], axis=0),
    ]
    outputs = {"probabilities": ["N", 3], "feature_maps": ["N", 3, SIZE, SIZE], "class_weights": ["N", 3]}
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    facts = {"architecture": "colours", "classes": json.dumps(classes), "size": str(SIZE), "channels": "3"}
    helper.set_model_props(model, {**facts, "longest_side": "256", "dataset": "pets", "feature_maps": "numbers"})
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, file)
    return file


def draw(label: str, kind: str = "PNG", size: tuple[int, int] = (20, 16)) -> bytes:
    """An image file that the model takes for `label`."""
    file = io.BytesIO()
    Image.new("RGB", size, COLOURS[label]).save(file, kind)
    return file.getvalue()


class FakeRegistry:
    """The tables of MLflow's database that serving reads, with models in folders beside it."""

    def __init__(self, project: Path) -> None:
        self.project = project
        self.file = project / "mlflow.db"
        with self.connect() as database:
            database.execute("CREATE TABLE registered_model_aliases (alias, version INTEGER, name)")
            database.execute("CREATE TABLE model_versions (name, version INTEGER, source, storage_location)")
            database.execute("CREATE TABLE model_version_tags (key, value, name, version INTEGER)")
        (project / "params.yaml").write_text("register:\n  name: pets\n")

    def connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.file)

    def add(self, version: int, *, verdict: str = "", is_broken: bool = False) -> Path:
        """Register a version, and return its file."""
        folder = self.project / "mlartifacts" / str(version)
        file = write_onnx(folder / "artifacts" / "model.onnx", sharpness=0.1 + version / 1000)
        if is_broken:
            file.write_bytes(file.read_bytes()[:-40])
        checksums = json.dumps({"artifacts/model.onnx": sha256(file)})
        with self.connect() as database:
            row = ("pets", version, f"models:/m-{version}", folder.as_uri())
            database.execute("INSERT INTO model_versions VALUES (?, ?, ?, ?)", row)
            for key, value in (("convoy.sha256", checksums), ("convoy.verdict", verdict)):
                database.execute("INSERT INTO model_version_tags VALUES (?, ?, ?, ?)", (key, value, "pets", version))
        return file

    def move_alias(self, version: int) -> None:
        """Let the champion's alias name a version."""
        with self.connect() as database:
            database.execute("DELETE FROM registered_model_aliases")
            database.execute("INSERT INTO registered_model_aliases VALUES ('champion', ?, 'pets')", (version,))


def make_registry(project: Path) -> FakeRegistry:
    """A registry whose champion is its only version."""
    registry = FakeRegistry(project)
    registry.add(1)
    registry.move_alias(1)
    return registry
