"""The bundled sample: its script reproduces it byte for byte, and it is a valid data set."""

import runpy
from pathlib import Path

import numpy as np

from convoy.data.cache import CacheDir
from convoy.data.ingest import FetchConfig, ingest
from convoy.data.packed.packed_dataset import PackedDataset
from convoy.data.sources.base import DatasetConfig
from convoy.data.sources.folder import read_folder
from factories import EMPTY_LOCK, read_table
from small_project import ROOT

SAMPLES = ROOT / "samples"


def test_script_reproduces_the_sample_byte_for_byte(tmp_path: Path) -> None:
    make = runpy.run_path(str(SAMPLES / "make_digits.py"))["make"]
    make(tmp_path / "digits.zip")
    assert (tmp_path / "digits.zip").read_bytes() == (SAMPLES / "digits.zip").read_bytes()


def pack(folder: Path) -> PackedDataset:
    dataset = DatasetConfig(name="digits", longest_side=512, group=None)
    limits = FetchConfig(max_invalid_fraction=0.0)
    return ingest(
        read_folder(SAMPLES), dataset, limits, EMPTY_LOCK, folder, CacheDir(folder / "remembered" / "here", folder)
    ).packed


def test_sample_is_a_dataset_of_ten_digits(tmp_path: Path) -> None:
    digits = pack(tmp_path)
    assert digits.classes == list("0123456789")
    assert len(digits.table) == 1797
    assert {digits.read_image(row).shape for row in range(1797)} == {(8, 8, 1)}
    assert read_table(digits)["path"][0] == "samples/digits.zip:digits/0/0000.png"


def test_sample_has_the_17_grey_levels_of_its_source(tmp_path: Path) -> None:
    digits = pack(tmp_path)
    pixels = digits.pixels.read(0, int(digits.pixels.ends[-1]))
    assert len(np.unique(pixels)) == 17
    assert (pixels.min(), pixels.max()) == (0, 255)
