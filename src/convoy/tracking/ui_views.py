"""Saved views of an experiment in MLflow's UI: tables and charts that are opened by a link.

A view is stored in a tag of the experiment. The format is undocumented, and was taken from the UI of MLflow 3.17. A UI
that can't read the tag shows a notice and the experiment's first page, so nothing else may depend on a view. The ID of
a view depends only on the experiment and the view's name: saving it again keeps the link, and writes the tag only if
the content differs.
"""

import base64
import hashlib
import json
import time
import zlib
from collections.abc import Sequence
from typing import Any

from mlflow import MlflowClient

from convoy.tracking.store import TrackingStore
from convoy.tracking.tags import RANK_TAG

# Columns of the leaderboard: what was trained, how good it is, on what, and what came of it; then cost and settings.
COLUMNS = [
    "tags.rank",
    # Only those of `register.selection_metric` exist.
    "metrics.validation/balanced_accuracy",
    "metrics.validation/macro_f1",
    "metrics.validation/accuracy",
    "metrics.test/accuracy",
    "metrics.test/accuracy_low",
    "metrics.test/accuracy_high",
    "tags.data",
    "attributes.Models",
    "tags.verdict",
    "tags.commit",
    "metrics.validation/loss",
    "metrics.test/macro_f1",
    "metrics.test/log_loss",
    "metrics.parameters",
    "metrics.latency/image_ms_median",
]
# Settings that matter most. The views show those that are not the same in all ranked runs.
SETTINGS = [
    "recipe.optimizer",
    "recipe.lr",
    "recipe.batch_size",
    "recipe.weight_decay",
    "recipe.label_smoothing",
    "recipe.ema_decay",
    "recipe.augment.auto_augment",
    "recipe.augment.mixup",
    "init",
    "model.size",
    "train.max_epochs",
    "train.seed",
    "split.seed",
]
# Widths of columns whose content is wider than their name, in pixels.
COLUMN_WIDTHS = {"tags.data": 170, "tags.verdict": 160, "tags.commit": 110, "attributes.Models": 110}
# Metrics of the page of curves, as line charts, bar charts and scatter plots.
CURVES = ["epoch/val_accuracy", "epoch/val_loss", "epoch/train_loss"]
BARS = ["validation/accuracy", "test/accuracy"]
SCATTERS = [("parameters", "test/accuracy"), ("latency/image_ms_median", "test/accuracy")]
# Prefix of the experiment tag that holds a view, followed by the ID of the view.
TAG = "mlflow.sharedViewState."
LINE_CHART = {
    "type": "LINE",
    "lineSmoothness": 0,
    "scaleType": "linear",
    "xAxisScaleType": "linear",
    "range": {},
    "xAxisKey": "step",
    "yAxisKey": "metric",
    "useGlobalXaxisKey": True,
    "useGlobalLineSmoothing": True,
}


def save_views(store: TrackingStore) -> tuple[str, str]:
    """Save two views of the experiment, the leaderboard and the curves of all runs.

    Returns:
        The URLs of the leaderboard and of the curves.
    """
    client, experiment = store.client, store.experiment.experiment_id
    # Runs without a rank, which are those of other data, come last.
    order_by = f"tags.{RANK_TAG}"
    settings = list_different(client, experiment, SETTINGS)
    columns = [*COLUMNS, *(f"params.{name}" for name in settings), "tags.reproduction"]
    table = save_table(client, experiment, "leaderboard", columns, order_by)
    charts = save_charts(client, experiment, "curves", CURVES, BARS, SCATTERS, settings, order_by)
    note = (
        f"[Leaderboard]({table[1:]}) · [Curves]({charts[1:]}) · all architectures; those of the newest data come "
        "first, best in validation"
    )
    if store.experiment.tags.get("mlflow.note.content") != note:
        client.set_experiment_tag(experiment, "mlflow.note.content", note)
    return store.address + table, store.address + charts


def list_different(client: MlflowClient, experiment_id: str, settings: Sequence[str]) -> list[str]:
    """Return those of some settings that are not the same in all ranked runs."""
    ranked = client.search_runs([experiment_id], f"tags.{RANK_TAG} LIKE '%'")
    return [name for name in settings if len({run.data.params.get(name) for run in ranked}) > 1]


