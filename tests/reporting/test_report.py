"""Plots that compare the architectures: their axes are what their labels say."""

from pathlib import Path

import pandas as pd
import pytest
from matplotlib import pyplot

from convoy import models
from convoy.reporting.report import architecture_colour, draw_confusion


def test_rows_of_the_confusion_plot_are_the_actual_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    table = pd.DataFrame({"actual": ["cat", "cat", "dog"], "predicted": ["dog", "dog", "dog"]})
    draw_confusion(table, ["cat", "dog"], "title", tmp_path / "confusion.png")
    (axes, *_) = drawn[0].axes
    assert axes.images[0].get_array().tolist() == [[0, 2], [0, 1]]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("actual", "predicted")


def test_architecture_has_its_colour_in_every_selection() -> None:
    colours = {name: architecture_colour(name) for name in models.names()}
    assert len(set(colours.values())) == len(colours)
    assert architecture_colour("other_network") == architecture_colour("other_network") not in colours.values()
