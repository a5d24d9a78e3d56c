"""Charts as SVG that take the colours of the page around them, in a light as in a dark theme."""

import contextlib
import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours of Okabe and Ito (2008), which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#8c959f"
# Placeholders for the colours of the page, and the CSS that replaces them.
INK, FAINT, LINE = "#24292f", "#6e7781", "#d0d7de"
THEME = {INK: "var(--ink)", FAINT: "var(--faint)", LINE: "var(--line)", BLUE: "var(--blue)"}
# Width of a chart in inches. It fits on a telephone, and two fit beside each other on a larger screen.
WIDTH = 4.8
# Characters in a line of a legend.
LEGEND_WIDTH = 64
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 9,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    # The text stays text: the page's font draws it, and readers can select and search it.
    "svg.fonttype": "none",
    # Without it, the ids in the file are random.
    "svg.hashsalt": "convoy",
    "text.color": INK,
    # A class may be named "$5".
    "text.parse_math": False,
    "xtick.color": LINE,
    "xtick.labelcolor": FAINT,
    "ytick.color": LINE,
    "ytick.labelcolor": FAINT,
}


class Chart:
    """A figure of matplotlib that becomes SVG when its `chart` block ends."""

    def __init__(self, figure: "Figure") -> None:
        self.figure = figure
        self.svg = ""

    def axes(self, *args: Any, **kwargs: Any) -> Any:
        """Return the axes of the figure, as `Figure.subplots` does."""
        return self.figure.subplots(*args, **kwargs)


@contextlib.contextmanager
def chart(height: float, width: float = WIDTH) -> Iterator[Chart]:
    """Create a figure in the page's style, independently of the user's settings of matplotlib.

    Args:
        height: Height in inches.
        width: Width in inches.

    Yields:
        The chart; its `svg` is set at the end of the block.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        drawn = Chart(Figure(figsize=(width, height), layout="constrained"))
        yield drawn
        written = io.StringIO()
        # Date and creator would make the bytes differ from run to run and from version to version.
        drawn.figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
        drawn.svg = _embed(written.getvalue())


def format_log_axis(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers, such as 200k, once everything is drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 100 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, position: format_number(value)))
    axis.set_minor_formatter(NullFormatter())


def format_number(value: float) -> str:
    """Format a number with three digits and k, M, G or T for its thousands."""
    power = min(4, max(0, math.floor(math.log10(value) / 3 + 1e-9))) if value > 0 else 0
    return f"{value / 1000**power:.3g}{' kMGT'[power].strip()}"


def put_legend_above(axes: Any) -> None:
    """Put the legend above the axes, where it hides no data, in as many lines as it needs."""
    labels = axes.get_legend_handles_labels()[1]
    # A handle is as wide as 7 characters.
    lines = -(-sum(len(label) + 7 for label in labels) // LEGEND_WIDTH)
    axes.legend(
        ncols=-(-len(labels) // lines),
        loc="lower left",
        bbox_to_anchor=(-0.02, 1),
        borderaxespad=0.2,
        columnspacing=1.2,
        handletextpad=0.5,
        handlelength=2.4,
    )


def label_points(axes: Any, points: Sequence[tuple[float, float]], labels: Sequence[str]) -> None:
    """Write a label beside each point, where it covers no other label.

    Args:
        axes: The axes, with their final limits.
        points: Positions in the units of the data.
        labels: Text of each label.
    """
    # The layout is not known yet, so that positions are those of axes as wide as the figure.
    scale = axes.figure.get_size_inches() * 72  # points
    taken: list[tuple[float, float, float]] = []
    for point, label in zip(points, labels, strict=True):
        x, y = axes.transAxes.inverted().transform(axes.transData.transform(point)) * scale * 0.8
        width = 5 * len(label)
        options = [(7, 4), (-7 - width, 4), (7, -11), (-7 - width, -11), (7, 15), (-7 - width, 15), (7, -22)]
        free = [
            (right, up)
            for right, up in options
            if all(
                abs(y + up - other_y) > 10 or x + right > other_x + other_width or x + right + width < other_x
                for other_x, other_y, other_width in taken
            )
        ]
        right, up = (free or options)[0]
        taken.append((x + right, y + up, width))
        axes.annotate(label, point, xytext=(right, up), textcoords="offset points")


def _embed(svg: str) -> str:
    """Return an SVG file as an element of an HTML page, with the colours and the font of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.DOTALL)
    # The names of groups are the same in every chart, and an id may occur only once in a page.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    # Without width and height, the chart is as wide as its column.
    svg = re.sub(r'<svg (.*?)width="[^"]*"', r"<svg \1", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(<svg .*?)height="[^"]*"', r"\1", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for placeholder, colour in THEME.items():
        svg = svg.replace(placeholder, colour)
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1).strip()
