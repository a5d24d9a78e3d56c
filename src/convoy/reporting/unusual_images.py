"""Picture of the images that are the most unlike those a model was trained on."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convoy.data.card.fonts import find_font_families
from convoy.data.image_io import as_image

COLUMNS, ROWS = 6, 4
MAX_TITLE_LENGTH = 18  # characters


def draw_unusual(
    names: Sequence[str], images: Sequence[np.ndarray], unusualness: np.ndarray, file: Path, title: str
) -> None:
    """Draw the most unusual of some images, each with the end of its name and how unusual it is.

    Args:
        names: Names of the N images.
        images: (H, W, 1 or 3) uint8 each.
        unusualness: (N,) distance to the training images, 1 being usual.
        file: Image file to write.
        title: Title of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = np.argsort(-unusualness, kind="stable")[: COLUMNS * ROWS]
    rows = -(-len(order) // COLUMNS)
    settings = {"font.family": find_font_families([names[row] for row in order]), "text.parse_math": False}
    with pyplot.style.context(["default", settings]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        # A line of text above the images takes as much as a quarter of them.
        figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(1.6 * COLUMNS, 2 * rows + 0.5), squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, row in zip(axes.flat, order, strict=False):
            axis.imshow(as_image(images[row]).convert("RGB"))
            name = names[row] if len(names[row]) <= MAX_TITLE_LENGTH else f"…{names[row][1 - MAX_TITLE_LENGTH :]}"
            axis.set_title(f"{name}\n{unusualness[row]:.1f} x usual", fontsize=8)
        figure.suptitle(title, fontsize=10)
        figure.tight_layout()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=100)
    pyplot.close(figure)
