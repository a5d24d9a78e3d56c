"""What each stage costs before it does anything: `python benchmarks/startup.py`.

Every figure is of a process of its own that imports what the stage imports and ends; of training and evaluating also
one that goes on to the first step, with all that is loaded only then. With bytecode is as `make` installs it; without
is what a package manager that compiles nothing leaves, where PYTHONDONTWRITEBYTECODE is set. All take turns.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]
ROUNDS = {"with": 3, "without": 2}
TINY = """
import os, numpy as np, yaml
from convoy.data.packed.arrays import Images
from convoy.data.packed.dataset_info import DatasetInfo
info = DatasetInfo("tiny", ["a", "b"], 32, 1, [0.5], [0.5])
images = Images(np.zeros((64, 32, 32, 1), np.uint8), np.arange(64) % 2)
settings = yaml.safe_load(open("params.yaml"))["model"]["lenet"]
"""
PROCESSES = {
    "pandas": "import pandas",
    "sklearn": "import sklearn.metrics",
    "torch": "import torch",
    "torchvision": "import torchvision",
    "pytorch_lightning": "import pytorch_lightning",
    "mlflow": "import mlflow",
    "dvc": "import dvc.cli",
    "pipeline, until it runs DVC": """
import shutil, tempfile
from pathlib import Path
from convoy.core import config
from pipeline.check_settings import check_settings
with tempfile.TemporaryDirectory() as name:
    shutil.copytree("conf", Path(name, "conf"))
    config.compose(Path(name), check=check_settings)
""",
    "fetch": "import pipeline.fetch",
    "preprocess": "import pipeline.preprocess",
    "train": "import pipeline.train, convoy.models.lenet",
    "train, to the first step": TINY
    + """
from pipeline.train import *
class Ending(ImageDataModule):
    def transfer_batch_to_device(self, *_):
        os._exit(0)
classifier = models.build("lenet", settings, info)
trainer = config.validate(TrainerConfig, config.load(Path("params.yaml"))["trainer"], "trainer")
params = TrainConfig(seed=0, max_epochs=1, patience=0, checkpoint_minutes=5.0)
hardware = resolve_trainer(trainer, classifier)
describe_environment(hardware)
fit(classifier, Ending(images, images, classifier.recipe, 0), params, hardware)
""",
    "evaluate": "import pipeline.evaluate, convoy.models.lenet",
    "evaluate, to the first batch": TINY
    + """
from pipeline.evaluate import *
predict(models.build("lenet", settings, info), images.pixels, 64)
""",
    "register": "import pipeline.register",
}


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        # bytecode of its own, so that neither the environment nor this folder is changed
        bytecode = {"PYTHONPYCACHEPREFIX": f"{name}/bytecode", "PYTHONDONTWRITEBYTECODE": ""}
        none = {"PYTHONPYCACHEPREFIX": f"{name}/none", "PYTHONDONTWRITEBYTECODE": "1"}
        for code in PROCESSES.values():
            run(code, bytecode)
        for kind, changes in (("with", bytecode), ("without", none)):
            for _ in range(ROUNDS[kind]):
                rows += [(process, kind, *run(code, changes)) for process, code in PROCESSES.items()]
    show(pd.DataFrame(rows, columns=["process", "bytecode", "wall", "cpu"]))


def run(code: str, changes: dict[str, str]) -> tuple[float, float]:
    """Seconds that passed, and seconds of processors."""
    began, before = time.perf_counter(), os.times()
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"} | changes
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{code}\n{done.stderr}")
    after = os.times()
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return time.perf_counter() - began, used


def show(measured: pd.DataFrame) -> None:
    """Medians, and in brackets the lowest and the highest."""
    print("| seconds | wall | of processors | wall, no bytecode | of processors |\n|---|---|---|---|---|")
    for process in PROCESSES:
        mine = measured[measured["process"] == process]
        cells = [spread(mine[mine["bytecode"] == kind][column]) for kind in ROUNDS for column in ("wall", "cpu")]
        print(f"| {process} | {' | '.join(cells)} |")


def spread(values: pd.Series) -> str:
    return f"{values.median():.2f} ({values.min():.2f} to {values.max():.2f})"


if __name__ == "__main__":
    main()
