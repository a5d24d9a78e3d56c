"""How far `convoy tune` gets from a bad learning rate, beside a random search: `python benchmarks/tuning.py`.

CONVOY_REAL_DATA names the folder with cifar10-jpeg.zip, of which the first 500 training images of each class are taken.
From a tenth and from ten times the default learning rate, both samplers search the space of conf/search/ with the same
number of trials, in two processes. Each result is the mean over three seeds that no trial has used, beside that of the
default settings, on the same validation images.
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
from typing import Any

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[1]
IMAGES_PER_CLASS = 500
FACTORS = (0.1, 10.0)
SAMPLERS = ("tpe", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="lenet")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=15.0, help="of each search, with its comparison")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS, help="of the default learning rate")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        project = Path(name, "project")
        make_project(project, options.model, options.epochs)
        default = convoy(project, "settings", "show", "--json")["model"][options.model]["recipe"]["lr"]
        rows = []
        for factor in options.factors:
            for sampler in SAMPLERS:
                rows.append(search(project, options, default * factor, sampler) | {"start": f"{factor:g} x default"})
                print(rows[-1], file=sys.stderr, flush=True)
        scores = train_default(project, options)
        rows.append({"start": "default", "sampler": "", "lr": default, "tuned": scores})
        print(rows[-1], file=sys.stderr, flush=True)
    show(pd.DataFrame(rows))


def make_project(project: Path, model: str, epochs: int) -> None:
    """A project of convoy's own with prepared images and one architecture."""
    project.mkdir()
    for part in ("pipeline", "src", "conf"):
        shutil.copytree(ROOT / part, project / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", project)
    (project / "data.lock").write_text("{}\n")
    with zipfile.ZipFile(Path(os.environ["CONVOY_REAL_DATA"]) / "cifar10-jpeg.zip") as packed:
        for name in packed.namelist():
            split, _, rest = name.partition("/")
            if split == "train" and int(Path(rest).stem) < IMAGES_PER_CLASS:
                file = project / "data" / rest
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(packed.read(name))
    settings = project / "conf" / "config.yaml"
    settings.write_text(settings.read_text().replace("[lenet, alexnet, vgg, googlenet, resnet]", f"[{model}]", 1))
    settings.write_text(settings.read_text().replace("max_epochs: 16", f"max_epochs: {epochs}", 1))
    for command in (["dvc", "init", "--quiet", "--no-scm"], ["pipeline.cli", "settings", "compose"]):
        run(project, command)
    run(project, ["dvc", "repro", "--quiet", "preprocess"])


def search(project: Path, options: argparse.Namespace, rate: float, sampler: str) -> dict[str, Any]:
    began = time.perf_counter()
    limits = ["--trials", str(options.trials), "--minutes", f"{options.minutes:g}", "--jobs", str(options.jobs)]
    start = f"model.{options.model}.recipe.lr={rate:.6g}"
    found = convoy(project, "tune", options.model, start, *limits, "--sampler", sampler, "--json")
    return {
        "sampler": sampler,
        "lr": found["tuned"]["recipe.lr"],
        "trials": found["trials"],
        "pruned": found["pruned"],
        "before": found["scores"].get("present"),
        "tuned": found["scores"].get("tuned"),
        "is_better": found["is_better"],
        "minutes": (time.perf_counter() - began) / 60,
    }


def train_default(project: Path, options: argparse.Namespace) -> list[float]:
    """Train with the default settings, once for each seed of the comparisons."""
    code = (
        "import json, os, optuna; from pathlib import Path; from pipeline.tune import open_stage\n"
        "from pipeline.trial import TrialTrainer\n"
        f"stage = open_stage(Path.cwd(), {options.model!r}, [])\n"
        f"trainer, settings = TrialTrainer(stage, {options.jobs}), stage.section('model.{options.model}')\n"
        "optuna.logging.set_verbosity(optuna.logging.WARNING)\n"
        "study = optuna.create_study(direction='maximize', pruner=optuna.pruners.NopPruner())\n"
        "print(json.dumps([trainer.train(study.ask(), settings, seed)[0] for seed in (2, 3, 4)]))\n"
    )
    return json.loads(run(project, ["-c", code]))


def convoy(project: Path, *arguments: str) -> Any:
    return json.loads(run(project, ["pipeline.cli", *arguments]))


def run(project: Path, command: list[str]) -> str:
    """Run a Python module in the project and return what it prints."""
    way = [] if command[0] == "-c" else ["-m"]
    environment = os.environ | {"PYTHONPATH": str(project), "CONVOY_LIVE": "0"}
    done = subprocess.run(
        [sys.executable, *way, *command], cwd=project, env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}")
    return done.stdout


def show(rows: pd.DataFrame) -> None:
    def describe(scores: Any) -> str:
        return f"{np.mean(scores):.3f} ± {np.std(scores, ddof=1):.3f}" if isinstance(scores, list) else ""

    table = rows.assign(before=rows["before"].map(describe), tuned=rows["tuned"].map(describe))
    columns = ["start", "sampler", "trials", "pruned", "lr", "before", "tuned", "minutes"]
    print(table[columns].to_markdown(index=False, floatfmt=".3g"))


if __name__ == "__main__":
    main()
