"""The command `retrain`: its exit status is that of its decision."""

from pathlib import Path

import pytest

from pipeline import retrain as command
from pipeline.retrain import retrain


@pytest.mark.parametrize(
    ("decision", "status", "zero_status"),
    [
        ("PROMOTE", 0, 0),
        ("FAILED", 1, 1),
        *((decision, 3, 0) for decision in ("HOLD", "REJECT", "KEPT")),
        *((decision, 4, 0) for decision in ("UNCHANGED", "WAIT")),
    ],
)
def test_exit_zero_hides_a_decision_but_no_failure(
    decision: str, status: int, zero_status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_retrain", lambda *_, **__: decision)
    assert retrain(tmp_path) == status
    assert retrain(tmp_path, exit_zero=True) == zero_status
