"""Credentials in the environment, as a job in CI sets them."""

import os
import stat
from pathlib import Path

import pytest

from pipeline.credentials import usable_credentials


def test_empty_variables_of_missing_secrets_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    with usable_credentials():
        assert "AWS_DEFAULT_REGION" not in os.environ
        assert os.environ["AWS_ACCESS_KEY_ID"] == "key"


def test_google_key_is_a_private_file_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_CREDENTIALS", '{"type": "service_account"}')
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
    with usable_credentials():
        file = Path(os.environ["GOOGLE_APPLICATION_CREDENTIALS"])
        assert file.read_text() == '{"type": "service_account"}'
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert not file.exists()