def save_table(
    client: MlflowClient,
    experiment_id: str,
    name: str,
    columns: list[str],
    order_by: str,
    *,
    is_ascending: bool = True,
) -> str:
    """Save a table of runs as a view, sorted by a column.

    The UI always shows the columns Run Name, Created and Duration, and never shows a column that no run has.

    Args:
        client: MLflow client.
        experiment_id: ID of the experiment.
        name: Name of the view.
        columns: Columns in order, such as "metrics.epoch/val_accuracy", "params.model", "tags.candidate" or
            "attributes.Models". Other attributes are Dataset, Source, User, Version and Description.
        order_by: Column to sort by.
        is_ascending: Whether the smallest value is the first.

    Returns:
        The path of the view's URL.
    """
    widths = {"attributes.`Run Name`": 140, "runDateAndNestInfo": 140}
    # Pixels: 7 for each character, a margin, and space for the arrow in the header of the sorted column.
    for column in columns:
        width = 7 * len(column.partition(".")[2]) + (60 if column == order_by else 30)
        widths[_column_key(column)] = COLUMN_WIDTHS.get(column, min(220, max(80, width)))
    return _save(
        client,
        experiment_id,
        name,
        "TABLE",
        {
            "selectedColumns": [_column_key(c) for c in columns],
            "columnOrder": list(widths),
            "columnWidths": widths,
            "orderByKey": _column_key(order_by),
            "orderByAsc": is_ascending,
        },
    )


def save_charts(
    client: MlflowClient,
    experiment_id: str,
    name: str,
    curves: list[str],
    bars: list[str],
    scatters: list[tuple[str, str]],
    settings: list[str],
    order_by: str,
) -> str:
    """Save a page of charts of all runs as a view.

    Metrics are named as they were logged, such as "epoch/val_accuracy". Below these charts the UI adds its own for
    metrics that no line or bar chart shows.

    Args:
        client: MLflow client.
        experiment_id: ID of the experiment.
        name: Name of the view.
        curves: Metrics drawn as line charts over the steps.
        bars: Metrics whose last values are drawn as bar charts.
        scatters: Pairs of metrics drawn as scatter plots, (x, y).
        settings: Parameters drawn as parallel coordinates with the first of `bars`, if there are two or more.
        order_by: Column to sort runs by in ascending order, as in `save_table`.

    Returns:
        The path of the view's URL.
    """
    top = _hash_id(experiment_id, name, "section")
    charts: list[dict[str, Any]] = [
        LINE_CHART | {"metricKey": m, "selectedMetricKeys": [m], "scaleType": "log" if m.endswith("loss") else "linear"}
        for m in curves
    ]
    charts += [{"type": "BAR", "metricKey": m} for m in bars]
    for x, y in scatters:
        axes = (("xaxis", x), ("yaxis", y))
        charts.append({"type": "SCATTER"} | {axis: {"key": m, "type": "METRIC"} for axis, m in axes})
    if len(settings) > 1:
        charts.append(
            {"type": "PARALLEL", "selectedParams": settings, "selectedMetrics": bars[:1], "showAllRuns": True}
        )
    for i, chart in enumerate(charts):
        chart |= {"uuid": f"{top}-{i}", "metricSectionId": top, "runsCountToCompare": 100, "deleted": False}
    return _save(
        client,
        experiment_id,
        name,
        "CHART",
        {
            "compareRunCharts": charts,
            "isAccordionReordered": True,
            "runsHiddenMode": "SHOW_ALL",
            "compareRunSections": [{"uuid": top, "name": name, "display": True, "isReordered": True}],
            "orderByKey": _column_key(order_by),
            "orderByAsc": True,
        },
    )


def _hash_id(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _column_key(column: str) -> str:
    kind, _, field = column.partition(".")
    return f"{kind}.`{field}`"


def _save(client: MlflowClient, experiment_id: str, name: str, mode: str, state: dict[str, Any]) -> str:
    """Write the tag of a view unless it already holds the same content, and return the path of the view's URL."""
    view = _hash_id(experiment_id, name)
    packed = "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    try:
        old = json.loads(client.get_experiment(experiment_id).tags.get(TAG + view, ""))
        known = {"name": name, "createdAt": int(old["createdAt"]), "state": old["state"]}
    except (ValueError, KeyError, TypeError):
        # The view does not exist yet, or its tag is damaged.
        known = {"createdAt": int(time.time() * 1000)}
    if known.get("state") != packed:
        tag = known | {"name": name, "updatedAt": int(time.time() * 1000), "state": packed}
        client.set_experiment_tag(experiment_id, TAG + view, json.dumps(tag))
    page = f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning&compareRunsMode={mode}"
    return f"{page}&viewStateShareKey={view}"
