"""Reproducibility: two fresh copies of a project train to identical bytes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from small_project import ROOT, make_project, run_stages

BUSY = "while True: sum(number * number for number in range(10_000))"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["googlenet"])  # dropout, batch norm and heads of its own
def test_two_copies_train_bit_identically_on_a_busy_machine(architecture: str, tmp_path: Path) -> None:
    first = make_project(tmp_path / "one" / "project", [f"model=[{architecture}]", "train.max_epochs=2"])
    run_stages(first, until="preprocess")
    second = tmp_path / "another place" / "project"
    shutil.copytree(first, second)

    results = []
    for root, others in ((first, 0), (second, 3)):
        busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(others)]
        try:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(root)}
            environment.pop("OMP_NUM_THREADS", None)  # as a person has it
            command = [sys.executable, "-m", "pipeline.train", architecture]
            subprocess.run(command, cwd=root, env=environment, check=True)
        finally:
            for process in busy:
                process.kill()
                process.wait()
        folder = root / "artifacts/train" / architecture
        results.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert "weights.safetensors" in results[0]
    assert results[0] == results[1]
