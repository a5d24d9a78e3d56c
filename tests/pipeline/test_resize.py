"""Images of several sizes: the same splits, prepared once for each size that a network has."""

import json
from pathlib import Path

import numpy as np
import pytest

from convoy.core import config
from convoy.core.artifact_names import MANIFEST
from convoy.data import resize as resize_module
from convoy.data.packed.arrays import Images
from convoy.data.packed.dataset_info import DatasetInfo
from pipeline.resize import resize
from pipeline.stage import Stage
from small_project import make_project, run_stages

OVERRIDES = ("model=[lenet,resnet,vgg]", "model.resnet.size=48", "model.vgg.size=48")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_project(tmp_path_factory.mktemp("sizes") / "project", OVERRIDES)
    run_stages(root, until="preprocess")
    Stage(root, "resize").run(resize)
    return root


def test_every_size_has_a_folder_and_one_is_empty(prepared: Path) -> None:
    folders = {path.name for path in (prepared / "artifacts/resize").iterdir() if path.is_dir()}
    assert folders == {"32", "48"}
    assert [path.name for path in (prepared / "artifacts/resize/32").iterdir()] == [MANIFEST]
    assert DatasetInfo.load(prepared / "artifacts/resize/48/task.json").size == 48


def test_images_of_another_size_are_the_same_images(prepared: Path) -> None:
    for split in ("train", "val", "test"):
        small = Images.load(prepared / "artifacts/preprocess", split)
        large = Images.load(prepared / "artifacts/resize/48", split)
        assert large.pixels.shape == (len(small), 48, 48, 1)
        assert np.array_equal(small.labels, large.labels)
        # Enlarged from 12 px, both look alike when they are reduced to blocks.
        reduced = [each.pixels[..., 0].reshape(len(small), 8, size, 8, size).mean((2, 4)) for each, size in
                   ((small, 4), (large, 6))]  # fmt: skip
        assert np.abs(reduced[0] - reduced[1]).mean() < 6


def test_stages_take_the_images_of_their_size(prepared: Path) -> None:
    sizes = {name: Stage(prepared, "train", name).images().name for name in ("lenet", "resnet", "vgg")}
    assert sizes == {"lenet": "preprocess", "resnet": "48", "vgg": "48"}
    assert "artifacts/resize/48" in Stage(prepared, "train", "resnet").deps
    assert "src/convoy/models/resnet.py" in Stage(prepared, "train", "resnet").deps


def test_unchanged_images_are_not_resized_again(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (prepared / "artifacts/resize/48" / MANIFEST).read_bytes()
    monkeypatch.setattr(resize_module, "center_crop_resize", lambda *_: pytest.fail("resized again"))
    params = config.compose(prepared, [*OVERRIDES, "model.lenet.recipe.lr=0.01"])
    assert params["model"]["lenet"]["recipe"]["lr"] == 0.01
    Stage(prepared, "resize").run(resize)
    assert (prepared / "artifacts/resize/48" / MANIFEST).read_bytes() == before
    assert json.loads(before).keys() >= {"task.json", "train_pixels.npy", "test_labels.npy"}
