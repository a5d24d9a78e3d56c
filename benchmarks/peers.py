"""From JPEG files to a test accuracy, beside timm, Ultralytics, fastai and others: `python benchmarks/peers.py`.

CONVOY_REAL_DATA names the folder with cifar10-jpeg.zip, of which 10,000 files are taken (7,000 for training, 1,000 for
validation, 2,000 for testing). Each way trains the small VGG for two epochs and predicts the test images, as a process
of its own with everything that it imports; all take turns. convoy runs its stages by DVC, from fetch to evaluate, as
`convoy run` does, whose fork server it starts, and does all that they do beside. Processor time is that of the whole
machine, as that of forked stages belongs to no process that can be asked: run nothing else meanwhile. The peers are in
benchmarks/peer.py and run in .peers, an environment of their own that this program makes with uv; Ultralytics is under
the AGPL and is nowhere else.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pandas as pd
import psutil
import torch
import torchvision

from convoy.training.hardware import has_bfloat16

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".peers"
UV = str(Path(sys.executable).with_name("uv"))
PACKAGES = ("fastai", "pytorch-lightning", "simplejpeg", "timm", "torchmetrics", "ultralytics")
# Without its instructions bfloat16 takes longer than float32.
BFLOAT16 = ["bfloat16"] if has_bfloat16() else []
TIMM = ("timm", *(f"timm, {precision}" for precision in BFLOAT16))
WAYS = ("hand-written loop", *TIMM, "fastai", "Ultralytics", "Lightning template")
OURS = "convoy"
STAGES = """
import subprocess, sys
from pipeline import fork_server
with fork_server.started():
    command = [sys.executable, "-m", "dvc", "repro", "--no-run-cache", "evaluate@vgg"]
    sys.exit(subprocess.run(command).returncode)
"""
SPLITS = {"train": 700, "val": 100, "test": 200}  # images of each class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the images, to try this program")
    options = parser.parse_args()
    make_environment()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder, project = Path(name, "images"), Path(name, "project")
        unpack(Path(os.environ["CONVOY_REAL_DATA"]) / "cifar10-jpeg.zip", folder, options.fraction)
        make_project(project, folder)
        for number in range(options.rounds):
            for way in (*WAYS, OURS):
                rows.append({"way": way, "round": number, **run(way, folder, project)})
                print(rows[-1], file=sys.stderr, flush=True)
    show(pd.DataFrame(rows))


def make_environment() -> None:
    """Install the peers beside the versions of torch and torchvision that convoy has."""
    if (ENVIRONMENT / "ready").exists():
        return
    same = [f"{module.__name__}=={module.__version__.partition('+')[0]}" for module in (torch, torchvision)]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    subprocess.run([UV, "venv", "--quiet", "--clear", "--python", version, str(ENVIRONMENT)], check=True)
    install = [UV, "pip", "install", "--quiet", "--compile-bytecode", "--python", str(ENVIRONMENT)]
    subprocess.run([*install, *same, *PACKAGES], check=True)
    (ENVIRONMENT / "ready").touch()


def unpack(archive: Path, folder: Path, fraction: float) -> None:
    with zipfile.ZipFile(archive) as packed:
        names = sorted(name for name in packed.namelist() if name.startswith("train/") and name.endswith(".jpg"))
        classes: dict[str, list[str]] = {}
        for name in names:
            classes.setdefault(Path(name).parent.name, []).append(name)
        for label, files in classes.items():
            rest = iter(files)
            for split, count in SPLITS.items():
                (folder / split / label).mkdir(parents=True)
                for _, name in zip(range(round(count * fraction)), rest, strict=False):
                    (folder / split / label / Path(name).name).write_bytes(packed.read(name))


def make_project(project: Path, folder: Path) -> None:
    """A project of convoy's own with these images in a zip, two epochs of the small VGG, and one thread."""
    project.mkdir()
    for part in ("pipeline", "src", "conf"):
        shutil.copytree(ROOT / part, project / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", project)
    (project / "data").mkdir()
    shutil.make_archive(str(project / "data" / "images"), "zip", folder)
    (project / "data.lock").write_text("{}\n")
    run_quietly([sys.executable, "-m", "dvc", "init", "--quiet", "--no-scm"], project)
    overrides = ["dataset.name=peers", "model=[vgg]", "train.max_epochs=2", "trainer.threads=1", "trainer=cpu"]
    code = f"import pathlib; from convoy.core import config; config.compose(pathlib.Path.cwd(), {overrides})"
    run_quietly([sys.executable, "-c", code], project)


def run(way: str, folder: Path, project: Path) -> dict[str, float]:
    """Run a way once, and return its accuracy and its seconds, of wall time and of processors."""
    environment = {"YOLO_OFFLINE": "true", "YOLO_CONFIG_DIR": str(folder.parent)}
    if way == OURS:
        for name in ("artifacts", "dvc.lock", ".dvc/cache"):
            shutil.rmtree(project / name, ignore_errors=True)
        (project / "dvc.lock").unlink(missing_ok=True)
        command = [sys.executable, "-c", STAGES]
    else:
        program = str(Path(__file__).with_name("peer.py"))
        command = [str(ENVIRONMENT / "bin" / "python"), program, way, str(folder), *BFLOAT16]
    began, before = time.perf_counter(), processor_seconds()
    printed = run_quietly(command, project, environment)
    seconds = {"wall": time.perf_counter() - began, "cpu": processor_seconds() - before}
    if way == OURS:
        metrics = json.loads((project / "artifacts/evaluate/vgg/metrics.json").read_text())
        return {"accuracy": metrics["test_accuracy"], **seconds}
    return json.loads(printed.splitlines()[-1]) | seconds


def processor_seconds() -> float:
    """The time that all processors have worked since the machine was started."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def run_quietly(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    variables = os.environ | {"PYTHONPATH": "", "CONVOY_LIVE": "0"} | (environment or {})
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def show(measured: pd.DataFrame) -> None:
    """Medians, and in brackets the lowest and the highest; the ratio compares runs of the same round."""
    ours = measured[measured["way"] == OURS].set_index("round")
    columns = {"wall": "seconds", "cpu": "of processors", "epoch_cpu": "an epoch", "predict_cpu": "prediction"}
    print(f"| | {' | '.join(columns.values())} | convoy: seconds | convoy: processor | accuracy |\n|{'---|' * 8}")
    for way in (*WAYS, OURS):
        mine = measured[measured["way"] == way].set_index("round")
        cells = [spread(mine[column]) for column in columns]
        cells += [spread(mine[column] / ours[column], "x") for column in ("wall", "cpu")]
        print(f"| {way} | {' | '.join(cells)} | {mine['accuracy'].median():.2f} |")


def spread(values: pd.Series, unit: str = "") -> str:
    if values.isna().any():
        return ""
    digits = 2 if unit else 1
    return f"{values.median():.{digits}f}{unit} ({values.min():.{digits}f} to {values.max():.{digits}f})"


if __name__ == "__main__":
    main()
