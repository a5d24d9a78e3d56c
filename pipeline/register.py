"""register: all runs into MLflow, and the best of them by validation as the champion among the registered models."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

import convoy
from convoy import promotion, report, tracking
from convoy.tracking import Run
from pipeline.stage import MARK, Stage, main

PACKAGE = Path(convoy.__file__).parent


def register(stage: Stage) -> None:
    """Bring all runs into MLflow, and make the best by validation the champion."""
    params = stage.typed(promotion.Register, "register")
    trained = {name: stage.input(f"train/{name}") for name in stage.section("model")}
    evaluated = {name: stage.input(f"evaluate/{name}") for name in trained}
    records = {name: json.loads((folder / "record.json").read_text()) for name, folder in trained.items()}
    figures = {name: json.loads((folder / "metrics.json").read_text()) for name, folder in evaluated.items()}
    identities = {name: _identity(trained[name], evaluated[name]) for name in trained}

    report.leaderboard(records, figures).to_csv(stage.scratch / "leaderboard.csv", index=False)
    _together(trained, "history.csv").to_csv(stage.scratch / "curves.csv", index=False)
    _together(evaluated, "per_class.csv").to_csv(stage.scratch / "per_class.csv", index=False)

    best = {name: record["best"] for name, record in records.items()}
    winner = promotion.choose(best)
    with tracking.store(stage.root, params.name) as store:
        reproduction = hashlib.sha256("".join(sorted(identities.values())).encode()).hexdigest()[:12]
        runs: dict[str, str] = {}
        for name in trained:
            run = tracking.find_run(store, identities[name])
            colour = report.COLOURS[len(runs) % len(report.COLOURS)]
            runs[name] = run or _bring(store, trained[name], evaluated[name], identities[name], reproduction, colour)
        tracking.save_views(store)
        if experiment := os.environ.get("DVC_EXP_NAME"):
            print(f"{winner} is the best of experiment {experiment}; an experiment leaves the champion as it is")
            return
        promotion.check_floor(winner, best[winner], params)
        version = tracking.find_version(store, params.name, identities[winner]) or tracking.register(
            store,
            name=params.name,
            run_id=runs[winner],
            identity=identities[winner],
            model=PACKAGE / "serving.py",
            files={
                file.stem: trained[winner] / file.name for file in map(Path, ("record.json", "weights.safetensors"))
            },
            code=PACKAGE,
            step=int(best[winner]["epoch"]),
        )
        moved = tracking.set_alias(store, params.name, "champion", version)
    became = "is now" if moved else "stays"
    print(f"{winner} {became} the champion: models:/{params.name}@champion, version {version.version}")


def _together(folders: Mapping[str, Path], file: str) -> pd.DataFrame:
    """The rows of this table of every architecture, with a column that names it."""
    tables = []
    for name, folder in folders.items():
        # a class may be called NA or 007
        table = pd.read_csv(folder / file, dtype={"class": str}, keep_default_na=False)
        tables.append(table.assign(model=name))
    return pd.concat(tables, ignore_index=True)


def _identity(trained: Path, evaluated: Path) -> str:
    """The hash of everything that training and evaluation wrote."""
    return hashlib.sha256((trained / MARK).read_bytes() + (evaluated / MARK).read_bytes()).hexdigest()


def _bring(store: tracking.Store, trained: Path, evaluated: Path, identity: str, reproduction: str, colour: str) -> str:
    """Write the run of one architecture into the store, and return its id."""
    record = json.loads((trained / "record.json").read_text())
    figures = json.loads((evaluated / "metrics.json").read_text())
    best, task = record["best"], record["task"]
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "confusion.png"
        predictions = pd.read_parquet(evaluated / "predictions.parquet")
        report.draw_confusion(predictions, task["classes"], f"{record['architecture']} on test images", picture)
        run = Run(
            name=record["architecture"],
            identity=identity,
            colour=colour,
            params={
                "model": record["architecture"],
                "dataset": task["dataset"],
                "size": task["size"],
                "seed": record["seed"],
                "train.max_epochs": record["train"]["max_epochs"],
                **_flat(record["settings"]["recipe"], "recipe"),
            },
            metrics={
                **{f"best/{name}": value for name, value in best.items() if name.startswith("val_") or name == "epoch"},
                **{f"test/{name}": value for name, value in figures.items()},
                "parameters": record["parameters"],
            },
            history=pd.read_csv(trained / "history.csv").rename(columns=_metric_name),
            tags={
                "reproduction": reproduction,
                **{f"environment.{k}": str(v) for k, v in record["environment"].items()},
            },
            files=[
                trained / "record.json",
                trained / "history.csv",
                evaluated / "per_class.csv",
                evaluated / "predictions.parquet",
                picture,
            ],
        )
        return tracking.create_run(store, run)


def _metric_name(column: str) -> str:
    """val_accuracy -> val/accuracy, so that MLflow draws the metrics of a split in one section."""
    split, _, figure = column.partition("_")
    return f"{split}/{figure}" if figure else column


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """{"augment": {"flip": True}} -> {"recipe.augment.flip": True}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}"
        flat |= _flat(value, name) if isinstance(value, Mapping) else {name: value}
    return flat


if __name__ == "__main__":
    main("register", register)
