"""Charts of one architecture: its training, its mistakes and its confidence."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from convoy.data.card.markdown import shorten
from convoy.reporting.svg import BLUE, GREEN, GREY, INK, ORANGE, RED, chart, format_log_axis, put_legend_above

# Classes in one chart; of more, those with the most mistakes are drawn.
MAX_CLASSES = 30
# Bins of confidence in the reliability diagram.
BINS = 10
NAME_WIDTH = 16  # columns


def draw_learning_curves(history: pd.DataFrame, kept: int | None) -> str:
    """Draw accuracy, loss and learning rate by epoch, and mark the epoch whose weights were kept.

    Args:
        history: Table with the columns epoch, lr, train_loss, train_accuracy, val_loss and val_accuracy.
        kept: The epoch that was kept, or None.
    """
    with chart(5.0) as drawn:
        panels = drawn.axes(3, 1, sharex=True, height_ratios=(3, 3, 1.6))
        for axes, metric in zip(panels, ("accuracy", "loss"), strict=False):
            marker = "." if len(history) < 40 else ""
            axes.plot(history["epoch"], history[f"train_{metric}"], color=GREY, linestyle="--", label="training")
            axes.plot(history["epoch"], history[f"val_{metric}"], color=BLUE, marker=marker, label="validation")
            axes.set_ylabel(metric)
        panels[0].set_ylim(top=min(1.02, panels[0].get_ylim()[1]))
        # The first epochs of the loss would flatten all others.
        panels[1].set_yscale("log")
        format_log_axis(panels[1].yaxis)
        put_legend_above(panels[0])
        panels[2].plot(history["epoch"], history["lr"], color=GREEN)
        panels[2].set(ylabel="learning rate", xlabel="epoch", ylim=(0, None))
        for axes in panels:
            if kept is not None:
                axes.axvline(kept, color=RED, linewidth=1, linestyle=":")
        if kept is not None:
            panels[0].set_title(f"kept: epoch {kept}", color=RED, fontsize=9, loc="right")
        panels[2].xaxis.get_major_locator().set_params(integer=True)
        drawn.figure.align_ylabels()
    return drawn.svg


def select_classes(predictions: pd.DataFrame, classes: Sequence[str]) -> list[str]:
    """Return the classes that a chart shows, in the given order: all, or those in the most mistakes."""
    if len(classes) <= MAX_CLASSES:
        return list(classes)
    wrong = predictions[predictions["actual"] != predictions["predicted"]]
    mistakes = pd.concat([wrong["actual"], wrong["predicted"]]).value_counts()
    chosen = set(sorted(classes, key=lambda name: -mistakes.get(name, 0))[:MAX_CLASSES])
    return [name for name in classes if name in chosen]


def count_confusions(predictions: pd.DataFrame) -> pd.DataFrame:
    """Count the mistakes by pair of classes, the largest first.

    Args:
        predictions: Table with the columns actual and predicted.

    Returns:
        A table with the columns actual, predicted, images, and fraction of the images of the actual class.
    """
    wrong = predictions[predictions["actual"] != predictions["predicted"]]
    counts = wrong.groupby(["actual", "predicted"], as_index=False).size().rename(columns={"size": "images"})
    totals = predictions["actual"].value_counts()
    counts["fraction"] = [count / totals[name] for name, count in zip(counts["actual"], counts["images"], strict=True)]
    return counts.sort_values(["images", "actual", "predicted"], ascending=[False, True, True], ignore_index=True)


def draw_confusion_matrix(predictions: pd.DataFrame, classes: Sequence[str]) -> str:
    """Draw the confusion matrix with correct predictions in blue and mistakes in orange.

    Args:
        predictions: Table with the columns actual and predicted.
        classes: Classes to draw, in the order of the axes.
    """
    from matplotlib.colors import to_rgba

    count = len(classes)
    table = pd.crosstab(predictions["actual"], predictions["predicted"]).reindex(
        index=list(classes), columns=list(classes), fill_value=0
    )
    cells = table.to_numpy()
    of_class = np.maximum(cells.sum(axis=1), 1)
    off_diagonal = cells * (1 - np.eye(count, dtype=int))
    most = max(1, off_diagonal.max(initial=0))
    size = 8 if count <= 12 else 6
    with chart(4.6 if count <= 12 else 5.4) as drawn:
        axes = drawn.axes()
        rgba = np.zeros((count, count, 4))
        for row, column in np.argwhere(cells):
            right = row == column
            # Even a single mistake is seen.
            strength = cells[row, column] / of_class[row] if right else 0.25 + 0.75 * cells[row, column] / most
            rgba[row, column] = to_rgba(BLUE if right else ORANGE, strength * (0.85 if right else 1))
            if count <= 20 or not right:
                ink = "white" if right and strength > 0.5 else INK
                ink = "#000000" if not right and strength > 0.5 else ink
                axes.text(column, row, f"{cells[row, column]}", ha="center", va="center", fontsize=size, color=ink)
        corners = np.arange(count + 1) - 0.5
        axes.pcolormesh(corners, corners, rgba, linewidth=0)
        names = [shorten(name, NAME_WIDTH) for name in classes]
        axes.set_xticks(range(count), names, rotation=90 if count * max(map(len, names)) > 45 else 0, fontsize=size)
        axes.set_yticks(range(count), names, fontsize=size)
        axes.set(xlabel="predicted class", ylabel="actual class", aspect="equal")
        axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5))
        axes.tick_params(length=0)
        axes.grid(False)
    return drawn.svg


def draw_class_metrics(per_class: pd.DataFrame) -> str:
    """Draw precision, recall and F1 of each class with their intervals, the lowest F1 first.

    Args:
        per_class: Rows of the table of `per_class_metrics`.
    """
    shown = per_class[per_class["images"] > 0].sort_values(["f1", "class"], ignore_index=True).head(MAX_CLASSES)
    rows = np.arange(len(shown))
    with chart(1.1 + 0.3 * len(shown)) as drawn:
        axes = drawn.axes()
        series = (("precision", ORANGE, -0.24, "^"), ("recall", GREEN, 0.0, "s"), ("f1", BLUE, 0.24, "o"))
        for metric, colour, shift, marker in series:
            values = shown[metric]
            low, high = shown[f"{metric}_low"], shown[f"{metric}_high"]
            axes.hlines(rows + shift, low, high, color=colour, linewidth=1.2)
            label = "F1" if metric == "f1" else metric
            axes.plot(values, rows + shift, marker, color=colour, markersize=3.5, label=label)
        axes.set_yticks(rows, [shorten(name, NAME_WIDTH) for name in shown["class"]])
        axes.set(xlabel="metric on test images, with 95% interval", ylim=(len(shown) - 0.4, -0.6), xlim=(None, 1.01))
        axes.grid(axis="y", visible=False)
        put_legend_above(axes)
    return drawn.svg


def draw_reliability(confidence: np.ndarray, is_correct: np.ndarray) -> str:
    """Draw the accuracy of predictions by their confidence, above the number of images.

    Args:
        confidence: (N,) probability of the predicted class, in [0, 1].
        is_correct: (N,) whether the prediction is correct.
    """
    edges = np.linspace(0, 1, BINS + 1)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(bins, confidence, BINS) / counts
        accuracy = np.bincount(bins, is_correct, BINS) / counts
    low, high = wilson_interval(np.nan_to_num(accuracy), np.maximum(counts, 1))
    found = counts > 0
    with chart(4.2) as drawn:
        top, bottom = drawn.axes(2, 1, sharex=True, height_ratios=(3, 1))
        top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="perfectly calibrated")
        top.vlines(mean[found], low[found], high[found], color=BLUE, linewidth=1.2)
        top.plot(mean[found], accuracy[found], "o", color=BLUE, label="images of one bin")
        top.set(ylabel="accuracy, with 95% interval", ylim=(-0.02, 1.02), xlim=(-0.02, 1.02))
        put_legend_above(top)
        bottom.bar((edges[:-1] + edges[1:]) / 2, counts, width=0.9 / BINS, color=BLUE, alpha=0.6)
        bottom.set_yscale("log")
        format_log_axis(bottom.yaxis)
        bottom.set(ylabel="images", xlabel="confidence (probability of the predicted class)")
    return drawn.svg


def draw_coverage(confidence: np.ndarray, is_correct: np.ndarray) -> str:
    """Draw the accuracy on the most certain images against their fraction of all images.

    Args:
        confidence: (N,) probability of the predicted class, in [0, 1].
        is_correct: (N,) whether the prediction is correct.
    """
    coverage, accuracy = accuracy_by_coverage(confidence, is_correct)
    # A curve of more points looks the same.
    step = max(1, len(coverage) // 500)
    keep = np.r_[np.arange(len(coverage) - 1, -1, -step)[::-1]]
    with chart(3.2) as drawn:
        axes = drawn.axes()
        axes.plot(coverage[keep], accuracy[keep], color=BLUE)
        axes.plot([1], accuracy[-1:], "o", color=BLUE)
        axes.set_title(f"all images: {accuracy[-1]:.4f}", loc="right", fontsize=9, color=BLUE)
        axes.set(xlabel="fraction of images kept, the most certain first", ylabel="accuracy on them", xlim=(0, 1.02))
        axes.set_ylim(max(0, min(accuracy[keep].min(), accuracy[-1]) - 0.02), 1.005)
        axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 1])
    return drawn.svg


def accuracy_by_coverage(confidence: np.ndarray, is_correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the accuracy on the n most certain images for each n.

    Args:
        confidence: (N,) probability of the predicted class, in [0, 1].
        is_correct: (N,) whether the prediction is correct.

    Returns:
        The fraction of images kept (N,), ascending to 1, and the accuracy on them (N,).
    """
    order = np.argsort(-confidence, kind="stable")
    counts = np.arange(1, len(order) + 1)
    return counts / len(order), np.cumsum(is_correct[order]) / counts


def wilson_interval(fraction: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95% interval of fractions (...) that were observed in `count` images (...) (Wilson 1927)."""
    square = 1.959964**2
    middle = (fraction + square / (2 * count)) / (1 + square / count)
    margin = np.sqrt(square * (fraction * (1 - fraction) / count + square / (4 * count**2))) / (1 + square / count)
    return np.maximum(middle - margin, 0), np.minimum(middle + margin, 1)
