"""The callback that shows a running training as a run in MLflow.

It is not an input of the train stage, because it changes no output. A slow or failing MLflow does not affect the
training: one line reports the problem, and `convoy sync` completes the run in MLflow.
"""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as lightning
from pytorch_lightning.callbacks import Callback

from convoy.core import config
from convoy.core.errors import ConvoyError
from convoy.training.history import EpochHistory
from convoy.training.record import TrainingRecord
from pipeline.stage import project_root

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    from convoy.tracking.store import TrackingStore

# A training that has ended within this time is not shown before `register` or `convoy sync` add its run, because MLflow
# takes seconds of processor time to import.
START_AFTER_S = 20  # seconds, or those of the environment variable CONVOY_LIVE_AFTER
# Time by which MLflow may delay the end of a training run.
END_TIMEOUT_S = 4  # seconds
REQUEST_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "3", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}

Message = dict[str, Any]  # the row of an epoch or the final status, and its time in milliseconds since the epoch


def start_after_s() -> float:
    """Return the seconds of training after which it is shown in MLflow."""
    value = os.environ.get("CONVOY_LIVE_AFTER", str(START_AFTER_S))
    try:
        return float(value)
    except ValueError:
        raise ConvoyError(f"CONVOY_LIVE_AFTER={value}: give a number of seconds, as 20") from None


class LiveRun(Callback):
    """Show a training as a run in MLflow, from a background thread that the training never waits for before its end.

    Args:
        root: The project folder.
        record: The training record, without results.

    Raises:
        ConvoyError: If CONVOY_LIVE_AFTER is not a number of seconds.
    """

    def __init__(self, root: Path, record: TrainingRecord) -> None:
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.reporter = Reporter(root, record, int(time.time() * 1000))
        self.thread = threading.Thread(target=self._report, daemon=True)
        self.start_after_s = start_after_s()
        self.ended = threading.Event()
        self.status = ""
        # Epochs that were sent by `show`.
        self.epochs = 0

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Start the run, or continue it with the epochs before a checkpoint."""
        # Lightning starts no epoch when it resumes in the middle of one.
        self.on_train_epoch_start(trainer, module)
        if not trainer.is_global_zero:
            return
        (self.history,) = (each for each in trainer.callbacks if isinstance(each, EpochHistory))  # type: ignore[attr-defined]
        self.show(self.history.rows)

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Start the clock of the epoch."""
        self.started, self.first_step = time.monotonic(), trainer.global_step

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Add the metrics of the epoch, and its speed with validation."""
        if trainer.is_global_zero:
            row = self.history.rows[-1]
            images = (trainer.global_step - self.first_step) * trainer.datamodule.train_loader.sampler.images_per_step  # type: ignore[attr-defined]
            # No output of the stage has the speed, which differs in each run.
            speed = images / (time.monotonic() - self.started)
            self._send({"row": {**row, "images_per_second": round(speed, 1)}})

    def show(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Start the run, and add the epochs of a history that it does not have yet.

        This is for a training run whose callbacks run elsewhere.
        """
        if self.thread.ident is None:
            self.thread.start()
        for row in rows[self.epochs :]:
            self._send({"row": row})
        self.epochs = len(rows)

    def end(self, status: str) -> None:
        """End the run, and wait for MLflow for a few seconds at most.

        Args:
            status: The status of the run in MLflow, "FINISHED", "FAILED" or "KILLED".
        """
        if self.thread.ident is None:
            return
        self.status = status
        self._send({"status": status})
        self.ended.set()
        self.thread.join(END_TIMEOUT_S)
        if self.thread.is_alive():
            self.reporter.report_outage(f"MLflow takes more than {END_TIMEOUT_S} seconds")

    def _report(self) -> None:
        ended_soon = self.ended.wait(self.start_after_s)
        if not ended_soon or self.status != "FINISHED":
            self.reporter.report(self.inbox)

    def _send(self, message: Message) -> None:
        self.inbox.put({**message, "time_ms": int(time.time() * 1000)})


class Reporter:
    """Writer of the messages of a training run to MLflow, which keeps and retries those that MLflow does not accept.

    Args:
        root: The project folder.
        record: The training record, without results.
        time_ms: Start of the training, in milliseconds since the epoch.
    """

    def __init__(self, root: Path, record: TrainingRecord, time_ms: int) -> None:
        self.root = root
        self.record = record
        self.time_ms = time_ms
        self.store: TrackingStore | None = None
        self.run: str | None = ""
        self.monitor: SystemMetricsMonitor | None = None
        self.shown: set[int] = set()  # epochs that the run already had
        self.rows: list[Message] = []  # rows that are not in MLflow yet
        self.end: Message = {}
        self.has_reported_outage = False

    def report_outage(self, reason: str) -> None:
        """Print, once, why the run can't be shown."""
        if not self.has_reported_outage:
            self.has_reported_outage = True
            message = f"convoy: live: {reason}; the training is not affected, and `convoy sync` adds its run"
            print(message, file=sys.stderr, flush=True)

    def report(self, inbox: "queue.SimpleQueue[Message]") -> None:
        """Write the messages in `inbox` to MLflow until the training ends."""
        for name, value in REQUEST_TIMEOUTS.items():
            os.environ.setdefault(name, value)
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    self.write(stack)
                # No error of MLflow may affect the training.
                except Exception as error:
                    from convoy.tracking.store import describe_mlflow_error

                    self.report_outage(describe_mlflow_error(error.__cause__ or error))
                if self.end or self.run is None:
                    return
                self.receive(inbox)

    def receive(self, inbox: "queue.SimpleQueue[Message]") -> None:
        """Wait for a message, then take all that have arrived."""
        while not self.end:
            message = inbox.get()
            if "row" in message:
                self.rows.append(message)
            else:
                self.end = message
            if inbox.empty():
                break

    def write(self, stack: contextlib.ExitStack) -> None:
        """Write the rows and the final status that MLflow does not have yet."""
        # MLflow takes seconds to import, and the training does not wait for it.
        from convoy.tracking import runs

        if not self.run:
            self.start_run(stack)
        if self.run is None:
            return
        assert self.store
        new = [row for row in self.rows if row["row"]["epoch"] not in self.shown]
        points = [point for row in new for point in runs.curve_points(row["row"], row["time_ms"])]
        runs.log_points(self.store.client, self.run, points)
        self.rows = []
        if self.end:
            if self.monitor:
                self.monitor.finish()
            self.store.client.set_terminated(self.run, self.end["status"], self.end["time_ms"])

    def start_run(self, stack: contextlib.ExitStack) -> None:
        """Find or create the run; `run` is then None if it already shows the complete training."""
        from convoy.tracking import provenance, run_record, runs
        from convoy.tracking.store import open_store

        params = config.load(self.root / "params.yaml")
        run = run_record.describe_training(self.record, {}, provenance.provenance_tags(self.root))
        home = project_root(self.root)
        with open_store(home, params["register"]["name"]) as store, contextlib.ExitStack() as lock:
            lock.enter_context(runs.run_lock(store, self.record.fingerprint, END_TIMEOUT_S))
            found = runs.start_run(store, run, runs.name_process(), self.time_ms)
            if found:
                self.shown = runs.logged_epochs(store, found)
                stack.push(lock.pop_all())
        self.store, self.run = store, found
        if found:
            self.monitor = runs.monitor_system(found)
