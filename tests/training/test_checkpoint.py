"""The checkpoint: it is always complete and replaced atomically."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from convoy.training.checkpoint import Checkpoint


def test_last_saved_checkpoint_is_loaded(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "deep" / "last.pt")
    for step in (1, 2):
        checkpoint.save({"step": step, "weights": {"layer": torch.full((2, 2), float(step))}})
    state = checkpoint.load()
    assert state is not None
    assert state["step"] == 2
    assert torch.equal(state["weights"]["layer"], torch.full((2, 2), 2.0))
    assert [file.name for file in checkpoint.file.parent.iterdir()] == ["last.pt"]


def test_missing_checkpoint_loads_as_none(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path / "last.pt").load() is None


def test_broken_checkpoint_is_reported_and_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Checkpoint(tmp_path / "last.pt")
    checkpoint.save({"step": 1})
    checkpoint.file.write_bytes(checkpoint.file.read_bytes()[:-100])
    assert checkpoint.load() is None
    assert "last.pt can't be used, so the training starts from the beginning: " in capsys.readouterr().out


def test_flipped_bit_in_a_tensor_is_detected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Checkpoint(tmp_path / "last.pt")
    checkpoint.save({"weights": torch.full((1000,), 0.5)})
    spoiled = bytearray(checkpoint.file.read_bytes())
    spoiled[spoiled.index(torch.full((9,), 0.5).numpy().tobytes()) + 17] ^= 1
    checkpoint.file.write_bytes(spoiled)
    assert checkpoint.load() is None
    assert "can't be used, so the training starts from the beginning: " in capsys.readouterr().out


def test_code_in_a_malicious_checkpoint_is_never_run(tmp_path: Path) -> None:
    class Poison:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "poisoned"),)

    checkpoint = Checkpoint(tmp_path / "last.pt")
    torch.save({"step": Poison()}, checkpoint.file)
    assert checkpoint.load() is None
    assert not (tmp_path / "poisoned").exists()


def test_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tmp_path / "last.pt")
    checkpoint.save({"step": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"step": 2})
    assert checkpoint.load() == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_device_that_is_really_full_raises_an_os_error(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "last.pt")
    beside = checkpoint.file.with_suffix(f".{os.getpid()}")
    beside.symlink_to("/dev/full")  # the kernel's own full disk
    with pytest.raises(OSError):
        checkpoint.save({"weights": torch.zeros(100_000)})
    assert checkpoint.load() is None


def test_removed_checkpoint_leaves_no_file(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "identity" / "last.pt")
    checkpoint.save({"step": 1})
    checkpoint.file.with_suffix(".4711").write_bytes(b"half")  # of a process that was killed
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []
    checkpoint.remove()  # and again
