"""The sections of a report that compare the architectures."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from convoy.reporting import comparison_charts
from convoy.reporting.evaluated_images import Images
from convoy.reporting.figures import Figure, Tile, draw_safely, encode_image, make_chart
from convoy.reporting.model_section import ModelResults, Section, show_label_errors
from convoy.training.record import DatasetVersion

MAX_DISPUTED = 24  # images


@dataclasses.dataclass(frozen=True)
class DataSummary:
    """The data set that all architectures were trained on."""

    version: DatasetVersion
    classes: list[str]
    sizes: Sequence[int]  # height and width of the images that the networks see, in pixels, ascending
    channels: int  # 1 grey or 3 RGB
    counts: pd.DataFrame  # a row for each class; images of the splits train, val and test
    samples: Sequence[tuple[np.ndarray, str]]  # pixels and label of training images


def describe_data(data: DataSummary) -> Section:
    """Draw what the architectures were trained on."""
    totals = {split: int(data.counts[split].sum()) for split in ("train", "val", "test")}
    sizes = " or ".join(f"{size}x{size}" for size in data.sizes)
    colours = "grey" if data.channels == 1 else "colour"
    intro = (
        f"{data.version.name}, version {data.version.digest}: {sum(totals.values()):,} images of {len(data.classes)} "
        f"classes; {totals['train']:,} for training, {totals['val']:,} to choose the epoch and the architecture, and "
        f"{totals['test']:,} to test, which no training has used. The networks see {sizes} pixels in {colours}."
    )
    largest, smallest = data.counts.sum(axis=1).idxmax(), data.counts.sum(axis=1).idxmin()

    def draw_counts() -> Figure:
        return make_chart(
            "Images of each class",
            comparison_charts.draw_class_counts(data.counts),
            f"Number of images of each class by split; the most are of {largest}, the fewest of {smallest}.",
        )

    def show_samples() -> Figure:
        tiles = [Tile(encode_image(pixels), (label,), f"Training image of {label}") for pixels, label in data.samples]
        return Figure("Training images", tiles=tiles)

    figures = [draw_safely("Images of each class", draw_counts), draw_safely("Training images", show_samples)]
    return Section("data", "What was trained on what", figures, intro, "Data")


def describe_results(leaderboard: pd.DataFrame) -> Section:
    """Draw how good the architectures are, and at what cost.

    Args:
        leaderboard: Table with the columns model, val_accuracy, test_accuracy, low, high, parameters and macs, best in
            validation first; without failed training runs.
    """
    best = leaderboard.iloc[int(leaderboard["test_accuracy"].argmax())]

    def draw_accuracies() -> Figure:
        return make_chart(
            "Accuracy with interval",
            comparison_charts.draw_accuracies(leaderboard),
            f"Test accuracy of {len(leaderboard)} architectures with 95% intervals; the highest is "
            f"{best['test_accuracy']:.4f}, of {best['model']}.",
            "Where intervals overlap, the test images hardly tell the architectures apart.",
            is_wide=True,
        )

    figures = [
        draw_safely("Accuracy with interval", draw_accuracies),
        _draw_cost(leaderboard, "Accuracy against size", "parameters", "parameters"),
        _draw_cost(leaderboard, "Accuracy against computation", "macs", "multiply-accumulate operations for one image"),
    ]
    return Section("results", "Accuracy and cost", figures, short_title="Accuracy and cost")


def describe_latencies(table: pd.DataFrame) -> list[Figure]:
    """Draw the accuracy of the architectures against the latencies that were measured on this machine.

    Args:
        table: Table with the columns model, test_accuracy, low, high, image_ms_median, image_ms_p95 and hardware.
    """
    title = "Accuracy against latency"
    if not len(table):
        return [Figure(title, note="The latencies of these networks were not measured yet: `convoy run` does it.")]
    shown = pd.DataFrame(
        {
            "architecture": table["model"],
            "median ms": table["image_ms_median"],
            "p95 ms": table["image_ms_p95"],
        }
    )
    note = f"Measured in turn on {', '.join(table['hardware'].unique())}, one image in each call."
    return [
        _draw_cost(table, title, "image_ms_median", "milliseconds for one image (median)"),
        Figure("Latency of one image", note=note, table=shown, digits=2),
    ]


def _draw_cost(table: pd.DataFrame, title: str, cost: str, label: str) -> Figure:
    """Draw accuracy against a cost, with the frontier."""

    def draw() -> Figure:
        at = comparison_charts.find_frontier(table[cost].tolist(), table["test_accuracy"].tolist())
        names = ", ".join(table["model"].iloc[at])
        return make_chart(
            title,
            comparison_charts.draw_frontier(table, cost, label),
            f"Test accuracy against {label}; on the frontier: {names}.",
            "No architecture on the dashed line is surpassed by one that costs less.",
        )

    return draw_safely(title, draw)


def describe_curves(results: Sequence[ModelResults]) -> Section:
    """Draw the curves of all architectures over each other."""
    histories = {result.name: result.history for result in results}

    def draw(metric: str, label: str, is_log: bool) -> Figure:
        best = {name: history[metric].min() if is_log else history[metric].max() for name, history in histories.items()}
        values = ", ".join(f"{name} {value:.4f}" for name, value in best.items())
        title = label.capitalize()
        svg = comparison_charts.draw_curves(histories, metric, label, is_log=is_log)
        return make_chart(title, svg, f"{title} by epoch. At best: {values}.")

    accuracy, loss = "accuracy in validation", "loss in validation"
    figures = [
        draw_safely(accuracy.capitalize(), lambda: draw("val_accuracy", accuracy, False)),
        draw_safely(loss.capitalize(), lambda: draw("val_loss", loss, True)),
    ]
    return Section("curves", "Learning curves", figures, short_title="Curves")


def describe_disagreement(results: Sequence[ModelResults]) -> Section:
    """Draw where the architectures disagree, and which images all of them get wrong."""
    first = results[0]
    predicted = np.stack([result.test.predicted for result in results])  # (M, N)
    correct = np.stack([result.test.is_correct for result in results])  # (M, N)
    right = correct.sum(axis=0)
    disputed = (predicted != predicted[0]).any(axis=0)
    intro = (
        f"All architectures are correct on {int((right == len(results)).sum()):,} of {len(right):,} test images, and "
        f"none is on {int((right == 0).sum()):,}. They disagree on {int(disputed.sum()):,}."
    )

    def draw_agreement() -> Figure:
        table = pd.DataFrame({result.name: result.test.predicted for result in results})
        return make_chart(
            "Agreement by pair",
            comparison_charts.draw_agreement(table),
            "Fraction of test images for which each pair of architectures predicts the same class.",
        )

    def draw_classes() -> Figure:
        tested = first.per_class["images"] > 0
        f1 = pd.DataFrame({result.name: result.per_class[tested].set_index("class")["f1"] for result in results})
        hardest = f1.mean(axis=1).idxmin()
        shown = min(len(f1), comparison_charts.MAX_CLASSES)
        note = "" if shown == len(f1) else f"The {shown} hardest of {len(f1)} classes."
        return make_chart(
            "F1 by class",
            comparison_charts.draw_classes(f1),
            f"F1 of each class by architecture; the hardest class is {hardest}.",
            note,
        )

    def show_disputed() -> Figure:
        # The fewer are correct, the sooner; then the more confident the others are.
        wrong = np.sum([result.test.confidence * ~each for result, each in zip(results, correct, strict=True)], axis=0)
        rows = np.flatnonzero(disputed | (right == 0))
        rows = rows[np.lexsort((rows, -wrong[rows], right[rows]))][:MAX_DISPUTED]
        tiles = []
        for row in rows:
            by_class: dict[int, list[str]] = {}
            for result in results:
                by_class.setdefault(int(result.test.predicted[row]), []).append(result.name)
            actual = first.classes[first.test.labels[row]]
            lines = [f"actually {actual}"]
            lines += [f"{first.classes[code]}: {', '.join(names)}" for code, names in by_class.items()]
            alt = f"Image of {actual}, on which the architectures disagree"
            tiles.append(Tile(encode_image(first.test.pixels[row]), tuple(lines), alt, first.test.paths[row]))
        total = int((disputed | (right == 0)).sum())
        note = f"{len(tiles)} of {total} images; those that the fewest architectures get right come first."
        return Figure("Images on which the architectures disagree", note=note, tiles=tiles, is_wide=True)

    draws: dict[str, Callable[[], Figure]] = {
        "F1 by class": draw_classes,
        "Agreement by pair": draw_agreement,
        "Images on which the architectures disagree": show_disputed,
        "Probable label errors": lambda: show_label_errors(
            first.classes,
            average_held_out(results),
            "the mean probabilities of all architectures and confident learning",
        ),
    }
    if len(results) == 2:
        # The introduction says how often they disagree.
        del draws["Agreement by pair"]
    if len(results) == 1:
        draws = {title: draws[title] for title in ("F1 by class", "Probable label errors")}
        title, intro = "Hard classes and images", ""
    else:
        title = "Where the architectures disagree"
    figures = [draw_safely(name, draw) for name, draw in draws.items()]
    return Section("disagreement", title, figures, intro, "Disagreement" if len(results) > 1 else "Classes")


def average_held_out(results: Sequence[ModelResults]) -> dict[str, Images]:
    """Return the held-out images by their split, with the mean probabilities of all architectures."""
    return {
        split: dataclasses.replace(
            images, probabilities=np.mean([result.held_out[split].probabilities for result in results], axis=0)
        )
        for split, images in results[0].held_out.items()
    }
