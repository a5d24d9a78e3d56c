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
from convoy.config import ConvoyError
from pipeline.stage import MARK, Stage, main

PACKAGE = Path(convoy.__file__).parent


def register(stage: Stage) -> None:
    """Bring all runs into MLflow, and make the best by validation the champion."""
    params = stage.typed(promotion.Register, "register")
    names = list(stage.section("model"))
    trained = {name: stage.input(f"train/{name}") for name in names}
    evaluated = {name: stage.input(f"evaluate/{name}") for name in names}
    records = {name: json.loads((folder / "record.json").read_text()) for name, folder in trained.items()}
    figures = {name: json.loads((folder / "metrics.json").read_text()) for name, folder in evaluated.items()}
    identities = {name: _identity(trained[name], evaluated[name]) for name in names}
    best = {name: record["best"] for name, record in records.items() if not record["failure"]}
    ranked = [*promotion.rank(best), *(name for name in names if name not in best)]
    winner = ranked[0]

    report.leaderboard({name: records[name] for name in ranked}, figures).to_csv(
        stage.scratch / "leaderboard.csv", index=False
    )
    _together(trained, "history.csv").to_csv(stage.scratch / "curves.csv", index=False)
    _together(evaluated, "per_class.csv").to_csv(stage.scratch / "per_class.csv", index=False)

    for name in ranked[len(best) :]:
        print(f"{name} failed: {records[name]['failure']['reason']}")

    with tracking.store(stage.home, params.name) as store:
        reproduction = hashlib.sha256("".join(sorted(identities.values())).encode()).hexdigest()[:12]
        runs: dict[str, str] = {}
        for name in reversed(ranked):  # of equal runs MLflow shows the newest first
            run = tracking.find_run(store, identities[name])
            tags = {
                tracking.IDENTITY: identities[name],
                "reproduction": reproduction,
                "mlflow.runColor": report.COLOURS[names.index(name) % len(report.COLOURS)],
            }
            runs[name] = run or _bring(store, records[name], figures[name], trained[name], evaluated[name], tags)
        tracking.save_views(store)
        if not best:
            raise ConvoyError(f"the training of {', '.join(names)} failed: there is nothing to register")
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
            files={"record": trained[winner] / "record.json", "weights": trained[winner] / "weights.safetensors"},
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


def _bring(
    store: tracking.Store,
    record: dict[str, Any],
    figures: dict[str, float],
    trained: Path,
    evaluated: Path,
    tags: dict[str, str],
) -> str:
    """Write the run of one architecture into the store, and return its id."""
    predictions = pd.read_parquet(evaluated / "predictions.parquet")
    with tempfile.TemporaryDirectory() as scratch:
        files = [trained / "record.json", trained / "history.csv", evaluated / "per_class.csv"]
        if not record["failure"]:
            picture = Path(scratch) / "confusion.png"
            title = f"{record['architecture']} on test images"
            report.draw_confusion(predictions, record["task"]["classes"], title, picture)
            files += [trained / "weights.safetensors", picture]
        data = tracking.DataVersion(**record["data"])
        run = tracking.describe(record, figures, pd.read_csv(trained / "history.csv"), tags, files, data)
        return tracking.create_run(store, run)


if __name__ == "__main__":
    main("register", register)
