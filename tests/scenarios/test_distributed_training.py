"""Distributed training: several processes train on the same batches as one and write one record."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

import servers
from convoy import models
from convoy.data.packed.arrays import Images
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.models.base import predict
from small_project import ROOT, make_project, run_stages

# no random changes to images, which each process draws for its own part of a batch
STILL = [
    "model=[lenet]",
    "train.max_epochs=3",
    "model.lenet.recipe.batch_size=10",
    "model.lenet.recipe.augment.max_shift=0",
]
DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]


def make_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def train_lenet(root: Path) -> subprocess.CompletedProcess:
    return train(root, "lenet")


def train(root: Path, name: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.train", name],
        cwd=root,
        env=make_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("balance", ["weighted_loss", "sampler"])
def test_two_processes_match_one_and_write_one_record(balance: str, tmp_path: Path) -> None:
    overrides = [*STILL, f"model.lenet.recipe.class_balance={balance}", "trainer.threads=1"]
    alone = make_project(tmp_path / "alone", [*overrides, "trainer.precision=32-true"])
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
    info = DatasetInfo.load(together / "artifacts/preprocess/task.json")
    classifier = models.restore("lenet", record["settings"], info, found / "weights.safetensors")
    val = Images.load(together / "artifacts/preprocess", "val")
    accuracy = (predict(classifier, val.pixels, 64).argmax(axis=1) == val.labels).mean()
    assert accuracy == pytest.approx(record["best"]["val_accuracy"])

    # nothing is left of the second process, and the same again gives the same bits
    assert sorted(file.name for file in (together / "artifacts/.scratch").iterdir() if file.is_dir()) == []
    first = {file.name: file.read_bytes() for file in found.iterdir()}
    assert train_lenet(together).returncode == 0
    assert {file.name: file.read_bytes() for file in found.iterdir()} == first


@pytest.mark.slow
@pytest.mark.parametrize("all_of_them", [False, True], ids=["the first is told", "all are told"])
def test_sigterm_ends_all_processes_with_all_steps_saved(all_of_them: bool, tmp_path: Path) -> None:
    root = make_project(tmp_path / "project", [*STILL, *DDP, "trainer.threads=1", "train.max_epochs=2000"])
    run_stages(root, until="preprocess")
    for seconds in (0.3, 1.1):
        with (root / "said.txt").open("w") as said:
            running = subprocess.Popen(
                [sys.executable, "-u", "-m", "pipeline.train", "lenet"],
                cwd=root,
                env=make_environment(),
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        while "val_loss" not in (root / "said.txt").read_text():
            assert running.poll() is None, (root / "said.txt").read_text()
            time.sleep(0.05)
        time.sleep(seconds)
        others = psutil.Process(running.pid).children(recursive=True)
        told = time.time()
        if all_of_them:
            os.killpg(running.pid, signal.SIGTERM)
        else:
            running.terminate()
        assert running.wait(10) == 143, (root / "said.txt").read_text()
        psutil.wait_procs(others, timeout=10)
        assert not [process for process in others if process.is_running()]
        (saved,) = (root / "artifacts/.cache/checkpoints").rglob("last.ckpt")
        assert saved.stat().st_mtime > told - 0.1  # the clock of files is a little late


@pytest.mark.slow
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_validation_uses_the_synchronized_batch_norm_statistics(ema: float, tmp_path: Path) -> None:
    small = ["model=[resnet]", "train.max_epochs=2", f"model.resnet.recipe.ema_decay={ema}", *DDP, "trainer.threads=1"]
    root = make_project(tmp_path / "project", small)
    run_stages(root, until="preprocess")
    done = train(root, "resnet")
    assert done.returncode == 0, done.stderr
    found = root / "artifacts/train/resnet"
    record = json.loads((found / "record.json").read_text())
    info = DatasetInfo.load(root / "artifacts/preprocess/task.json")
    classifier = models.restore("resnet", record["settings"], info, found / "weights.safetensors")
    val = Images.load(root / "artifacts/preprocess", "val")
    probabilities = predict(classifier, val.pixels, 64)
    loss = -np.log(probabilities[np.arange(len(val)), val.labels]).mean()
    assert loss == pytest.approx(record["best"]["val_loss"], rel=1e-5)


def train_by_torchrun(roots: Sequence[Path]) -> list[subprocess.Popen]:
    """The train stage on as many machines, which here are folders."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(roots)}", "--nproc-per-node=1"]
    command += ["--master-addr=127.0.0.1", f"--master-port={servers.find_free_port()}"]
    return [
        subprocess.Popen(
            [*command, f"--node-rank={rank}", "-m", "pipeline.train", "lenet"],
            cwd=root,
            env=make_environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, root in enumerate(roots)
    ]


@pytest.mark.slow
def test_two_machines_train_by_torchrun_and_the_first_writes(tmp_path: Path) -> None:
    nodes = [*STILL, "trainer.accelerator=cpu", "trainer.num_nodes=2", "trainer.threads=1", "trainer.precision=32-true"]
    together = make_project(tmp_path / "together", [*STILL, *DDP, "trainer.threads=1"])
    first = make_project(tmp_path / "first", [*nodes, "train.checkpoint_minutes=0.0005"])
    run_stages(together, until="preprocess")
    run_stages(first, until="preprocess")
    second = shutil.copytree(first, tmp_path / "second")
    assert train_lenet(together).returncode == 0
    expected = pd.read_csv(together / "artifacts/train/lenet/history.csv")

    # both machines go down, and only the first has kept a checkpoint
    processes = train_by_torchrun([first, second])
    while not list((first / "artifacts/.cache/checkpoints").rglob("last.ckpt")):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    for process in processes:
        for worker in psutil.Process(process.pid).children(recursive=True):
            worker.kill()
        process.kill()
        process.communicate()
    said = [process.communicate()[1] for process in train_by_torchrun([first, second])]
    assert any("convoy: train: the machines begin at different steps, 0 and " in words for words in said), said
    shutil.rmtree(first / "artifacts/.cache/checkpoints")

    done = [(process.communicate()[1], process.returncode) for process in train_by_torchrun([first, second])]
    assert [code for _, code in done] == [0, 0], done
    history = pd.read_csv(first / "artifacts/train/lenet/history.csv")
    np.testing.assert_allclose(history.to_numpy(), expected.to_numpy(), rtol=1e-3)
    assert not (second / "artifacts/train").exists()


@pytest.mark.slow
def test_two_processes_train_with_the_variables_of_slurm(tmp_path: Path) -> None:
    nodes = ["trainer.accelerator=cpu", "trainer.num_nodes=2", "trainer.threads=1", "trainer.precision=32-true"]
    root = make_project(tmp_path / "project", [*STILL, *nodes])
    run_stages(root, until="preprocess")
    job = {"SLURM_JOB_ID": "31", "SLURM_JOB_NAME": "convoy", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"SLURM_NNODES": "2", "SLURM_LOCALID": "0", "SLURM_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1"}
    job |= {"MASTER_PORT": str(servers.find_free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pipeline.train", "lenet"],
            cwd=root,
            env=make_environment() | job | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    done = [(process.communicate(timeout=300)[1], process.returncode) for process in processes]
    assert [code for _, code in done] == [0, 0], done
    record = json.loads((root / "artifacts/train/lenet/record.json").read_text())
    assert record["environment"]["processes"] == 2
    assert len(pd.read_csv(root / "artifacts/train/lenet/history.csv")) == 3


def test_too_many_requested_gpus_is_one_clear_line(tmp_path: Path) -> None:
    root = make_project(tmp_path / "project", [*STILL, "trainer=ddp", "trainer.accelerator=gpu", "trainer.devices=64"])
    run_stages(root, until="preprocess")
    done = train_lenet(root)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("convoy: train: trainer.")
    assert "Traceback" not in done.stderr
