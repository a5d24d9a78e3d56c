"""Full disks: recognized in the errors of every library, and reported with the folder."""

import errno
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import sqlalchemy
from mlflow.exceptions import MlflowException

from convoy.core import disk
from convoy.core.errors import ConvoyError
from convoy.tracking import database
from convoy.tracking import store as tracking

FULL = OSError(errno.ENOSPC, "No space left on device")


def raise_by_sqlite() -> None:
    with sqlite3.connect(":memory:") as opened:
        opened.execute("pragma max_page_count = 2")
        for number in range(9):
            opened.execute(f"create table t{number} (content)")


def raise_by_mlflow() -> None:
    engine = sqlalchemy.create_engine("sqlite://")
    try:
        with engine.connect() as opened:
            opened.exec_driver_sql("pragma max_page_count = 2")
            for number in range(9):
                opened.exec_driver_sql(f"create table t{number} (content)")
    except sqlalchemy.exc.OperationalError as error:
        raise MlflowException(error) from error


def raise_while_copying() -> None:
    raise shutil.Error([("from", "to", "[Errno 28] No space left on device: 'to'")])


def raise_by_torch() -> None:
    try:
        raise FULL
    except OSError:
        raise RuntimeError("unexpected pos 576 vs 470")  # noqa: B904 (as torch does)


def raise_by_rust() -> None:
    raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")


def raise_beyond_a_quota() -> None:
    raise OSError(errno.EDQUOT, "Disk quota exceeded")


def catch(raises: Callable[[], None]) -> BaseException:
    with pytest.raises(Exception) as found:
        raises()
    return found.value


@pytest.mark.parametrize(
    "raises",
    [raise_by_sqlite, raise_by_mlflow, raise_while_copying, raise_by_torch, raise_by_rust, raise_beyond_a_quota],
)
def test_full_disk_is_recognized_in_errors_of_every_library(raises: Callable[[], None], tmp_path: Path) -> None:
    said = disk.explain_full_disk(catch(raises), tmp_path, "go on")
    assert said
    assert said.startswith("the disk is full: make room and go on; what was there is untouched (")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), RuntimeError("full"), KeyError("disk")])
def test_another_error_is_no_full_disk(error: Exception, tmp_path: Path) -> None:
    assert disk.explain_full_disk(error, tmp_path) is None


def test_unclear_error_counts_where_no_room_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    assert disk.explain_full_disk(error, tmp_path) is None
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert disk.explain_full_disk(error, tmp_path)


# Which one it is


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder for temporary files, on another file system than the project."""
    folder = Path("/dev/shm")
    if not folder.is_dir() or folder.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system here")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_folder_for_temporary_files_is_named_with_tmpdir(small_disk: Path, tmp_path: Path) -> None:
    said = disk.explain_full_disk(OSError(errno.ENOSPC, "No space", str(small_disk / "tmp7" / "model")), tmp_path)
    assert said
    assert f"({small_disk} has " in said
    assert f"{small_disk} is for temporary files: set TMPDIR to a folder on a larger disk" in said


def test_target_of_a_copy_is_the_full_one(small_disk: Path, tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space", str(small_disk / "source"), None, str(tmp_path / "target"))
    for each in (
        error,
        shutil.Error([(str(small_disk / "source"), str(tmp_path / "target"), "No space left on device")]),
    ):
        said = disk.explain_full_disk(each, tmp_path)
        assert said
        assert f"({tmp_path} has " in said
        assert "TMPDIR" not in said


@pytest.mark.parametrize("fuller", ["project", "small"])
def test_every_file_system_is_listed_if_no_file_is_named(
    fuller: str, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    free = {tmp_path: 5_000_000, small_disk: 70_000_000_000}
    if fuller == "small":
        free = {tmp_path: 72_000_000_000, small_disk: 20_000_000}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free[folder]))
    said = disk.explain_full_disk(FULL, tmp_path)
    assert said
    sizes = "5.0 MB", "70.0 GB"
    if fuller == "small":
        sizes = "72.0 GB", "20.0 MB"
    assert f"({tmp_path} has {sizes[0]} free, {small_disk} has {sizes[1]} free)" in said
    assert ("set TMPDIR" in said) == (fuller == "small")


# The store


def open_project_store(root: Path) -> AbstractContextManager[tracking.TrackingStore]:
    return tracking.open_store(root, "convoy")


def test_disk_that_fills_up_leaves_no_database_behind(
    tmp_path: Path, embedded_store: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up(file: Path) -> None:
        file.write_bytes(b"half")
        raise_by_mlflow()

    monkeypatch.setattr(database, "_migrate", fill_up)
    with (
        pytest.raises(ConvoyError, match=r"^the disk is full: make room and run this again"),
        open_project_store(tmp_path),
    ):
        pass
    assert not list(tmp_path.glob("mlflow.db*"))


@pytest.mark.parametrize("raises", [raise_by_sqlite, raise_by_mlflow, raise_while_copying, raise_by_torch])
def test_full_disk_is_no_damaged_database(
    raises: Callable[[], None], tmp_path: Path, empty_database: Path, embedded_store: None
) -> None:
    shutil.copy(empty_database, tmp_path)
    with (
        pytest.raises(ConvoyError, match=r"^the disk is full: make room and run this again"),
        open_project_store(tmp_path),
    ):
        raises()


def test_failing_disk_is_no_damaged_database(tmp_path: Path, empty_database: Path, embedded_store: None) -> None:
    shutil.copy(empty_database, tmp_path)
    with (
        pytest.raises(ConvoyError, match=r"The disk that mlflow.db is on is full or fails") as found,
        open_project_store(tmp_path),
    ):
        raise sqlite3.OperationalError("disk I/O error")
    assert "away" not in str(found.value)


def test_full_disk_of_a_server_is_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(tracking, "_client", raise_by_mlflow)
    with (
        pytest.raises(ConvoyError, match=r"MLflow at http://127.0.0.1:9 fails: .*disk is full"),
        open_project_store(tmp_path),
    ):
        pass
