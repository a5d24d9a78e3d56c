"""DVC as a process of its own, which is stopped together with the running stage."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import psutil

from pipeline import signals


def run_all(commands: Sequence[Sequence[str]]) -> int:
    """Run DVC commands in order until one fails, and return the exit status of the last one that ran."""
    status = 0
    for command in commands:
        status = status or run_dvc(*command)
    return status


def run_dvc(*command: str) -> int:
    """Run DVC with the given arguments and return its exit status.

    A signal that would end this process is forwarded as SIGTERM to DVC and the running stage, so that a training can
    save its state. This process waits until all of them have ended.

    Returns:
        The exit status of DVC, or 128 + the signal number, as in a shell, if a signal ended the run.
    """
    return run_forwarding([sys.executable, "-m", "dvc", *command])


def run_forwarding(command: Sequence[str], **options: Any) -> int:
    """Run a command that starts DVC as `run_dvc` does.

    Args:
        command: The command and its arguments.
        options: Options of `subprocess.Popen`.

    Returns:
        The exit status of the command, or 128 + the signal number, as in a shell, if a signal ended the run.
    """
    running: list[subprocess.Popen] = []
    with forwarded_signals(running) as received:
        running.append(subprocess.Popen(command, start_new_session=True, **options))
        # The signal arrived before the command was started.
        if received:
            terminate(running[0].pid)
        return wait_for_dvc(running[0], received)


def start_dvc(*command: str, environment: Mapping[str, str] | None = None, has_pipes: bool = False) -> subprocess.Popen:
    """Start DVC in a process group of its own.

    Args:
        command: The arguments of DVC.
        environment: Environment variables that differ from those of this process.
        has_pipes: Whether to read its output from pipes instead of showing it.
    """
    output = subprocess.PIPE if has_pipes else None
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", *command],
        start_new_session=True,
        env=os.environ | dict(environment or {}),
        stdout=output,
        stderr=output,
    )


@contextlib.contextmanager
def forwarded_signals(running: Sequence[subprocess.Popen]) -> Iterator[list[int]]:
    """Forward a signal that would end this process as SIGTERM to running DVC processes and their stages.

    Args:
        running: The processes, to which more may be added within the context.

    Yields:
        The numbers of the signals received so far.
    """
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if not received:
            signals.write_line(
                f"{signal.Signals(number).name}: stopping the running stage; run the same command again to resume"
            )
        received.append(number)
        for process in list(running):
            terminate(process.pid)

    with signals.handled(forward):
        yield received


def wait_for_dvc(process: subprocess.Popen, received: Sequence[int]) -> int:
    """Wait until a DVC process has ended, and its stage too if a signal stopped them.

    Args:
        process: The process.
        received: The numbers of the signals that this process has received and forwarded.

    Returns:
        The exit status of DVC, or 128 + the signal number, as in a shell, if a signal ended the run.
    """
    status = process.wait()
    # DVC was killed by a signal that its stage may not have received.
    if status < 0:
        terminate(process.pid)
    while (received or status < 0) and is_alive(process.pid):
        time.sleep(0.05)
    if received:
        return 128 + received[0]
    return status if status >= 0 else 128 - status


def terminate(group: int) -> None:
    """Send SIGTERM to a process group if it still exists."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGTERM)


def is_alive(group: int) -> bool:
    """Return whether any process of a process group is still running.

    Zombies do not count: an ended process stays in its group as a zombie if no parent collects its exit status, as in
    many containers.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False
