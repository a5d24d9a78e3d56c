"""The embedded database: create and upgrade MLflow's SQLite file atomically.

MLflow creates its tables, and upgrades them for a newer version, in about seventy transactions. If it is stopped in
between, it can never open that database again. So the database is created or upgraded under another name and then
renamed.
"""

import contextlib
import functools
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

import mlflow
import mlflow.db
import psutil
from filelock import FileLock
from mlflow.exceptions import MlflowException

from convoy.core.disk import explain_full_disk, remove_sqlite_database
from convoy.core.errors import ConvoyError

if TYPE_CHECKING:
    from alembic.script import ScriptDirectory

LOCK_TIMEOUT_S = 20.0
# Columns that the table `experiments` has in every version of MLflow.
MLFLOW_COLUMNS = {"experiment_id", "name", "artifact_location"}
POOL_CLASS = "MLFLOW_SQLALCHEMYSTORE_POOLCLASS"
START_OVER = (
    "move mlflow.db, mlartifacts/ and artifacts/.cache/champion/ away; then `convoy sync` restores the run of each "
    "result, and `convoy run` selects a new champion"
)
# SQL conditions, by table, for rows that a new database does not have. Such rows were written by a user.
INITIAL_ROWS = {"alembic_version": "false", "workspaces": "false", "experiments": "experiment_id != 0"}


def prepare(file: Path) -> None:
    """Create the database if it does not exist, or upgrade it if it is of an older MLflow.

    Afterwards MLflow itself has nothing to create or upgrade. A file that is not a SQLite database, or is damaged, is
    left for MLflow to report.

    Args:
        file: SQLite file.

    Raises:
        ConvoyError: If the database is not MLflow's, is of a newer MLflow, belongs to another project, is open in
            another process, or can't be upgraded. It is left unchanged.
    """
    # A symbolic link stays one.
    file = file.resolve()
    try:
        if _is_current(file):
            return
        with _creation_lock(file):
            # Another process may have created it in the meantime.
            if not _is_current(file):
                _create_or_upgrade(file)
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:
        return


def check_owner(file: Path) -> None:
    """Check that a database was not copied from another project, into whose files this one would write.

    Raises:
        ConvoyError: If experiments have their files in local folders, but none has them beside the database.
    """
    file = file.resolve()
    with _open(file) as database:
        rows = database.execute("select artifact_location from experiments where experiment_id != 0").fetchall()
    folders = [local_path(location) for (location,) in rows if urlparse(location).scheme in ("", "file")]
    here = [folder for folder in folders if folder.resolve().is_relative_to(file.parent)]
    if folders and not here:
        raise ConvoyError(
            f"{file} belongs to another project, with its files in {folders[0]}: it was left unchanged. Move it "
            f"away, or set MLFLOW_TRACKING_URI to another file, such as sqlite:///{file.with_name('runs.db')}"
        )


def local_path(uri: str) -> Path:
    """Return the path that a file:// URI names."""
    return Path(unquote(urlparse(uri).path))


@contextlib.contextmanager
def _open(file: Path) -> Iterator[sqlite3.Connection]:
    """Open an existing database; SQLite rolls back any transaction that a killed process left incomplete."""
    uri = f"{file.as_uri()}?mode=rw"
    with contextlib.closing(sqlite3.connect(uri, LOCK_TIMEOUT_S, isolation_level=None, uri=True)) as database:
        yield database


@contextlib.contextmanager
def _creation_lock(file: Path) -> Iterator[None]:
    """Hold the lock with which only one process creates or upgrades a database, which projects may share."""
    lock = file.with_name(f"{file.name}.new.lock")
    with FileLock(lock):
        try:
            yield
        finally:
            # A process that waits for the lock notices that the file is gone.
            lock.unlink(missing_ok=True)


# The schema and its versions


@functools.cache
def _versions() -> "ScriptDirectory":
    """Return the schema versions that the installed MLflow knows."""
    # With a tracking server, alembic is not needed.
    from alembic.script import ScriptDirectory

    return ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))


def _head() -> str | None:
    """Return the newest schema version that the installed MLflow knows.

    It is read from the text of the migrations, because alembic imports all 67 of them, which takes half a second.
    """
    folder = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    text = "\n".join(file.read_text(encoding="utf-8") for file in folder.glob("*.py"))
    known = set(re.findall(r'^revision = "(\w+)"', text, re.MULTILINE))
    replaced = set(re.findall(r'^down_revision = "(\w+)"', text, re.MULTILINE))
    heads = known - replaced
    return heads.pop() if len(heads) == 1 else _versions().get_current_head()


def _version(database: sqlite3.Connection) -> str | None:
    if not database.execute("select 1 from sqlite_master where name = 'alembic_version'").fetchone():
        return None
    found = database.execute("select version_num from alembic_version").fetchone()
    return found[0] if found else None


def _is_current(file: Path) -> bool:
    """Return whether MLflow can open the database without an upgrade.

    The version proves that the schema is complete, as each migration writes it last.
    """
    if not file.exists():
        return False
    with _open(file) as database:
        return _version(database) == _head()


def _is_known(version: str | None) -> bool:
    from alembic.util import CommandError

    try:
        return version is None or _versions().get_revision(version) is not None
    except CommandError:
        return False


