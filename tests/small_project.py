"""A small project for tests: the real settings and stages with few epochs, on generated images."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from convoy.core import config
from pipeline.evaluate import evaluate
from pipeline.fetch import fetch
from pipeline.preprocess import preprocess
from pipeline.register import register
from pipeline.report import report
from pipeline.resize import resize
from pipeline.stage import Stage
from pipeline.train import train
from repositories import init_git, run_dvc, run_git

ROOT = Path(__file__).parents[1]
SMALL = (
    "model=[lenet,resnet]",
    "train.max_epochs=3",
    "trainer.threads=1",
    "register.gate.min_accuracy=0.0",
    "register.gate.min_test_images=1",
)


def make_project(root: Path, overrides: Sequence[str] = SMALL) -> Path:
    """The project's own conf/ and dvc.yaml in `root`, composed with `overrides`, and 30 pictures of 3 classes."""
    root.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "conf", root / "conf")
    shutil.copy(ROOT / "dvc.yaml", root)
    settings = root / "conf" / "config.yaml"
    # tests name the experiment and the model themselves; by default the data set does
    settings.write_text(settings.read_text().replace("name: ${dataset.name}", "name: convoy"))
    config.compose(root, overrides)
    draw_images(root / "data", each=30)
    return root


def make_repository(root: Path, overrides: Sequence[str] = SMALL) -> Path:
    """A project with the code of this one, under git and DVC."""
    make_project(root, overrides)
    for name in ("pipeline", "src"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    init_git(root)
    run_git(root, "add", "conf")
    run_dvc(root, "init", "--quiet")
    run_dvc(root, "add", "--quiet", "data")
    return root


def draw_images(data: Path, each: int, seed: int = 0) -> None:
    """Grey pictures of 12x12 pixels in class folders: a bright bar that stands, lies or leans, in noise."""
    random = np.random.default_rng(seed)
    masks = {"lying": np.eye(12)[6][:, None] * np.ones(12), "leaning": np.eye(12)}
    masks["standing"] = masks["lying"].T
    for name, mask in masks.items():
        folder = data / name
        folder.mkdir(parents=True)
        for number in range(each):
            grey = random.integers(0, 90, (12, 12)) + np.roll(mask, random.integers(-2, 3), axis=(0, 1)) * 150
            Image.fromarray(grey.astype(np.uint8)).save(folder / f"{number:02}.png")


def run_stages(root: Path, *, since: str = "fetch", until: str = "register", with_report: bool = False) -> None:
    """Run the stages in this process, in their order; the report, which few tests look at, only when asked."""
    names = list(config.load(root / "params.yaml")["model"])
    steps = [("fetch", fetch, [""]), ("preprocess", preprocess, [""]), ("train", train, names)]
    steps.insert(2, ("resize", resize, [""]))
    steps += [("evaluate", evaluate, names)]
    steps += [("report", report, [""])] if with_report else []
    steps += [("register", register, [""])]
    stages = [stage for stage, _, _ in steps]
    for stage, work, items in steps[stages.index(since) : stages.index(until) + 1]:
        for item in items:
            Stage(root, stage, item).run(work)


def copy_without_mlflow(root: Path, target: Path) -> Path:
    """Copy a project with its results, but without its MLflow store."""
    return shutil.copytree(root, target, ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts"))
