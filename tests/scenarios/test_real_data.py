"""The whole pipeline on MNIST and CIFAR-10, in the folder that CONVOY_REAL_DATA names.

MNIST's four files lie in mnist/; cifar10-jpeg.zip holds train/<class>/<number>.jpg and test/<class>/<number>.jpg.
"""

import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from small_project import make_project, run_stages

REAL_DATA = os.environ.get("CONVOY_REAL_DATA")


needs_real_data = pytest.mark.skipif(not REAL_DATA, reason="CONVOY_REAL_DATA names no folder with real data sets")


@needs_real_data
def test_cifar10_is_trained_from_its_zip_archive(tmp_path: Path) -> None:
    root = make_project(tmp_path / "project", [])
    shutil.rmtree(root / "data")
    shutil.copy(Path(str(REAL_DATA), "cifar10-jpeg.zip"), root / "data")  # as DVC puts there what data.dvc names
    run_stages(root, until="preprocess")

    profile = json.loads((root / "artifacts/preprocess/data.json").read_text())["profile"]
    assert profile["classes"] == 10
    assert profile["test"] == 10_000
    assert profile["train"] + profile["val"] + profile["excluded"] == 50_000
    assert 0 < profile["excluded"] < 50  # near duplicates of test images, which the set is known for
    assert np.load(root / "artifacts/preprocess/test_pixels.npy", mmap_mode="r").shape == (10_000, 32, 32, 3)
    assert len((root / "artifacts/fetch/quarantine.csv").read_text().splitlines()) == 1  # its header


@pytest.mark.slow
@needs_real_data
def test_lenet_learns_mnist_in_one_epoch(tmp_path: Path) -> None:
    overrides = [
        "dataset=mnist",
        "model=[lenet]",
        "train.max_epochs=1",
        "trainer.threads=1",
        "register.gate.min_accuracy=0.9",
    ]
    root = make_project(tmp_path / "project", overrides)
    raw = root / "downloads" / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in sorted(Path(str(REAL_DATA), "mnist").glob("*.gz")):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))

    run_stages(root, until="evaluate")

    sizes = {
        split: len(np.load(root / f"artifacts/preprocess/{split}_labels.npy")) for split in ("train", "val", "test")
    }
    assert sizes["test"] == 10_000
    assert 59_000 < sizes["train"] + sizes["val"] < 60_000  # the others nearly equal an image that judges
    assert sizes["val"] == pytest.approx(12_000, rel=0.05)
    figures = json.loads((root / "artifacts/evaluate/lenet/metrics.json").read_text())
    assert figures["test_accuracy"] > 0.95
