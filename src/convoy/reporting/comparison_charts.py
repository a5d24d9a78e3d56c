"""Charts that compare the architectures: accuracy, cost, curves, classes and agreement."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from convoy.data.card.markdown import shorten
from convoy.reporting.report import architecture_colour
from convoy.reporting.svg import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LINE,
    ORANGE,
    chart,
    format_log_axis,
    label_points,
    put_legend_above,
)

# Shapes and dashes tell architectures apart where colours don't.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)))
MAX_CLASSES = 30
NAME_WIDTH = 16  # columns
SPLITS = {"train": BLUE, "val": ORANGE, "test": GREEN}


def draw_accuracies(leaderboard: pd.DataFrame) -> str:
    """Draw the test accuracy of each architecture with its interval, and its accuracy in validation.

    Args:
        leaderboard: Table with the columns model, val_accuracy, test_accuracy, low and high, best first.
    """
    rows = np.arange(len(leaderboard))
    with chart(1.0 + 0.42 * len(leaderboard)) as drawn:
        axes = drawn.axes()
        for row, line in zip(rows, leaderboard.itertuples(), strict=True):
            colour = architecture_colour(str(line.model))
            axes.hlines(row, line.low, line.high, color=colour, linewidth=3, alpha=0.5)
            axes.plot(line.test_accuracy, row, "o", color=colour, markersize=7)
            axes.plot(line.val_accuracy, row, "|", color=INK, markersize=12)
        axes.plot([], [], "o", color=GREY, label="test images, with 95% interval")
        axes.plot([], [], "|", color=INK, markersize=12, label="validation images")
        axes.set_yticks(rows, leaderboard["model"])
        axes.set(xlabel="accuracy", ylim=(len(rows) - 0.5, -0.5))
        axes.grid(axis="y", visible=False)
        put_legend_above(axes)
    return drawn.svg


def find_frontier(cost: Sequence[float], accuracy: Sequence[float]) -> list[int]:
    """Return the positions of the points that no cheaper or equally cheap point surpasses, the cheapest first."""
    frontier: list[int] = []
    for position in sorted(range(len(cost)), key=lambda number: (cost[number], -accuracy[number])):
        if not frontier or accuracy[position] > accuracy[frontier[-1]]:
            frontier.append(position)
    return frontier


def draw_frontier(leaderboard: pd.DataFrame, cost: str, label: str) -> str:
    """Draw the test accuracy against a cost, and the frontier of the architectures that none surpasses for less.

    Args:
        leaderboard: Table with the columns model, test_accuracy, low, high and the cost.
        cost: Column of the cost.
        label: Label of its axis, with the unit.
    """
    points = leaderboard.reset_index(drop=True)
    frontier = find_frontier(points[cost].tolist(), points["test_accuracy"].tolist())
    with chart(3.4) as drawn:
        axes = drawn.axes()
        line = points.loc[frontier]
        axes.step(line[cost], line["test_accuracy"], where="post", color=GREY, linewidth=1, linestyle="--")
        for number, point in enumerate(points.to_dict("records")):
            colour = architecture_colour(point["model"])
            position = (point[cost], point["test_accuracy"])
            axes.vlines(point[cost], point["low"], point["high"], color=colour, linewidth=1.5, alpha=0.5)
            axes.plot(*position, MARKERS[number % len(MARKERS)], color=colour, markersize=7)
        axes.set(xscale="log", xlabel=label, ylabel="accuracy on test images, with 95% interval")
        axes.margins(x=0.2)
        format_log_axis(axes.xaxis)
        positions = list(zip(points[cost], points["test_accuracy"], strict=True))
        label_points(axes, positions, points["model"].tolist())
    return drawn.svg


def draw_curves(histories: Mapping[str, pd.DataFrame], metric: str, label: str, *, is_log: bool = False) -> str:
    """Draw a metric of all architectures by epoch.

    Args:
        histories: History of each architecture, with the columns epoch and `metric`.
        metric: Column to draw.
        label: Label of its axis.
        is_log: Whether its axis is logarithmic.
    """
    with chart(3.4) as drawn:
        axes = drawn.axes()
        for number, (name, history) in enumerate(histories.items()):
            dashes = DASHES[number % len(DASHES)]
            axes.plot(history["epoch"], history[metric], color=architecture_colour(name), linestyle=dashes, label=name)
        axes.set(xlabel="epoch", ylabel=label, yscale="log" if is_log else "linear")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if is_log:
            format_log_axis(axes.yaxis)
        else:
            axes.set_ylim(top=min(1.02, axes.get_ylim()[1]))
        put_legend_above(axes)
    return drawn.svg


def draw_classes(f1: pd.DataFrame) -> str:
    """Draw the F1 of each class by every architecture, the hardest class first.

    Args:
        f1: Table with a row for each class and a column for each architecture.
    """
    shown = f1.loc[f1.mean(axis=1).sort_values(kind="stable").index].head(MAX_CLASSES)
    rows = np.arange(len(shown))
    with chart(1.1 + 0.24 * len(shown)) as drawn:
        axes = drawn.axes()
        axes.hlines(rows, shown.min(axis=1), shown.max(axis=1), color=LINE, linewidth=2)
        for number, name in enumerate(shown):
            marker, colour = MARKERS[number % len(MARKERS)], architecture_colour(str(name))
            axes.plot(shown[name], rows, marker, color=colour, markersize=5, label=name, alpha=0.9)
        axes.set_yticks(rows, [shorten(str(name), NAME_WIDTH) for name in shown.index])
        axes.set(xlabel="F1 on test images", ylim=(len(rows) - 0.5, -0.5))
        axes.grid(axis="y", visible=False)
        put_legend_above(axes)
    return drawn.svg


def draw_agreement(predicted: pd.DataFrame) -> str:
    """Draw the fraction of images for which each pair of architectures predicts the same class.

    Args:
        predicted: Table of predicted classes with a column for each architecture.
    """
    names = [str(name) for name in predicted]
    count = len(names)
    with chart(1.0 + 0.5 * count) as drawn:
        axes = drawn.axes()
        same = np.array([[float((predicted[one] == predicted[other]).mean()) for other in names] for one in names])
        lowest = same.min()
        for row, column in np.ndindex(count, count):
            # Each pair is drawn once.
            if column < row:
                strength = 0.1 + 0.8 * (1 - same[row, column]) / max(1 - lowest, 1e-9)
                axes.fill_between([column - 0.48, column + 0.48], row - 0.48, row + 0.48, color=BLUE, alpha=strength)
                ink = "white" if strength > 0.5 else INK
                axes.text(column, row, f"{same[row, column]:.1%}", ha="center", va="center", color=ink)
        axes.set_xticks(range(count - 1), names[:-1])
        axes.set_yticks(range(1, count), names[1:])
        axes.set(xlim=(-0.5, count - 1.5), ylim=(count - 0.5, 0.5))
        axes.set(xlabel="the darker, the fewer images with the same prediction")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(False)
    return drawn.svg


def draw_class_counts(counts: pd.DataFrame) -> str:
    """Draw the number of images of each class by split, the largest class first.

    Args:
        counts: Table with a row for each class and the columns train, val and test.
    """
    shown = counts.loc[counts.sum(axis=1).sort_values(ascending=False, kind="stable").index]
    if is_cut := len(shown) > MAX_CLASSES:
        half = MAX_CLASSES // 2
        shown = pd.concat([shown.head(half), shown.tail(half)])
    rows, left = np.arange(len(shown)), np.zeros(len(shown))
    with chart(1.0 + 0.24 * len(shown)) as drawn:
        axes = drawn.axes()
        for split, colour in SPLITS.items():
            axes.barh(rows, shown[split], 0.7, left, color=colour, label=split)
            left += shown[split].to_numpy()
        axes.set_yticks(rows, [shorten(str(name), NAME_WIDTH) for name in shown.index])
        axes.set(ylim=(len(rows) - 0.4, -0.6))
        axes.set(xlabel="images, of the largest and the smallest classes" if is_cut else "images")
        axes.grid(axis="y", visible=False)
        put_legend_above(axes)
    return drawn.svg
