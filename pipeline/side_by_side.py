"""Training runs of several architectures side by side, each by a DVC process of its own.

The results are those of training runs one after the other: the number of threads, which decides them, follows from the
settings and the network alone.
"""

import collections
import contextlib
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from pipeline.dvc_process import forwarded_signals, start_dvc, terminate, wait_for_dvc
from pipeline.job_plan import Job, Machine

# DVC's advice after each command, which would be repeated for each architecture.
ADVICE = ("To track the changes with git", "Use `dvc push`")
# Time to read what an ended process has written; a process that it left behind may keep its output open.
READ_TIMEOUT_S = 1


def run_jobs(jobs: Sequence[Job], machine: Machine, limit: int | None, *, pull: bool) -> int:
    """Run jobs side by side, in their order, and return the first exit status of DVC that is not 0.

    After a failure no other job is started, and those that are running end as usual. Signals are handled as in
    `dvc_process.run_dvc`.

    Args:
        jobs: The jobs to run.
        machine: The machine, which allows no more jobs at a time than use its processors or GPUs.
        limit: The largest number of jobs at a time; None for as many as the machine allows.
        pull: Whether to reuse results that the DVC remote has.
    """
    waiting, running = collections.deque(jobs), dict[str, _Running]()
    processes: list[subprocess.Popen] = []
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    statuses: list[int] = []
    with forwarded_signals(processes) as received, _show_status(running):
        while running or waiting:
            used = sum(each.job.units for each in running.values())
            is_free = not running or (used + waiting[0].units <= machine.units if waiting else False)
            if waiting and is_free and (limit is None or len(running) < limit):
                job = waiting.popleft()
                running[job.name] = _Running(job, _choose_gpus(job, machine, running), pull, ended)
                processes.append(running[job.name].process)
                # The signal arrived before the process was started.
                if received:
                    terminate(processes[-1].pid)
                continue
            done = running[ended.get()]
            statuses.append(wait_for_dvc(done.process, received))
            done.finish_reading()
            processes.remove(done.process)
            del running[done.job.name]
            if received or any(statuses):
                waiting.clear()
    return next((status for status in statuses if status), 0)


def _choose_gpus(job: Job, machine: Machine, running: Mapping[str, "_Running"]) -> tuple[str, ...]:
    taken = {gpu for each in running.values() for gpu in each.gpus}
    return tuple(gpu for gpu in machine.gpus if gpu not in taken)[: job.units]


class _Running:
    """A job whose DVC process is running, and the threads that show its output.

    Args:
        job: The job.
        gpus: The GPUs for it, as in CUDA_VISIBLE_DEVICES.
        pull: Whether to reuse results that the DVC remote has.
        ended: Receives the name of the job when its process has ended.
    """

    def __init__(self, job: Job, gpus: tuple[str, ...], pull: bool, ended: "queue.SimpleQueue[str]") -> None:
        self.job, self.gpus = job, gpus
        self.started = time.monotonic()
        self.progress = "starting"
        command = ["--wait-for-lock", "repro", *["--pull"] * pull, "--single-item"]
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        self.process = start_dvc(
            *command, f"train@{job.name}", f"evaluate@{job.name}", environment=environment, has_pipes=True
        )
        assert self.process.stdout and self.process.stderr
        self.readers = [
            threading.Thread(target=self._show, args=streams, daemon=True)
            for streams in ((self.process.stdout, "stdout"), (self.process.stderr, "stderr"))
        ]
        for reader in self.readers:
            reader.start()
        threading.Thread(target=self._wait, args=[ended], daemon=True).start()

    def _wait(self, ended: "queue.SimpleQueue[str]") -> None:
        self.process.wait()
        ended.put(self.job.name)

    def finish_reading(self) -> None:
        """Show the rest of the output."""
        for reader in self.readers:
            reader.join(READ_TIMEOUT_S)

    def _show(self, stream: IO[bytes], name: str) -> None:
        """Print lines to the stream `name` of this process; on a terminal an epoch's line is the status instead."""
        is_epoch, is_terminal = re.compile(rf"{re.escape(self.job.name)} +(epoch .*)"), sys.stdout.isatty()
        with stream:
            for line in stream:
                text = line.decode(errors="replace").rstrip()
                if name == "stdout" and text.startswith(ADVICE):
                    break
                if is_terminal and (epoch := is_epoch.fullmatch(text)):
                    self.progress = epoch[1]
                elif text:
                    # The name of the stream is looked up here, because `_show_status` replaces the streams.
                    print(text, file=getattr(sys, name), flush=True)
            # DVC would fail if it could not write the rest.
            collections.deque(stream, maxlen=0)


@contextlib.contextmanager
def _show_status(running: dict[str, _Running]) -> Iterator[None]:
    """Show a line for each running job at the bottom of the terminal, if standard output is one."""
    if not sys.stdout.isatty():
        yield
        return
    from rich.live import Live
    from rich.text import Text

    def describe() -> Text:
        lines = [
            f"{name}  {time.monotonic() - each.started:.0f} s  {each.progress}" for name, each in running.copy().items()
        ]
        return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")

    with Live(get_renderable=describe, refresh_per_second=2, transient=True):
        yield
