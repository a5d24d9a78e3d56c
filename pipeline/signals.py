"""The signals that end a command: SIGINT, SIGTERM and SIGHUP, with one line and a status that says which it was."""

import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP comes of a terminal that is closed
CLEANUP_S = 10  # for what is done on the way out, such as removing temporary files
RETRY_S = 2  # after which the exception is raised again, if the process is still there

Handler = Callable[[int, FrameType | None], object]


class Ended(SystemExit):
    """Raised wherever a signal finds the main thread."""


class _End:
    """The handler of the signals that end a process, also where the exception that it raises is swallowed.

    Python drops what is raised in a destructor or in the callback of a weak reference, and a library may catch
    whatever is raised. So it is raised again until the process is gone, at last without any cleanup.
    """

    def __init__(self) -> None:
        self.status = 0
        self.deadline = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.status:
            self.status = 128 + number
            self.deadline = time.monotonic() + CLEANUP_S
            signal.signal(signal.SIGALRM, self.retry)
            write_line(f"stopped by {signal.Signals(number).name}; run the same command again to go on")
        self.retry()

    def retry(self, *_: object) -> None:
        if time.monotonic() > self.deadline:
            os._exit(self.status)
        signal.setitimer(signal.ITIMER_REAL, RETRY_S)
        raise Ended(self.status)


def install() -> None:
    """Let the signals end this process, except those that whoever started it wants ignored, as `nohup` does."""
    if any(isinstance(signal.getsignal(number), _End) for number in ENDING):
        return
    end, shown = _End(), sys.unraisablehook
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)

    def retry_dropped(dropped: Any) -> None:
        if isinstance(dropped.exc_value, Ended):
            signal.setitimer(signal.ITIMER_REAL, 0.01)  # when the callback is over
        else:
            shown(dropped)

    sys.unraisablehook = retry_dropped
    # later, Python has given up its handlers, and the timer would end the process with another status
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Let `handler` have the signals meanwhile."""
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
    """Write to the error stream from a handler, which may have interrupted a `print`, or outlived the terminal."""
    with contextlib.suppress(OSError):
        os.write(2, f"convoy: {text}\n".encode())
