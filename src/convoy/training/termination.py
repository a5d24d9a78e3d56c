"""The end of a training run on SIGTERM: it finishes the current step, saves its state and exits."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import pytorch_lightning as lightning
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities.exceptions import SIGTERMException

# Exit status of a process that SIGTERM ended, as shells report it.
SIGTERM_EXIT_STATUS = 128 + signal.SIGTERM
# Time from SIGTERM until the process ends, even if the current step has not finished.
SIGTERM_GRACE_S = 8  # seconds
MESSAGE = b"SIGTERM: the training saves its state and ends; run it again to resume from there\n"


class GracefulExit(Callback):
    """Handler of SIGTERM, which notes that it was received and ends the process if the training does not.

    Lightning's own handler ends a training at places from which it can't resume, and communicates with other processes
    from within the handler.
    """

    def __init__(self) -> None:
        self.was_requested = False
        self.is_installed = False
        self.trainer: lightning.Trainer | None = None
        # Times of the alarms since SIGTERM.
        self.alarms: list[float] = []

    @contextlib.contextmanager
    def handle(self, trainer: lightning.Trainer) -> Iterator[None]:
        """Handle SIGTERM within a `with` block; if it was received, all processes of the training exit at its end."""
        self.trainer = trainer
        try:
            before = signal.signal(signal.SIGTERM, self._receive)
        # Only the main thread can set a signal handler.
        except ValueError:
            yield
            return
        self.is_installed = True
        try:
            yield
        # Lightning raises this if the signal arrives just before `on_train_start`.
        except SIGTERMException:
            self.exit()
        finally:
            if self.was_requested:
                signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGTERM, before)
        if self.was_requested:
            self.exit()

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Replace the handler of Lightning."""
        if self.is_installed:
            signal.signal(signal.SIGTERM, self._receive)

    def exit(self) -> NoReturn:
        """End this process with the exit status of a process that SIGTERM ended."""
        sys.exit(self._exit_status())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.was_requested:
            return
        self.was_requested = True
        if self.trainer and self.trainer.is_global_zero:
            # The signal may have interrupted a call of print, which is not reentrant.
            with contextlib.suppress(OSError):
                os.write(2, MESSAGE)
        signal.signal(signal.SIGALRM, self._force)
        # Repeat the alarm each second, because Python drops exceptions that are raised in a destructor or in the
        # callback of a weak reference.
        signal.setitimer(signal.ITIMER_REAL, SIGTERM_GRACE_S, 1)
        if self.trainer and self.trainer.strategy.launcher:
            # Pass the signal on to the processes that this process started.
            self.trainer.strategy.launcher.kill(number)  # type: ignore[attr-defined]

    def _force(self, number: int, frame: FrameType | None) -> None:
        self.alarms.append(time.monotonic())
        if self.alarms[-1] > self.alarms[0] + SIGTERM_GRACE_S:
            os._exit(self._exit_status())
        self.exit()

    def _exit_status(self) -> int:
        """Return the exit status of this process after SIGTERM.

        It is 0 in a process that another one has started; otherwise Lightning would kill the one that started it.
        """
        return SIGTERM_EXIT_STATUS if os.environ.get("LOCAL_RANK", "0") == "0" else 0
