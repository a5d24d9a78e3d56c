"""Fonts: class names are drawn in any script."""

import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from convoy.data.card import fonts
from convoy.data.card.fonts import DEFAULT_FAMILY, find_font_families, find_missing_characters
from convoy.reporting.report import draw_confusion

# a letter that matplotlib's default font lacks, and another of the fonts that it brings along has
CIRCLED = "\N{CIRCLED LATIN CAPITAL LETTER A}"
STIX = Path(matplotlib.get_data_path(), "fonts/ttf/STIXGeneral.ttf")
NOWHERE = "\U0010fffd"


@pytest.fixture
def font_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The font files of the system."""
    files: list[str] = []
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: files)
    fonts._find_families.cache_clear()
    return files


def draw(classes: list[str], file: Path) -> np.ndarray:
    table = pd.DataFrame({"actual": classes, "predicted": classes})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_confusion(table, classes, "title", file)
    return np.asarray(Image.open(file))


def test_default_font_is_enough_for_most_names(font_files: list[str]) -> None:
    assert find_font_families(["cat", "żółw", "кот", "$x$"]) == [DEFAULT_FAMILY]


def test_installed_font_is_used_for_letters_it_has(font_files: list[str], tmp_path: Path) -> None:
    boxes = draw([CIRCLED, "cat"], tmp_path / "boxes.png")
    font_files.append(str(STIX))
    fonts._find_families.cache_clear()
    assert find_font_families([CIRCLED]) == [DEFAULT_FAMILY, "STIXGeneral"]
    assert find_missing_characters([CIRCLED]) == set()
    letters = draw([CIRCLED, "cat"], tmp_path / "letters.png")
    assert boxes.shape != letters.shape or (boxes != letters).any()


def test_letters_without_a_font_are_named_once(
    font_files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw([CIRCLED, f"{CIRCLED}b"], tmp_path / "confusion.png")
    said = capsys.readouterr()
    assert said.out.count("no installed font has") == 1
    assert CIRCLED in said.out
    assert said.err == ""


def test_broken_font_files_are_passed_over(font_files: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "a-sans-regular.ttf"
    broken.write_bytes(b"no font")
    font_files += [str(broken), str(tmp_path / "gone.ttf"), str(STIX)]
    assert find_font_families([CIRCLED, NOWHERE]) == [DEFAULT_FAMILY, "STIXGeneral"]
    assert find_missing_characters([CIRCLED, NOWHERE]) == {NOWHERE}


def test_dollar_signs_in_names_are_no_formulas(font_files: list[str], tmp_path: Path) -> None:
    draw(["$\\frac{$", "a_$b$"], tmp_path / "confusion.png")
