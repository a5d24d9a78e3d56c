"""The register stage, which syncs all runs to MLflow and promotes the best model if it passes the gate."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from convoy.core.artifact_names import HISTORY, LATENCIES, LEADERBOARD, LINKS, PER_CLASS
from convoy.core.csv_file import write_csv
from convoy.core.errors import ConvoyError
from convoy.promotion import champion, ranking
from convoy.promotion.config import RegisterConfig
from convoy.promotion.ranking import ValidatedModel
from convoy.registry import versions
from convoy.reporting import report
from convoy.tracking import runs, ui_views
from convoy.tracking.store import TrackingStore, open_store
from pipeline.stage import Stage, main
from pipeline.sync_mlflow import TrainedResult, find_result, sync_runs


def register(stage: Stage) -> None:
    """Write the leaderboard, sync all runs to MLflow and compare the best model by validation with the champion."""
    params = stage.validate(RegisterConfig, "register")
    names = list(stage.section("model"))
    results = {name: find_result(stage, name) for name in names}
    records = {name: result.record() for name, result in results.items()}
    metrics = {name: result.test_metrics() for name, result in results.items()}
    trained = {name: result.trained for name, result in results.items()}
    evaluated = {name: result.evaluated for name, result in results.items()}
    validated = ranking.rank(
        [ValidatedModel.load(record, evaluated[name]) for name, record in records.items() if not record.failure],
        params.selection_metric,
    )
    failed = [name for name, record in records.items() if record.failure]
    ranked = [*(model.name for model in validated), *failed]

    validation = {model.name: model.summarize(params.selection_metric) for model in validated}
    table = report.leaderboard({name: records[name] for name in ranked}, validation, metrics)
    table.to_csv(stage.scratch / LEADERBOARD, index=False)
    concat_tables(trained, HISTORY).to_csv(stage.scratch / "curves.csv", index=False)
    write_csv(concat_tables(evaluated, PER_CLASS), stage.scratch / PER_CLASS)
    for name, record in records.items():
        if record.failure:
            print(f"{name} failed: {record.failure.reason}")
    # The comparison runs after the leaderboard is published, so that the leaderboard exists after a refusal, too.
    stage.on_published.append(lambda: compare(stage, params, {name: results[name] for name in ranked}, validated))


def compare(
    stage: Stage, params: RegisterConfig, results: dict[str, TrainedResult], validated: Sequence[ValidatedModel]
) -> None:
    """Sync the runs of all results to MLflow and compare one of them with the champion.

    Args:
        stage: The running register stage.
        params: The settings of the stage.
        results: The result of each architecture, in the order of the leaderboard.
        validated: The architectures whose training did not fail, best in validation first.

    Raises:
        ConvoyError: If all training runs failed, or the comparison is refused.
    """
    names = list(stage.section("model"))
    with open_store(stage.project_root, params.name) as store:
        run_ids = sync_runs(store, stage.root, names, dict(reversed(results.items())), params.selection_metric)
        # The main command prints these links without an import of MLflow, which takes two seconds.
        (stage.scratch.parent / LINKS).write_text(json.dumps(ui_views.save_views(store)))
        if not validated:
            raise ConvoyError(f"the training of {', '.join(names)} failed: there is nothing to register")
        choice = ranking.choose(validated, params.selection_metric, params.prefer)
        winner, result, run = choice.name, results[choice.name], run_ids[choice.name]
        print(choice.reason)
        shown = {model.name: results[model.name] for model in validated if model.name in run_ids}
        write_latencies(stage, store, run_ids, shown, winner)
        if experiment := os.environ.get("DVC_EXP_NAME"):
            print(f"{winner} is the best of experiment {experiment}; experiments never change the champion")
            return
        champion.complete_pending(store, params.name)
        found = versions.find_version(store, params.name, result.manifest_hash())
        if found:
            version = int(found.version)
        else:
            # It imports torch, which takes seconds that a repeated run can save.
            from pipeline import registration

            version = registration.register_version(
                store, params.name, result, run, stage.input("preprocess"), stage.images(winner)
            )
        compared = champion.current_version(store, params.name)
    if version == compared:
        print(f"{winner} stays the champion: models:/{params.name}@champion, version {compared}")
        return

    from pipeline.promote import Challenger, promote

    promote(stage, params, Challenger(winner, version, result, run, choice.reason), compared)


def write_latencies(
    stage: Stage,
    store: TrackingStore,
    run_ids: Mapping[str, str],
    results: Mapping[str, TrainedResult],
    challenger: str,
) -> None:
    """Write the latencies of all networks for `convoy report`, measuring them if those of a run are missing.

    The file is no output of the stage, as each measurement differs.

    Args:
        stage: The running register stage.
        store: The open MLflow store.
        run_ids: The ID of each network's run.
        results: The results of networks whose training did not fail.
        challenger: The network whose latency of a batch is measured, too.
    """

    def read() -> pd.DataFrame:
        rows = [
            {"model": name, "training": result.record().fingerprint, **runs.read_latencies(store, run_ids[name])}
            for name, result in results.items()
        ]
        return pd.DataFrame(rows).set_index("model")

    columns = ["training", "image_ms_median", "image_ms_p95", "hardware"]
    table = read().reindex(columns=[*columns, "batch_ms_median"])
    # Latencies of different measurements can't be compared, so that one that is missing is measured with all others.
    if table[columns].isna().any(axis=None) or table["batch_ms_median"].isna()[challenger]:
        from pipeline import registration

        registration.measure_latencies(store, run_ids, results, challenger)
        table = read()
    table[columns].to_csv(stage.root / "artifacts" / LATENCIES)


def concat_tables(folders: Mapping[str, Path], file: str) -> pd.DataFrame:
    """Concatenate a table of every architecture, with the architecture in the column `model`."""
    tables = []
    for name, folder in folders.items():
        # A class may be named NA or 007, so names are read as strings.
        table = pd.read_csv(folder / file, dtype={"class": str}, keep_default_na=False)
        tables.append(table.assign(model=name))
    return pd.concat(tables, ignore_index=True)


if __name__ == "__main__":
    main("register", register)
