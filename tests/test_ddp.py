"""Training by several processes: the same batches in the same order, right figures, and one record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from project import REAL, make_project, run_stages

from convoy import models
from convoy.batches import Images
from convoy.classifier import predict
from convoy.task import Task

# no random changes to images, which each process draws for its own part of a batch
STILL = [
    "model=[lenet]",
    "train.max_epochs=3",
    "model.lenet.recipe.batch_size=10",
    "model.lenet.recipe.augment.shift=0",
]
DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=float32"]


def train_lenet(root: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.train", "lenet"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(REAL), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("balance", ["loss", "sampler"])
def test_two_processes_train_what_one_trains_and_leave_one_record(balance: str, tmp_path: Path) -> None:
    overrides = [*STILL, f"model.lenet.recipe.balance={balance}", "trainer.threads=1"]
    alone = make_project(tmp_path / "alone", [*overrides, "trainer.precision=float32"])
    together = make_project(tmp_path / "together", [*overrides, *DDP])
    for root in (alone, together):
        run_stages(root, until="preprocess")
    run_stages(alone, until="train")

    done = train_lenet(together)
    assert done.returncode == 0, done.stderr

    found, expected = together / "artifacts/train/lenet", alone / "artifacts/train/lenet"
    record = json.loads((found / "record.json").read_text())
    assert record["trainer"]["devices"] == 2
    assert record["environment"]["processes"] == 2
    # sums are taken in another order, so the last digits differ
    histories = [pd.read_csv(folder / "history.csv") for folder in (found, expected)]
    np.testing.assert_allclose(*(history.to_numpy() for history in histories), rtol=1e-3)
    assert done.stdout.count("epoch 3/3") == 1  # one process tells

    # the validation figures are those of all images
    task = Task.load(together / "artifacts/preprocess/task.json")
    classifier = models.restore("lenet", record["settings"], task, found / "weights.safetensors")
    val = Images.load(together / "artifacts/preprocess", "val")
    accuracy = (predict(classifier, val.pixels, 64).argmax(axis=1) == val.labels).mean()
    assert accuracy == pytest.approx(record["best"]["val_accuracy"])

    # nothing is left of the second process, and the same again gives the same bits
    assert sorted(file.name for file in (together / "artifacts/.scratch").iterdir() if file.is_dir()) == []
    first = {file.name: file.read_bytes() for file in found.iterdir()}
    assert train_lenet(together).returncode == 0
    assert {file.name: file.read_bytes() for file in found.iterdir()} == first


def test_more_gpus_than_there_are_is_one_clear_line(tmp_path: Path) -> None:
    root = make_project(tmp_path / "project", [*STILL, "trainer=ddp", "trainer.accelerator=gpu", "trainer.devices=64"])
    run_stages(root, until="preprocess")
    done = train_lenet(root)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("convoy: train: trainer.")
    assert "Traceback" not in done.stderr
