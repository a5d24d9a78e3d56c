"""Real data: MNIST down the real road. The folder that CONVOY_REAL_DATA names holds its four files in mnist/."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from project import make_project, run_stages

REAL_DATA = os.environ.get("CONVOY_REAL_DATA")


@pytest.mark.skipif(not REAL_DATA, reason="CONVOY_REAL_DATA names no folder with real data sets")
def test_mnist_keeps_its_test_split_and_lenet_learns_it_in_one_epoch(tmp_path: Path) -> None:
    overrides = ["dataset=mnist", "model=[lenet]", "train.max_epochs=1", "train.threads=1", "register.floor=0.9"]
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
    assert sizes["train"] + sizes["val"] == 60_000
    assert sizes["val"] == pytest.approx(12_000, rel=0.05)
    figures = json.loads((root / "artifacts/evaluate/lenet/metrics.json").read_text())
    assert figures["accuracy"] > 0.95
