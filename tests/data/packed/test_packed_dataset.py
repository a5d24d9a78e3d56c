"""The packed data set: its table is stored on disk and read in chunks."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from convoy.data.packed import packed_dataset
from convoy.data.packed.packed_dataset import ImageTable
from convoy.data.sources.file_listing import PackedPaths

COUNT = 100


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_dataset, "CHUNK_ROWS", 16)


def make_table() -> pd.DataFrame:
    labels = [f"class {number % 7}" for number in range(COUNT)]
    return pd.DataFrame({"path": [f"{number}.png" for number in range(COUNT)], "label": labels, "height": range(COUNT)})


def write_table(file: Path, step: int) -> ImageTable:
    """The images, so many rows at a time."""

    def tables() -> Iterator[pa.Table]:
        for start in range(0, COUNT, step):
            yield pa.Table.from_pandas(make_table()[start : start + step], preserve_index=False)

    ImageTable(file).write(tables())
    return ImageTable(file)


@pytest.mark.parametrize("step", [1, 15, 16, 17, 100])
def test_chunk_size_changes_neither_rows_nor_bytes(tmp_path: Path, step: int) -> None:
    rows = write_table(tmp_path / "one.parquet", step)
    assert rows.file.read_bytes() == write_table(tmp_path / "other.parquet", 7).file.read_bytes()
    assert len(rows) == COUNT
    pd.testing.assert_frame_equal(pd.read_parquet(rows.file), make_table())
    pd.testing.assert_frame_equal(pd.concat(rows.iter_chunks()), make_table(), check_index_type=False)


def test_single_chunk_table_has_the_bytes_that_pandas_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_dataset, "CHUNK_ROWS", COUNT)
    make_table().to_parquet(tmp_path / "pandas.parquet", index=False)
    assert write_table(tmp_path / "rows.parquet", 9).file.read_bytes() == (tmp_path / "pandas.parquet").read_bytes()


@pytest.mark.parametrize("chosen", [[], [0], [15, 16, 99], list(range(COUNT))])
def test_rows_are_read_by_index(tmp_path: Path, chosen: list[int]) -> None:
    rows = write_table(tmp_path / "images.parquet", 10)
    assert rows.read_rows(np.array(chosen, int)).index.tolist() == chosen
    assert rows.read_rows(np.array(chosen, int))["height"].tolist() == chosen
    rows.drop_rows(np.array(chosen, int))
    assert rows.read_columns("height")["height"].tolist() == sorted(set(range(COUNT)) - set(chosen))


def test_repeated_values_share_categories_across_chunks(tmp_path: Path) -> None:
    labels = write_table(tmp_path / "images.parquet", 10).read_columns("label")["label"]
    assert labels.dtype == "category"
    assert labels.astype(str).tolist() == make_table()["label"].tolist()


def test_paths_round_trip_even_if_not_utf8() -> None:
    names = ["cat/1.png", "", "caf\udce9/1.png", "\ud800", "\u732b/\0.png"]
    paths = PackedPaths(names)
    assert list(paths) == list(paths) == names
