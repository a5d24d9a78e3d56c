"""Synchronisation of distributed training processes: the step to start from, when to save, and when to exit."""

import time

import torch
from pytorch_lightning.strategies import Strategy

from convoy.core.errors import ConvoyError

# Interval at which the processes agree on whether to save and whether to exit.
SYNC_INTERVAL_S = 0.5  # seconds
# Longest interval, for steps that take almost no time.
MAX_SYNC_STEPS = 1000


class ProcessSync:
    """Agreement after certain steps of an epoch, about every `SYNC_INTERVAL_S` seconds of the slowest process.

    Args:
        strategy: Lightning's strategy, which communicates with the other processes.
        step: Completed steps in the epoch; the processes first agree after the next one.
    """

    def __init__(self, strategy: Strategy, step: int) -> None:
        self.strategy = strategy
        self.last_sync = time.monotonic(), step
        self.next_sync = step + 1

    def agree(self, step: int, is_save_due: bool, was_terminated: bool) -> tuple[bool, bool]:
        """Return whether any process wants to save, and whether any process has received SIGTERM.

        All processes call this after the same step, which `next_sync` is set to.

        Args:
            step: Completed steps in the epoch.
            is_save_due: Whether this process wants to save.
            was_terminated: Whether this process has received SIGTERM.
        """
        now, (before, last_step) = time.monotonic(), self.last_sync
        requests = torch.tensor([is_save_due, was_terminated, (now - before) / (step - last_step)])
        maxima = self.strategy.reduce(requests.to(self.strategy.root_device), reduce_op="max")
        save, terminate, seconds_per_step = maxima.tolist()
        self.last_sync = now, step
        self.next_sync = step + max(1, min(MAX_SYNC_STEPS, int(SYNC_INTERVAL_S / seconds_per_step)))
        return bool(save), bool(terminate)


def check_same_step(strategy: Strategy, steps_done: int) -> None:
    """Raise ConvoyError if processes that train together start at different steps."""
    extremes = torch.tensor([steps_done, -steps_done], device=strategy.root_device)
    last, first = strategy.reduce(extremes, reduce_op="max").tolist()
    if last != -first:
        raise ConvoyError(
            f"the machines begin at different steps, {-first} and {last}, because not all have the checkpoint: put "
            "artifacts/.cache/checkpoints on a disk that they share, or remove it on all of them"
        )
