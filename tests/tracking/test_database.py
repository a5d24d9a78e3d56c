"""The embedded database: its creation and upgrades are complete or leave nothing behind."""

import contextlib
import logging
import os
import shutil
import sqlite3
from pathlib import Path

import mlflow
import pytest
import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from mlflow import MlflowClient
from mlflow.store.tracking.dbmodels.initial_models import Base

from convoy.core.errors import ConvoyError
from convoy.tracking import database
from convoy.tracking.store import open_store

SCRIPTS = Path(mlflow.__file__).parent / "store" / "db_migrations"
VERSIONS = [script.revision for script in ScriptDirectory(str(SCRIPTS)).walk_revisions()][::-1]


@pytest.fixture(autouse=True)
def quiet_loggers(embedded_store: None) -> None:
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


@pytest.fixture(scope="module")
def old_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as an older MLflow left it, six versions of its schema ago."""
    file = tmp_path_factory.mktemp("older") / "mlflow.db"
    engine = sqlalchemy.create_engine(f"sqlite:///{file}", poolclass=sqlalchemy.NullPool)
    Base.metadata.create_all(engine)
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, VERSIONS[-7])
    return file


def test_newest_version_is_found_without_importing_migrations() -> None:
    assert database._head() == VERSIONS[-1]


def execute(file: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(file)) as opened, opened:
        for statement in statements:
            opened.execute(statement)


def add_run(file: Path, artifacts: Path) -> None:
    execute(
        file,
        "insert into experiments (experiment_id, name, artifact_location, lifecycle_stage) "
        f"values (1, 'theirs', '{artifacts.as_uri()}', 'active')",
        "insert into runs (run_uuid, name, experiment_id, status, lifecycle_stage, artifact_uri, start_time, user_id, "
        "source_type, source_name, entry_point_name, source_version) "
        f"values ('{'7' * 32}', 'precious', 1, 'FINISHED', 'active', '{artifacts.as_uri()}/7', 1, '', 'LOCAL', '', "
        "'', '')",
    )


def list_runs(file: Path) -> list[str]:
    return [run.info.run_name for run in MlflowClient(f"sqlite:///{file}").search_runs(["1"])]


def read_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def read_version(file: Path) -> str:
    with contextlib.closing(sqlite3.connect(file)) as opened:
        return opened.execute("select version_num from alembic_version").fetchone()[0]


# Creation


def test_complete_database_is_not_touched(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(empty_database, tmp_path)
    before = read_files(tmp_path)
    monkeypatch.setattr(database, "_migrate", lambda _: pytest.fail("nothing is to be done"))
    database.prepare(tmp_path / "mlflow.db")
    assert read_files(tmp_path) == before


def test_empty_file_is_replaced_by_a_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    database.prepare(tmp_path / "mlflow.db")
    assert read_version(tmp_path / "mlflow.db") == VERSIONS[-1]
    assert list(read_files(tmp_path)) == ["mlflow.db"]


def create_partially(statements: int, file: Path) -> None:
    """A database whose creation by MLflow itself was stopped."""
    engine = sqlalchemy.create_engine(f"sqlite:///{file}", poolclass=sqlalchemy.NullPool)

    @sqlalchemy.event.listens_for(engine, "before_cursor_execute")
    def stop(_: object, __: object, statement: str, *___: object) -> None:
        nonlocal statements
        statements -= not statement.startswith(("PRAGMA", "SELECT"))
        if statements < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mlflow.store.db.utils._initialize_tables(engine)
    engine.dispose()


@pytest.mark.parametrize("statements", [1, 4, 6, 40, 150])
def test_incomplete_database_without_runs_is_replaced(
    statements: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_partially(statements, tmp_path / "mlflow.db")
    with open_store(tmp_path, "convoy") as store:
        assert store.experiment.name == "convoy"
    assert "was incomplete, because its creation was interrupted, and held no runs: it was moved to mlflow.db.inc" in (
        capsys.readouterr().out
    )
    assert len(list(tmp_path.glob("mlflow.db.incomplete-*"))) == 1


def test_link_to_a_database_stays_a_link(tmp_path: Path) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project, elsewhere):
        folder.mkdir()
    (project / "mlflow.db").symlink_to(elsewhere / "runs.db")
    database.prepare(project / "mlflow.db")
    assert (project / "mlflow.db").is_symlink()
    assert read_version(elsewhere / "runs.db") == VERSIONS[-1]
    assert list(read_files(elsewhere)) == ["runs.db"]


def test_journal_of_a_removed_database_is_not_applied(tmp_path: Path, empty_database: Path) -> None:
    file = tmp_path / "mlflow.db"
    shutil.copy(empty_database, file)
    child = os.fork()
    if not child:  # killed in a transaction
        opened = sqlite3.connect(file)
        opened.execute("pragma cache_spill = 1")
        opened.execute("pragma cache_size = 1")
        opened.execute("create table large (content)")
        for _ in range(50):
            opened.execute("insert into large values (randomblob(100000))")
        os._exit(0)
    os.waitpid(child, 0)
    assert file.with_name("mlflow.db-journal").stat().st_size
    file.unlink()
    database.prepare(file)
    assert list(read_files(tmp_path)) == ["mlflow.db"]
    with contextlib.closing(sqlite3.connect(file)) as opened:
        assert opened.execute("pragma integrity_check").fetchall() == [("ok",)]
    assert read_version(file) == VERSIONS[-1]


# Databases of others


def test_database_of_another_program_is_left_as_it_is(tmp_path: Path) -> None:
    execute(tmp_path / "mlflow.db", "create table addresses (name text)", "insert into addresses values ('somebody')")
    before = read_files(tmp_path)
    with (
        pytest.raises(ConvoyError, match=r"mlflow.db is a database, but not MLflow's \(its tables are addresses\)"),
        open_store(tmp_path, "convoy"),
    ):
        pass
    assert read_files(tmp_path) == before


@pytest.mark.parametrize("age", ["current", "older"])
def test_database_of_another_project_is_left_as_it_is(
    age: str, tmp_path: Path, empty_database: Path, old_database: Path
) -> None:
    shutil.copy(empty_database if age == "current" else old_database, tmp_path)
    add_run(tmp_path / "mlflow.db", tmp_path.with_name("other") / "mlruns/1")
    before = read_files(tmp_path)
    with (
        pytest.raises(ConvoyError, match=r"mlflow.db belongs to another project, with its files in .*/other/mlruns/1"),
        open_store(tmp_path, "convoy"),
    ):
        pass
    assert read_files(tmp_path) == before


def test_runs_made_by_hand_in_this_folder_stay_beside_ours(tmp_path: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, tmp_path)
    add_run(tmp_path / "mlflow.db", tmp_path / "mlruns/1")
    with open_store(tmp_path, "convoy") as store:
        assert store.experiment.name == "convoy"
    assert list_runs(tmp_path / "mlflow.db") == ["precious"]


def test_database_of_a_newer_mlflow_is_left_as_it_is(tmp_path: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, tmp_path)
    execute(tmp_path / "mlflow.db", "update alembic_version set version_num = 'f00dfeedf00d'")
    before = read_files(tmp_path)
    with pytest.raises(ConvoyError, match=r"is of a newer MLflow than .* \(its schema is f00dfeedf00d\)"):
        database.prepare(tmp_path / "mlflow.db")
    assert read_files(tmp_path) == before


# Upgrades


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_database_of_an_older_mlflow_is_upgraded_as_a_copy(
    mode: str, tmp_path: Path, old_database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mlflow.db"
    shutil.copy(old_database, file)
    execute(file, f"pragma journal_mode = {mode}")
    add_run(file, tmp_path / "mlartifacts/theirs")
    with open_store(tmp_path, "convoy"):
        pass
    assert list_runs(file) == ["precious"]
    (kept,) = tmp_path.glob("mlflow.db.before-*")
    assert read_version(kept) == VERSIONS[-7]
    assert f"the previous version is kept as {kept.name}" in capsys.readouterr().out
    with contextlib.closing(sqlite3.connect(file)) as opened:
        assert opened.execute("pragma journal_mode").fetchone() == (mode,)


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_nobody_writes_to_a_database_that_is_upgraded(
    mode: str, tmp_path: Path, old_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, truly = tmp_path / "mlflow.db", database._migrate
    shutil.copy(old_database, file)
    execute(file, f"pragma journal_mode = {mode}")
    add_run(file, tmp_path / "mlartifacts/theirs")

    def write_meanwhile(new: Path) -> None:
        with (
            contextlib.closing(sqlite3.connect(file, timeout=0)) as other,
            pytest.raises(sqlite3.OperationalError, match="database is locked"),
        ):
            # The copy would lack this change.
            other.execute("update runs set name = 'changed'")
        truly(new)

    monkeypatch.setattr(database, "_migrate", write_meanwhile)
    database.prepare(file)
    assert read_version(file) == VERSIONS[-1]


def fail_upgrade(_: Path) -> None:
    raise sqlalchemy.exc.OperationalError("alter table", {}, Exception("duplicate column name: kind"))


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_upgrade_that_fails_leaves_the_database_as_it_was(
    mode: str, tmp_path: Path, old_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(old_database, tmp_path)
    execute(tmp_path / "mlflow.db", f"pragma journal_mode = {mode}")
    add_run(tmp_path / "mlflow.db", tmp_path / "mlartifacts/theirs")
    before = read_files(tmp_path)
    monkeypatch.setattr(database, "_migrate", fail_upgrade)
    with (
        pytest.raises(
            ConvoyError, match=r"can't be upgraded for MLflow .*duplicate column name: kind\), .* was left unchanged"
        ),
        open_store(tmp_path, "convoy"),
    ):
        pass
    after = read_files(tmp_path)
    assert after.keys() == before.keys()
    if mode == "delete":  # in WAL mode a counter in the file's header grows
        assert after == before
    assert read_version(tmp_path / "mlflow.db") == VERSIONS[-7]


def test_database_open_in_another_process_is_not_replaced(tmp_path: Path, old_database: Path) -> None:
    shutil.copy(old_database, tmp_path)
    add_run(tmp_path / "mlflow.db", tmp_path / "mlartifacts/theirs")
    told, tell = os.pipe()
    opened, has_opened = os.pipe()
    other = os.fork()
    if not other:
        with (tmp_path / "mlflow.db").open("rb"):
            os.write(has_opened, b".")
            os.read(told, 1)
        os._exit(0)
    os.read(opened, 1)
    with pytest.raises(ConvoyError, match=rf"process {other} \(.*\) has it open: wait until it has finished, or stop"):
        database.prepare(tmp_path / "mlflow.db")
    os.write(tell, b".")
    os.waitpid(other, 0)
    database.prepare(tmp_path / "mlflow.db")
    assert read_version(tmp_path / "mlflow.db") == VERSIONS[-1]


def test_locked_database_is_reported(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "LOCK_TIMEOUT_S", 0.1)
    shutil.copy(empty_database, tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as other:
        other.execute("begin exclusive")
        with (
            pytest.raises(ConvoyError, match=r"database is locked. Another process is writing to mlflow.db: wait"),
            open_store(tmp_path, "convoy"),
        ):
            pass
