"""Process that shows a running training as a run in MLflow.

The train stage starts it; it is not a stage itself. It reads JSON lines from standard input: {"record": ...,
"process": ...} when the training begins, {"row": ...} for each epoch and {"status": ...} at the end, each with its
"moment" in ms. If the lines end without a status, the training was killed. A slow or failing MLflow does not affect
the training: one line reports the problem, and `convoy sync` completes the run in MLflow.
"""

import argparse
import contextlib
import json
import os
import platform
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from convoy.core import config
from convoy.tracking import provenance, run_record, runs
from convoy.tracking.store import TrackingStore, describe_mlflow_error, open_store
from convoy.training.record import TrainingRecord
from pipeline.stage import project_root

END_TIMEOUT_S = 30  # s, for MLflow to answer after the end of the training
REQUEST_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


def main() -> None:
    """Show the training that is reported on standard input as a run in MLflow."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.live", description=main.__doc__)
    parser.add_argument("architecture", help="for whoever looks at the list of processes")
    parser.parse_args()
    # This process ends when its input ends, not by a signal.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # The training has priority.
    os.nice(10)
    os.environ.update(REQUEST_TIMEOUTS)
    inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=listen, args=[inbox], daemon=True).start()
    signal.signal(signal.SIGALRM, give_up)
    Reporter(Path.cwd()).report(inbox)


def listen(inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Read every line as soon as it arrives, so that the pipe does not fill up while MLflow is slow."""
    # The last line may be cut off.
    with contextlib.suppress(ValueError):
        for line in sys.stdin:
            inbox.put(json.loads(line))
    # This has no effect if a status was received before.
    inbox.put({"status": "KILLED"})
    signal.alarm(END_TIMEOUT_S)


def give_up(*_: object) -> None:
    """Exit because MLflow has not answered in time after the end of the training."""
    sys.exit(describe_outage(f"MLflow takes more than {END_TIMEOUT_S} seconds"))


def describe_outage(reason: str) -> str:
    """Return a message for a reason why the run can't be shown."""
    return f"convoy: live: {reason}; the training is not affected, and `convoy sync` adds its run"


class Reporter:
    """Writer of the messages of a training to MLflow, which keeps and retries those that MLflow does not accept."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store: TrackingStore | None = None
        self.run = ""
        self.over = False
        self.shown: set[int] = set()  # epochs that the run already had
        self.rows: list[dict[str, Any]] = []  # rows that are not in MLflow yet
        self.end: dict[str, Any] = {}

    def report(self, inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
        """Write the messages in `inbox` to MLflow until the training ends."""
        first, is_reported = inbox.get(), False
        if "record" not in first:
            return
        with contextlib.ExitStack() as stack:
            while not self.over:
                try:
                    self.write(first, stack)
                # No error of MLflow may affect the training.
                except Exception as error:
                    if not is_reported:
                        print(
                            describe_outage(describe_mlflow_error(error.__cause__ or error)),
                            file=sys.stderr,
                            flush=True,
                        )
                    is_reported = True
                    self.over = bool(self.end)
                if not self.over:
                    self.receive(inbox)

    def receive(self, inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
        """Wait for a message, then take all that have arrived."""
        while not self.end:
            message = inbox.get()
            if "row" in message:
                self.rows.append(message)
            else:
                self.end = message
            if inbox.empty():
                break

    def write(self, first: dict[str, Any], stack: contextlib.ExitStack) -> None:
        """Write the rows and the final status that MLflow does not have yet."""
        if not self.run:
            self.start_run(first, stack)
        if self.over:
            return
        assert self.store
        new = [row for row in self.rows if row["row"]["epoch"] not in self.shown]
        points = [point for row in new for point in runs.curve_points(row["row"], row["moment"])]
        runs.log_points(self.store.client, self.run, points)
        self.rows = []
        if self.end:
            self.store.client.set_terminated(self.run, self.end["status"], self.end.get("moment"))
            self.over = True

    def start_run(self, first: dict[str, Any], stack: contextlib.ExitStack) -> None:
        """Find or create the run, and finish at once if it already shows the complete training."""
        record = TrainingRecord.parse(json.dumps(first["record"]))
        params = config.load(self.root / "params.yaml")
        run = run_record.describe_training(record, {}, provenance.provenance_tags(self.root))
        home = project_root(self.root)
        with open_store(home, params["register"]["name"]) as store, contextlib.ExitStack() as lock:
            # The process that reported this training before it was killed may still be running.
            lock.enter_context(runs.run_lock(store, record.fingerprint, 2 * END_TIMEOUT_S))
            found = runs.start_run(store, run, f"{platform.node()} {first['process']}", first["moment"])
            if found:
                self.shown = runs.logged_epochs(store, found)
                stack.push(lock.pop_all())
        self.store, self.run, self.over = store, found or "", not found


if __name__ == "__main__":
    main()