def _tables(database: sqlite3.Connection) -> list[str]:
    found = database.execute("select name from sqlite_master where type = 'table' and name not like 'sqlite_%'")
    return [name for (name,) in found]


def _is_mlflow_database(database: sqlite3.Connection) -> bool:
    """Return whether a database is MLflow's, which may be incomplete."""
    # MLflow creates the table `experiments` before all its others.
    columns = {row[1] for row in database.execute("pragma table_info(experiments)")}
    return columns >= MLFLOW_COLUMNS or set(_tables(database)) <= {"alembic_version"}


def _is_empty(database: sqlite3.Connection) -> bool:
    """Return whether a database holds no user data: no run, model or experiment, nor a partly migrated table."""
    return not any(
        database.execute(f'select 1 from "{table}" where {INITIAL_ROWS.get(table, "true")} limit 1').fetchone()
        for table in _tables(database)
    )


# Creating and upgrading


def _create_or_upgrade(file: Path) -> None:
    if not file.exists():
        _create(file)
        return
    with _open(file) as database:
        version = _version(database)
        if not _is_mlflow_database(database):
            raise ConvoyError(
                f"{file} is a database, but not MLflow's (its tables are {', '.join(_tables(database)[:5])}): it was "
                "left unchanged. Move it elsewhere, or set MLFLOW_TRACKING_URI to another file, such as "
                f"sqlite:///{file.with_name('runs.db')}"
            )
        if not _is_known(version):
            raise ConvoyError(
                f"{file} is of a newer MLflow than {mlflow.__version__} (its schema is {version}): it was left "
                "unchanged. Install that version: `make install` installs the one in requirements.lock"
            )
        is_empty = _is_empty(database)
    _check_unused(file)
    if is_empty:
        _create(file)
    else:
        _upgrade(file)


def _create(file: Path) -> None:
    """Create a new database, and move an incomplete one that holds no user data aside."""
    new = _remove_database(file.with_name(f"{file.name}.new"))
    try:
        _migrate(new)
        if file.exists() and file.stat().st_size:
            aside = file.with_name(f"{file.name}.incomplete-{int(time.time())}")
            file.rename(aside)
            print(
                f"{file.name} was incomplete, because its creation was interrupted, and held no runs: it was moved to "
                f"{aside.name}"
            )
        # SQLite would apply the journal of a removed database to the one that replaces it.
        _remove_database(file)
        new.replace(file)
    finally:
        _remove_database(new)


def _upgrade(file: Path) -> None:
    """Replace a database by an upgraded copy, and keep the original beside it."""
    check_owner(file)
    new = _remove_database(file.with_name(f"{file.name}.new"))
    kept = file.with_name(f"{file.name}.before-{int(time.time())}")
    with _open(file) as database:
        (mode,) = database.execute("pragma journal_mode").fetchone()
        try:
            # In WAL mode the last changes are in a separate file, which SQLite would apply to the new database.
            database.execute("pragma journal_mode = delete")
            # From here on no other process can write changes that the copy would lack.
            database.execute("begin immediate")
            with _open(file) as source, contextlib.closing(sqlite3.connect(new)) as copy:
                source.backup(copy)
            _migrate(new)
            with _open(new) as copy:
                copy.execute(f"pragma journal_mode = {mode}")
            shutil.copymode(file, new)
            os.link(file, kept)
            new.replace(file)
        except Exception as error:
            database.rollback()
            database.execute(f"pragma journal_mode = {mode}")
            if isinstance(error, sqlite3.OperationalError) or explain_full_disk(error, file.parent):
                raise
            raise ConvoyError(
                f"{file.name} can't be upgraded for MLflow {mlflow.__version__} ({_first_line(error)}), perhaps "
                "because an earlier upgrade was interrupted: it was left unchanged. Restore a copy from before that "
                f"upgrade, or {START_OVER}"
            ) from error
        finally:
            _remove_database(new)
    print(f"{file.name} was upgraded for MLflow {mlflow.__version__}; the previous version is kept as {kept.name}")


def _migrate(file: Path) -> None:
    """Create or upgrade all tables, as the command `mlflow db upgrade` does."""
    before = os.environ.get(POOL_CLASS)
    # With other pools, connections would stay open.
    os.environ[POOL_CLASS] = "NullPool"
    try:
        mlflow.db.upgrade.main([f"sqlite:///{file}"], standalone_mode=False)
    finally:
        os.environ.pop(POOL_CLASS)
        if before is not None:
            os.environ[POOL_CLASS] = before
    if not _is_current(file):
        raise MlflowException(f"{file.name} is still incomplete")


def _remove_database(file: Path) -> Path:
    """Remove a database and SQLite's files beside it, where they exist, and return its path."""
    remove_sqlite_database(file)
    return file


def _check_unused(file: Path) -> None:
    """Raise ConvoyError if another process, such as MLflow's server, has the database open."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and any(opened.path == str(file) for opened in process.open_files()):
                command = " ".join(process.cmdline()[:6])
                raise ConvoyError(
                    f"{file.name} is incomplete or of an older MLflow, and process {process.pid} ({command}) has it "
                    "open: wait until it has finished, or stop it, and run this again"
                )


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]
