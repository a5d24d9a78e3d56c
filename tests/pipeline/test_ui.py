"""The MLflow UI: it takes the next free port."""

import socket

import pytest

from pipeline import ui


def test_taken_port_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind((ui.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(ui, "FIRST_PORT", port)
        assert ui.find_free_port() > port
        assert ui.wait_for_port(port, seconds=1)
    assert not ui.wait_for_port(port, seconds=0.1)
