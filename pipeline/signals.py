"""Handling of SIGINT, SIGTERM and SIGHUP, which end a command with one message and an exit status of 128 + signal."""

import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ExtensionFileLoader
from types import FrameType
from typing import Any

# SIGHUP is sent when the terminal is closed.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Time for cleanup, such as the removal of temporary files.
CLEANUP_S = 10
# Interval at which the exception is raised again while the process is still running.
RETRY_S = 2
# Interval at which the exception is tried again while an extension module is being loaded, or after it was dropped.
SHORT_RETRY_S = 0.01

Handler = Callable[[int, FrameType | None], object]


class Ended(SystemExit):
    """Exception that a signal raises in the main thread, whatever code is running there."""


class _End:
    """Signal handler that ends the process even if the exception that it raises is swallowed.

    Python drops an exception that is raised in a destructor or in the callback of a weak reference, and a library may
    catch any exception. It is therefore raised again until the process ends; after `CLEANUP_S` seconds the process
    exits without further cleanup.
    """

    def __init__(self) -> None:
        self.status = 0
        self.deadline = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.status:
            self.status = 128 + number
            self.deadline = time.monotonic() + CLEANUP_S
            signal.signal(signal.SIGALRM, self.retry)
            write_line(f"stopped by {signal.Signals(number).name}; run the same command again to resume")
        self.retry(number, frame)

    def retry(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() > self.deadline:
            os._exit(self.status)
        if _is_loading_extension(frame):
            signal.setitimer(signal.ITIMER_REAL, SHORT_RETRY_S)
            return
        signal.setitimer(signal.ITIMER_REAL, RETRY_S)
        raise Ended(self.status)


def _is_loading_extension(frame: FrameType | None) -> bool:
    """Return whether an extension module is being loaded, whose C++ code could abort the process on an exception."""
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False


def install() -> None:
    """Let the signals end this process, except those that its parent process set to be ignored, as `nohup` does."""
    if any(isinstance(signal.getsignal(number), _End) for number in ENDING):
        return
    end, previous_hook = _End(), sys.unraisablehook
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)

    def retry_dropped(dropped: Any) -> None:
        if isinstance(dropped.exc_value, Ended):
            # The short delay lets the callback finish first.
            signal.setitimer(signal.ITIMER_REAL, SHORT_RETRY_S)
        else:
            previous_hook(dropped)

    sys.unraisablehook = retry_dropped
    # The timer is cancelled at exit. If it fired after Python had removed its signal handlers, it would end the process
    # with another status.
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Install `handler` for the signals within the context, except for those that are ignored."""
    before = {number: signal.getsignal(number) for number in ENDING}
    handlers = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    try:
        for number in handlers:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in handlers.items():
            signal.signal(number, old)


def write_line(text: str) -> None:
    """Write a line to standard error from a signal handler.

    `print` is not safe here: the handler may have interrupted another `print`, or the terminal may be closed.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"convoy: {text}\n".encode())
