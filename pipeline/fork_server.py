"""A process that has imported third-party packages, from which stages are forked, so that they start at once.

On Linux `convoy run` starts this file as a script, and the process of a stage, which DVC has started, hands its work
over to a fork of it: that saves some 4 s of processor time for each stage and architecture. Neither `convoy` nor
`pipeline` is imported here, so a stage runs the code on the disk. With `CONVOY_FORK=0` nothing is forked.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

# In the environment of stages: the folder with the socket of the server.
VARIABLE = "CONVOY_FORK_SERVER"
# Packages that most stages import. None of them uses a GPU by its import.
PRELOADED = ("pandas", "pyarrow.parquet", "pytorch_lightning", "safetensors.torch", "scipy.stats", "mlflow.tracking")
# Variables that packages read when they are imported. A stage for which any of them differs is not forked.
READ_BY_IMPORTS = ("OMP_", "MKL_", "OPENBLAS_", "ATEN_", "ONEDNN_", "DNNL_", "TORCH_", "MLFLOW_", "MPL", "PYTHON")


@contextlib.contextmanager
def started() -> Iterator[None]:
    """Start a server for the stages of the DVC processes that are started within the context."""
    if sys.platform != "linux" or os.environ.get("CONVOY_FORK") == "0" or VARIABLE in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="convoy-") as folder:
        # The server ends at the end of its standard input, which also comes if this process is killed.
        command = [sys.executable, __file__, folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as server:
            os.environ[VARIABLE] = folder
            try:
                yield
            finally:
                del os.environ[VARIABLE]
                # After a short run it is still importing.
                server.kill()


def socket_path(folder: str) -> str:
    """Return the path of the socket of a server in this environment and with these variables for imports."""
    read = sorted(item for item in os.environ.items() if item[0].startswith(READ_BY_IMPORTS))
    return str(Path(folder) / f"{zlib.crc32(repr([sys.prefix, read]).encode()):x}")


def hand_over(forwarded: Sequence[signal.Signals]) -> None:
    """Let a server run this process's module, forward signals, and exit with its status; return without a server."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(socket_path(os.environ.pop(VARIABLE)))
    except OSError:
        return
    for number in forwarded:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: connection.send(bytes([number])))
    argv = sys.orig_argv[sys.orig_argv.index("-m") + 1 :]
    socket.send_fds(connection, [b"\n"], [0, 1, 2])
    connection.sendall(json.dumps([argv, str(Path.cwd()), dict(os.environ)]).encode() + b"\n")
    if not (status := connection.recv(1)):
        os.write(2, b"convoy: the process that runs the stage was killed: run the same command again to resume\n")
    os._exit(status[0] if status else 1)


def serve(folder: str) -> list:
    """Fork a process for each request, and return the request in it; exit at the end of standard input."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(socket_path(folder))
        listener.listen()
        while True:
            if 0 in select.select([0, listener.fileno()], [], [])[0]:
                sys.exit()
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile().readline())
    if worker := os.fork():
        supervise(worker, connection)
    for number, (name, stream) in enumerate(zip(("stdin", "stdout", "stderr"), streams, strict=True)):
        os.dup2(stream, number)
        setattr(sys, name, os.fdopen(number, "w" if number else "r", 1, errors="backslashreplace", closefd=False))
    return request


def supervise(worker: int, connection: socket.socket) -> None:
    """Forward signals from a connection to a process, kill it if the connection ends, and send its exit status."""
    ended = os.pidfd_open(worker)
    while ended not in select.select([ended, connection.fileno()], [], [])[0]:
        os.kill(worker, *(connection.recv(1) or [signal.SIGKILL]))
    status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    with contextlib.suppress(OSError):
        connection.send(bytes([status if status >= 0 else 128 - status]))
    os._exit(0)


def main(folder: str, packages: Sequence[str] = PRELOADED) -> None:
    """Import packages, and run the module of a request in each fork, as `python -m` would."""
    for package in packages:
        importlib.import_module(package)
    (module, *arguments), cwd, environment = serve(folder)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0], sys.argv = cwd, ["-m", *arguments]
    status = run(module)
    # What Python does at an exit, without the 3 s in which it would free all that was imported.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def run(module: str) -> int:
    """Run a module as `python -m` does, and return its exit status."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if not isinstance(ended.code, str):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


if __name__ == "__main__":
    main(sys.argv[1])
