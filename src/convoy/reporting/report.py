"""Tables and plots that compare the architectures."""

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from convoy.data.card.fonts import find_font_families, find_missing_characters
from convoy.training.record import TrainingRecord

# The gate's statistics are slow to import, and are not needed to print a table.
if TYPE_CHECKING:
    from convoy.promotion.gate import Verdict

# A plot of more classes does not show their names.
MAX_NAMED_CLASSES = 100  # classes
COLOURS = ("#0072b2", "#e69f00", "#009e73")
# Colours of Okabe and Ito (2008), which colour-blind readers can tell apart. An architecture keeps its colour for ever.
ARCHITECTURE_COLOURS = {
    "lenet": "#e69f00",
    "alexnet": "#56b4e9",
    "vgg": "#009e73",
    "googlenet": "#d55e00",
    "resnet": "#0072b2",
}
# Colours of other architectures, by the hash of their name.
OTHER_COLOURS = ("#cc79a7", "#882255", "#999933", "#332288", "#aa4499", "#661100")


def architecture_colour(name: str) -> str:
    """Return the colour of an architecture, which depends on nothing but its name."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    return ARCHITECTURE_COLOURS.get(name, OTHER_COLOURS[number % len(OTHER_COLOURS)])


def leaderboard(
    records: Mapping[str, TrainingRecord],
    validation: Mapping[str, Mapping[str, float]],
    metrics: Mapping[str, Mapping[str, float]],
) -> pd.DataFrame:
    """Make a table with one row for each architecture: its best epoch, test metrics and size.

    Rows are in the order of `records`. For a failed training only the name and the size are known.

    Args:
        records: Training record of each architecture.
        validation: Metrics on the validation images, for each architecture whose training did not fail.
        metrics: Test metrics of each architecture.

    Returns:
        A table with the columns model, val_<metric> for each validation metric, epoch, test_<metric> for each test
        metric, and parameters.
    """
    columns = next(iter(validation.values()), ("accuracy", "loss"))
    rows = [
        {
            "model": name,
            **{f"val_{metric}": validation.get(name, {}).get(metric) for metric in columns},
            "epoch": record.best.epoch if record.best else None,
            **{f"test_{figure}": value for figure, value in metrics[name].items()},
            "parameters": record.parameters,
        }
        for name, record in records.items()
    ]
    return pd.DataFrame(rows).astype({"epoch": "Int64"})


# The columns of the leaderboard that fit on a terminal.
TERMINAL_COLUMNS = ["model", "val_accuracy", "val_loss", "epoch", "test_accuracy", "test_macro_f1", "test_log_loss",
         "test_calibration_error", "parameters"]  # fmt: skip


def print_table(table: pd.DataFrame, title: str) -> None:
    """Print a table on the terminal, with four decimal places for floats.

    Args:
        table: Table to print. Missing values are shown as "failed".
        title: Title above it.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for column, values in table.items():
        numeric = pd.api.types.is_numeric_dtype(values)
        shown.add_column(str(column).replace("_", "\n", 2), justify="right" if numeric else "left", overflow="fold")
    for row in table.itertuples(index=False):
        shown.add_row(*map(escape, map(_format_cell, row)))
    console = Console()
    # A log file has no width of its own.
    Console(width=max(console.width, 100)).print(shown)


def _format_cell(value: object) -> str:
    if pd.isna(value):  # type: ignore[call-overload]
        return "failed"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def draw_confusion(predictions: pd.DataFrame, classes: list[str], title: str, file: Path) -> None:
    """Plot the confusion matrix of actual against predicted classes.

    Args:
        predictions: Table with the columns actual and predicted, both names of classes.
        classes: Names of all classes, in the order of the axes.
        title: Title of the plot.
        file: Image file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from sklearn.metrics import ConfusionMatrixDisplay

    named = len(classes) <= MAX_NAMED_CLASSES
    # An inch is 100 pixels: see `dpi` below.
    side = max(5.0, 0.45 * len(classes)) if named else 12.0  # inches
    if missing := find_missing_characters(classes):
        letters = " ".join(sorted(missing)[:10])
        print(f"{file.name} shows boxes for letters that no installed font has ({letters}): install one, such as Noto")
    # The plot is part of an output, so it must not depend on the user's own settings of matplotlib.
    settings = {"font.family": find_font_families(classes), "text.parse_math": False}
    with pyplot.style.context(["default", settings]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure, axes = pyplot.subplots(figsize=(side + 1, side))
        ConfusionMatrixDisplay.from_predictions(
            predictions["actual"],
            predictions["predicted"],
            labels=classes,
            ax=axes,
            cmap="Blues",
            xticks_rotation="vertical",
            include_values=len(classes) <= 30,
        )
        axes.set(title=title, xlabel="predicted", ylabel="actual")
        if not named:
            axes.set(xticks=[], yticks=[])
        figure.savefig(file, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def describe_verdict(verdict: "Verdict", name: str, version: int, compared: int | None, reason: str) -> str:
    """Format the verdict on a version of the model as Markdown.

    Args:
        verdict: Verdict of the gate.
        name: Name of the registered model.
        version: Version that was evaluated.
        compared: Version of the champion it was compared with, or None if there never was a champion.
        reason: Why this architecture was compared.
    """
    against = f"the champion, version {compared}" if compared else "no champion, as there never was one"
    title = f"# {verdict.decision}: {name}, version {version}, beside {against}"
    return "\n\n".join([title, verdict.summary(), f"{reason}.", verdict.table().to_markdown(index=False)]) + "\n"


def draw_lr_curve(table: pd.DataFrame, guess: float, name: str, file: Path) -> None:
    """Plot the loss against the learning rate, and mark where it falls fastest and where it is lowest.

    Args:
        table: Table with the columns lr and loss.
        guess: Learning rate at which the loss falls fastest.
        name: Title of the plot.
        file: Image file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(table["lr"], table["loss"], color=COLOURS[0])
    lowest = float(table["lr"].to_numpy()[table["loss"].argmin()])
    for rate, what, colour in ((guess, "falls fastest", COLOURS[1]), (lowest, "is lowest", COLOURS[2])):
        axes.axvline(rate, color=colour, linestyle="--", label=f"{what} at {rate:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss, smoothed", title=name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
