"""Run an operation in a process that is killed at its n-th write."""

import os
import signal
import sqlite3
import sys
import traceback
from collections.abc import Callable
from typing import Any

CHANGING_EVENTS = ("os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
READ_STATEMENTS = ("SELECT", "PRAGMA", "BEGIN", "--")


def run_until_write(operation: Callable[[], None], number: int) -> bool:
    """Run an operation in a process that is killed at its write of this number; returns whether it came to that.

    A write is one to a SQLite database, or a file that is opened for writing, renamed, linked or removed.
    """
    process = os.fork()
    if process:
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert status in (0, -signal.SIGKILL), f"the operation failed before its write {number}"
        return status == -signal.SIGKILL
    try:
        left = number

        def count() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def see_statement(statement: str) -> None:
            if not statement.lstrip().upper().startswith(READ_STATEMENTS):
                count()

        connect = sqlite3.connect

        def connect_and_see(*given: Any, **named: Any) -> sqlite3.Connection:
            connection = connect(*given, **named)
            connection.set_trace_callback(see_statement)
            return connection

        def see(event: str, given: tuple[Any, ...]) -> None:
            if event in CHANGING_EVENTS or (event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                count()

        sys.addaudithook(see)
        sqlite3.connect = sqlite3.dbapi2.connect = connect_and_see  # type: ignore[assignment]
        operation()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
