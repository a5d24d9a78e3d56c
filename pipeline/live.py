"""live: a training as a run in MLflow while it lasts; no stage, but a process that the train stage starts.

It reads JSON lines: {"record": ..., "process": ...} as the training begins, {"row": ...} for each epoch and
{"status": ...} at its end, each with its "moment" in ms. Lines that end without a status mean a training that was
killed. MLflow may be slow, down or refuse: the training does not notice, one line says so, and `make sync` brings the
run there.
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

from convoy import config
from convoy.tracking import provenance, runs
from convoy.tracking.store import TrackingStore, describe_error, open_store
from pipeline.stage import project_root

GRACE = 30  # seconds for MLflow after the training's end
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


def main() -> None:
    """Show the training that standard input tells of as a run in MLflow."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.live", description=main.__doc__)
    parser.add_argument("architecture", help="for whoever looks at the list of processes")
    parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the end of the lines is its end
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)  # the training comes first
    os.environ.update(PATIENCE)
    inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=listen, args=[inbox], daemon=True).start()
    signal.signal(signal.SIGALRM, give_up)
    Reporter(Path.cwd()).report(inbox)


def listen(inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Take every line as soon as it comes, so that the pipe never fills while MLflow is slow."""
    with contextlib.suppress(ValueError):  # torn
        for line in sys.stdin:
            inbox.put(json.loads(line))
    inbox.put({"status": "KILLED"})  # unless a status came before
    signal.alarm(GRACE)


def give_up(*_: object) -> None:
    """MLflow has not answered in time after the training's end."""
    sys.exit(said(f"MLflow takes more than {GRACE} seconds"))


def said(reason: str) -> str:
    return f"convoy: live: {reason}; the training is not affected, and `make sync` brings its run there"


class Reporter:
    """What a training told, on its way to MLflow: what MLflow does not take is kept and tried again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store: TrackingStore | None = None
        self.run = ""
        self.over = False
        self.shown: set[int] = set()  # epochs that the run had before
        self.rows: list[dict[str, Any]] = []  # not there yet
        self.end: dict[str, Any] = {}

    def report(self, inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
        """Bring to MLflow what is in `inbox` and what comes, until the training ends."""
        begun, told = inbox.get(), False
        if "record" not in begun:
            return
        with contextlib.ExitStack() as held:
            while not self.over:
                try:
                    self.bring(begun, held)
                except Exception as error:  # whatever it is, the training must go on
                    if not told:
                        print(said(describe_error(error.__cause__ or error)), file=sys.stderr, flush=True)
                    told = True
                    self.over = bool(self.end)
                if not self.over:
                    self.take(inbox)

    def take(self, inbox: queue.SimpleQueue[dict[str, Any]]) -> None:
        """Wait for a message, and take all that are there."""
        while not self.end:
            message = inbox.get()
            if "row" in message:
                self.rows.append(message)
            else:
                self.end = message
            if inbox.empty():
                break

    def bring(self, begun: dict[str, Any], held: contextlib.ExitStack) -> None:
        """Write what is not there yet."""
        if not self.run:
            self.begin(begun, held)
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

    def begin(self, begun: dict[str, Any], held: contextlib.ExitStack) -> None:
        """Find or make the run. It is over at once where the run shows the whole training already."""
        record = begun["record"]
        params = config.load(self.root / "params.yaml")
        run = runs.run_in_training(record, {}, provenance.provenance_tags(self.root))
        home = project_root(self.root)
        with open_store(home, params["register"]["name"]) as store, contextlib.ExitStack() as alone:
            # whoever reported this training before it was killed may still be at it
            alone.enter_context(runs.sole_writer(store, record["identity"], 2 * GRACE))
            found = runs.start_run(store, run, f"{platform.node()} {begun['process']}", begun["moment"])
            if found:
                self.shown = runs.shown_epochs(store, found)
                held.push(alone.pop_all())
        self.store, self.run, self.over = store, found or "", not found


if __name__ == "__main__":
    main()
