"""A project for tests whose retraining ends in a poor, a good or a similar model, all trained once."""

import shutil
from pathlib import Path

import numpy as np

from convoy.core import config
from convoy.inference import predictor
from small_project import draw_images, make_project, run_stages

BASE = ["model=[lenet]", "trainer.threads=1", "trainer.precision=32-true", "register.gate.min_accuracy=0.0"]
BASE += ["register.gate.min_test_images=50", "register.gate.min_images_per_class=20"]
TRAINING_OVERRIDES = {
    "good": ["train.max_epochs=4"],
    "similar": ["train.max_epochs=4", "model.lenet.recipe.weight_decay=0.0004"],
    "poor": ["train.max_epochs=1", "model.lenet.recipe.lr=0.0001"],
}


def make_retraining_project(root: Path) -> Path:
    """A project in `root` that keeps these trainings and their evaluations, with nothing registered."""
    make_project(root, [*BASE, *TRAINING_OVERRIDES["good"]])
    shutil.rmtree(root / "data")
    draw_images(root / "data", each=120)
    run_stages(root, until="preprocess")
    for name, overrides in TRAINING_OVERRIDES.items():
        config.compose(root, [*BASE, *overrides])
        run_stages(root, until="evaluate", since="train")
        for stage in ("train", "evaluate"):
            (root / "kept" / name).mkdir(parents=True, exist_ok=True)
            shutil.copytree(root / "artifacts" / stage, root / "kept" / name / stage)
    return root


def restore_training(root: Path, training: str, *overrides: str) -> Path:
    """Let the project be as after a retraining that ended in this training; it is not registered yet."""
    for stage in ("train", "evaluate"):
        shutil.rmtree(root / "artifacts" / stage, ignore_errors=True)
        shutil.copytree(root / "kept" / training / stage, root / "artifacts" / stage)
    config.compose(root, [*BASE, *TRAINING_OVERRIDES[training], *overrides])
    return root


def predict_in_this_process(_: str, model: Path, pixels: np.ndarray, __: Path) -> np.ndarray:
    """In place of `served._answers`: a model answers here and not in a fresh process, which takes ten seconds."""
    return predictor.restore(model / "artifacts").probabilities(pixels)
