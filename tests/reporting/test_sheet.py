"""Sheets: each image has its caption, and one that can't be drawn fails nothing."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convoy.reporting.figures import Figure, Tile, encode_image, encode_strip
from convoy.reporting.sheet import COLUMNS, TILE_SIDE, save_sheet


def make_tile(grey: int) -> Tile:
    pixels = np.full((8, 8, 1), grey, np.uint8)
    return Tile(encode_image(pixels), ("a $label$",), "an image", "folder/name.png")


def test_sheet_has_all_images_in_rows(tmp_path: Path) -> None:
    greys = [10 + 20 * number for number in range(COLUMNS + 1)]
    save_sheet(Figure("Some images", tiles=[make_tile(grey) for grey in greys]), "lenet", tmp_path)
    with Image.open(tmp_path / "some_images.png") as sheet:
        pixels = np.asarray(sheet.convert("L"))
    assert pixels.shape[1] > COLUMNS * TILE_SIDE
    for grey in greys:
        assert (pixels == grey).sum() >= TILE_SIDE**2


def test_strips_are_as_wide_as_they_are(tmp_path: Path) -> None:
    strip = encode_strip(np.zeros((12, 4, 4)), side=64, columns=12, colours="gray")
    save_sheet(Figure("Maps", tiles=[Tile(strip, ("maps",), "maps", is_wide=True)]), "lenet", tmp_path)
    with Image.open(tmp_path / "maps.png") as sheet:
        assert sheet.width > 12 * 64


def test_sheet_that_fails_leaves_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sheet(Figure("Broken", tiles=[Tile("data:image/png;base64,AAAA", (), "")]), "lenet", tmp_path)
    assert "report: lenet/broken.png could not be drawn" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
