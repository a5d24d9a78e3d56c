"""The log of predictions: complete after a kill, bounded in age, and harmless where it can't be written."""

import hashlib
import os
import time
from pathlib import Path

import pytest
from pyarrow import parquet

from convoy.core.errors import ConvoyError
from convoy.data.sources import parquet as parquet_source
from convoy.serving import request_log
from convoy.serving.request_log import LogEntry, RequestLog
from serving_fixtures import draw


def open_log(folder: Path, *, keep_images: bool = False, days: int = 30) -> RequestLog:
    return RequestLog(folder, days, keep_images=keep_images)


def read_rows(folder: Path) -> list[dict]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in parquet.read_table(file).to_pylist()]


def test_log_holds_what_was_predicted(tmp_path: Path) -> None:
    log = open_log(tmp_path / "log")
    log.add([LogEntry(draw("cat"), "cat", 0.9, "3"), LogEntry(draw("dog"), "dog", 0.8, "3")])
    log.write()
    log.add([LogEntry(draw("fox"), "fox", 0.7, "4")])
    log.close()
    rows = read_rows(tmp_path / "log")
    assert [(row["label"], row["probability"], row["version"]) for row in rows] == [
        ("cat", 0.9, "3"),
        ("dog", 0.8, "3"),
        ("fox", 0.7, "4"),
    ]
    assert rows[0]["sha256"] == hashlib.sha256(draw("cat")).hexdigest()
    assert abs(rows[0]["time"].timestamp() - time.time()) < 60
    assert [file.suffix for file in (tmp_path / "log").iterdir()] == [".parquet"]


def test_logged_images_can_be_a_data_source(tmp_path: Path) -> None:
    log = open_log(tmp_path, keep_images=True)
    log.add([LogEntry(draw("cat"), "cat", 0.9, "3")])
    log.close()
    (file,) = tmp_path.iterdir()
    table = parquet_source.open_parquet(file.name, str(file), "train")
    assert parquet_source.find_image_column(table) == "image"
    assert parquet_source.find_label_column(table) == "label"
    assert read_rows(tmp_path)[0]["image"] == draw("cat")


def test_log_of_a_killed_server_is_completed_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "20261130T100000-1.jsonl").write_text(
        '{"time": 1.5, "sha256": "a", "label": "cat", "probability": 0.9, "version": "3"}\n{"time": 2.5, "sha'
    )
    open_log(tmp_path)
    assert [row["label"] for row in read_rows(tmp_path)] == ["cat"]


def test_another_server_with_the_same_folder_is_left_alone(tmp_path: Path) -> None:
    first = open_log(tmp_path)
    first.add([LogEntry(draw("cat"), "cat", 0.9, "3")])
    first.write()
    open_log(tmp_path)
    assert read_rows(tmp_path) == []
    first.close()
    assert len(read_rows(tmp_path)) == 1


def test_old_files_are_removed(tmp_path: Path) -> None:
    for name, days in (("old", 8), ("new", 6)):
        log = open_log(tmp_path)
        log.add([LogEntry(draw("cat"), name, 0.9, "3")])
        log.close()
        (file,) = set(tmp_path.glob("*.parquet")) - {tmp_path / "old.parquet"}
        file = file.rename(tmp_path / f"{name}.parquet")
        os.utime(file, (time.time() - days * 86_400,) * 2)
    open_log(tmp_path, days=7)
    assert [file.name for file in tmp_path.iterdir()] == ["new.parquet"]


def test_full_disk_loses_nothing_that_fits_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(tmp_path)
    log.add([LogEntry(draw("cat"), "cat", 0.9, "3")])

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RequestLog, "_append", fail)
        log.write()
        log.write()
    monkeypatch.setattr(request_log, "MAX_WAITING_BYTES", 0)
    assert log.add([LogEntry(draw("dog"), "dog", 0.9, "3")]) == 1
    log.close()
    assert [row["label"] for row in read_rows(tmp_path)] == ["cat"]


def test_half_a_line_on_a_full_disk_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(tmp_path)
    log.add([LogEntry(draw("cat"), "cat", 0.9, "3")])
    log.write()
    assert log._text
    truly, is_full = log._text.write, False

    def write_half(line: memoryview) -> int:
        nonlocal is_full
        if is_full:
            raise OSError(28, "No space left on device")
        is_full = True
        return truly(line[: len(line) // 2])

    log.add([LogEntry(draw("dog"), "dog", 0.9, "3")])
    with monkeypatch.context() as patch:
        patch.setattr(log._text, "write", write_half)
        log.write()
    log.close()
    assert [row["label"] for row in read_rows(tmp_path)] == ["cat", "dog"]


def test_folder_that_cant_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file")
    with pytest.raises(ConvoyError, match=r"log: can't write a log there \(.*File exists"):
        open_log(tmp_path / "log")
