"""The report stage, which draws what was trained on what and how good it is, as one page and one for each network."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from convoy import models
from convoy.core.artifact_names import (
    DATA_CARD,
    DATASET_INFO,
    HISTORY,
    IMAGE_TABLE,
    INTERVALS,
    LABEL_ERRORS,
    MISTAKES,
    PER_CLASS,
    PREDICTIONS,
    RECORD,
    REPORT_PAGE,
    VALIDATION,
    WEIGHTS,
)
from convoy.core.csv_file import write_csv
from convoy.data.packed import arrays
from convoy.data.packed.dataset_info import DatasetInfo
from convoy.promotion import ranking
from convoy.promotion.config import RegisterConfig
from convoy.promotion.ranking import Choice, ValidatedModel
from convoy.reporting import comparison_section, model_section, page
from convoy.reporting.comparison_section import DataSummary
from convoy.reporting.evaluated_images import Images, list_label_errors, list_mistakes
from convoy.reporting.model_section import ModelResults, Section
from convoy.reporting.sheet import save_sheet
from convoy.training.record import TrainingRecord
from pipeline.stage import Stage, main

# Whose versions the page names.
PACKAGES = ("python", "torch", "pytorch-lightning", "numpy")


def report(stage: Stage) -> None:
    """Draw the report of the current results."""
    params = stage.validate(RegisterConfig, "register")
    names = list(stage.section("model"))
    records = {name: TrainingRecord.load(stage.input(f"train/{name}") / RECORD) for name in names}
    failed = {name: record.failure.reason for name, record in records.items() if record.failure}
    trained = {name: record for name, record in records.items() if not record.failure}
    # The pictures are bit-identical only with the same number of threads.
    torch.set_num_threads(1)

    validated = ranking.rank(
        [ValidatedModel.load(record, stage.input(f"evaluate/{name}")) for name, record in trained.items()],
        params.selection_metric,
    )
    choice = ranking.choose(validated, params.selection_metric, params.prefer) if validated else Choice("", "")
    results = [load_results(stage, model.name, trained[model.name]) for model in validated]
    data = summarize_data(stage, list(records.values()))
    leaderboard = make_leaderboard(results, {model.name: model.score("accuracy") for model in validated})
    rows = leaderboard.assign(failure="").to_dict("records")
    rows += [{"model": name, "failure": reason} for name, reason in failed.items()]

    sections = [comparison_section.describe_data(data)]
    if results:
        sections += [
            comparison_section.describe_results(leaderboard),
            comparison_section.describe_curves(results),
            comparison_section.describe_disagreement(results),
        ]
    model_sections = []
    for result in results:
        section = model_section.describe_model(result)
        model_sections.append(section)
        write_model_page(stage.scratch / result.name, result, section, data)
    model_sections += [Section(name, name, [], f"Its training failed: {reason}.") for name, reason in failed.items()]
    gate = params.gate
    html = page.render_page(
        "index.html.jinja",
        data=data,
        headline=describe_headline(data, leaderboard, failed),
        sections=sections,
        rows=rows,
        chosen=choice.name,
        choice=choice.reason,
        gate=f"register.gate.mode: {gate.mode}, alpha {gate.alpha:g}, at least {gate.min_accuracy:g} "
        f"{params.selection_metric} on {gate.min_test_images:,} test images or more",
        model_sections=model_sections,
        conditions=list_conditions(records),
    )
    (stage.scratch / "index.html").write_text(html, encoding="utf-8", newline="\n")
    summary = page.summarize(data, leaderboard, choice.reason, results, failed)
    (stage.scratch / "summary.md").write_text(summary, encoding="utf-8", newline="\n")
    card = page.render_card(stage.input("preprocess"))
    (stage.scratch / DATA_CARD).write_text(card, encoding="utf-8", newline="\n")
    print(f"the report is in {(stage.folder / 'index.html').relative_to(stage.root)}; `convoy report` opens it")


def load_results(stage: Stage, name: str, record: TrainingRecord) -> ModelResults:
    """Load everything that the report shows of a training run that did not fail."""
    trained, evaluated, prepared = (
        stage.input(f"train/{name}"),
        stage.input(f"evaluate/{name}"),
        stage.input("preprocess"),
    )
    info = record.dataset_info
    images = pd.read_parquet(prepared / IMAGE_TABLE, columns=["path", "split"])

    def load_images(split: str, file: str) -> Images:
        found = arrays.Images.load(stage.images(name), split)
        probabilities = model_section.class_probabilities(pd.read_parquet(evaluated / file), info.classes)
        paths = images.loc[images["split"] == split, "path"].tolist()
        return Images(found.pixels, paths, found.labels, probabilities)

    intervals = pd.read_csv(evaluated / INTERVALS)
    return ModelResults(
        name=name,
        record=record,
        history=pd.read_csv(trained / HISTORY),
        metrics=dict(zip(intervals["metric"], intervals["value"], strict=True)),
        intervals=intervals,
        # A class may be named NA or 007, so names are read as strings.
        per_class=pd.read_csv(evaluated / PER_CLASS, dtype={"class": str}, keep_default_na=False),
        test=load_images("test", PREDICTIONS),
        val=load_images("val", VALIDATION),
        load=functools.cache(lambda: models.restore(record.architecture, record.settings, info, trained / WEIGHTS)),
    )


def summarize_data(stage: Stage, records: Sequence[TrainingRecord]) -> DataSummary:
    """Count the images of each class and split, and choose some training images."""
    prepared = stage.input("preprocess")
    info = DatasetInfo.load(prepared / DATASET_INFO)
    table = pd.read_parquet(prepared / IMAGE_TABLE, columns=["label", "split"])
    counts = pd.crosstab(table["label"], table["split"])
    counts = counts.reindex(index=info.classes, columns=["train", "val", "test"], fill_value=0)
    train = arrays.Images.load(prepared, "train")
    # Classes in turn, so that as many as possible are shown; of many classes, some from the first to the last.
    turn = pd.Series(train.labels).groupby(train.labels).cumcount().to_numpy()
    rows = np.lexsort((train.labels, turn))
    first = rows[turn[rows] == 0]
    # As high as the chart of the classes beside them.
    count = 12 if len(info.classes) <= 12 else 24
    rows = first[np.linspace(0, len(first) - 1, count).round().astype(int)] if len(first) > count else rows[:count]
    rows = rows[np.argsort(train.labels[rows], kind="stable")]
    samples = [(train.pixels[row], info.classes[train.labels[row]]) for row in rows]
    sizes = sorted({record.dataset_info.size for record in records})
    return DataSummary(records[0].data, info.classes, sizes, info.channels, counts, samples)


def make_leaderboard(results: list[ModelResults], val_accuracy: Mapping[str, float]) -> pd.DataFrame:
    """Make the table of the architectures that `describe_results` and the page show."""
    rows = []
    for result in results:
        interval = result.intervals.set_index("metric").loc["accuracy"]
        rows.append(
            {
                "model": result.name,
                "val_accuracy": val_accuracy[result.name],
                "epoch": result.record.best.epoch if result.record.best else 0,
                **{f"test_{metric}": value for metric, value in result.metrics.items()},
                "low": interval["low"],
                "high": interval["high"],
                "parameters": result.record.parameters,
                "macs": result.record.macs,
            }
        )
    return pd.DataFrame(rows, columns=None if rows else ["model"])


def describe_headline(data: DataSummary, leaderboard: pd.DataFrame, failed: Mapping[str, str]) -> str:
    """Return the result in one or two sentences."""
    if not len(leaderboard):
        return f"The training of {', '.join(failed)} failed."
    best = leaderboard.iloc[0]
    count = int(data.counts["test"].sum())
    return (
        f"{best['model']} is best in validation. It classifies {best['test_accuracy']:.2%} of {count:,} test images of "
        f"{len(data.classes)} classes correctly (95% interval {best['low']:.2%} to {best['high']:.2%})."
    )


def list_conditions(records: Mapping[str, TrainingRecord]) -> pd.DataFrame:
    """List what the results depend on besides the code: data, seeds, versions, hardware."""
    first = next(iter(records.values()))
    environment = first.environment
    facts = {
        "data": f"{first.data.name}@{first.data.digest} from {first.data.source}",
        "seed of the splits": str(first.data.split_seed),
        "seed of the training": str(first.train.seed),
        "epochs at most": str(first.train.max_epochs),
        "versions": ", ".join(f"{name} {environment[name]}" for name in PACKAGES),
        "hardware": f"{environment['device']}, {environment['instructions']}, {environment['precision']}",
    }
    facts |= {
        f"recipe of {name}": ", ".join(
            f"{key} {record.settings['recipe'][key]}" for key in ("optimizer", "lr", "batch_size", "weight_decay")
        )
        for name, record in records.items()
    }
    return pd.DataFrame({"condition": facts.keys(), "value": facts.values()})


def write_model_page(folder: Path, results: ModelResults, section: Section, data: DataSummary) -> None:
    """Write the page, sheets and lists of images of one architecture, which also go into its run in MLflow."""
    folder.mkdir()
    html = page.render_page("model.html.jinja", section=section, data=data, metrics=results.intervals)
    (folder / REPORT_PAGE).write_text(html, encoding="utf-8", newline="\n")
    for figure in section.figures:
        save_sheet(figure, results.name, folder)
    label_errors = list_label_errors(results.classes, results.held_out).drop(columns="row")
    write_csv(label_errors.round(4), folder / LABEL_ERRORS)
    write_csv(list_mistakes(results.classes, results.test).round(4), folder / MISTAKES)


if __name__ == "__main__":
    main("report", report)
