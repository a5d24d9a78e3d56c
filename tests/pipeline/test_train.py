"""What the train stage says about the machine."""

import dataclasses

import psutil
import pytest

from pipeline import train
from record_factory import make_record


@pytest.mark.parametrize(
    ("accelerator", "threads", "load", "advised"),
    [("cpu", 2, 75.0, 1), ("cpu", 4, 25.0, 3), ("cpu", 4, 2.0, 0), ("cpu", 1, 100.0, 0), ("gpu", 2, 100.0, 0),
     ("cpu", 4, 100.0, 1)],
)  # fmt: skip
def test_busy_machine_is_reported_before_several_threads_wait(
    accelerator: str,
    threads: int,
    load: float,
    advised: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: load)
    hardware = dataclasses.replace(make_record().trainer, accelerator=accelerator, threads=threads)
    train.warn_if_busy(hardware)
    output = capsys.readouterr().out
    assert ("set trainer.threads=" in output) == bool(advised)
    assert not advised or f"trainer.threads={advised}\n" in output
