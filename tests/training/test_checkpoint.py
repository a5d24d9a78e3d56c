"""The checkpoint: it is always complete and replaced atomically."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from convoy.training.checkpoint import AtomicCheckpointIO, read_checkpoint, remove_checkpoint
from convoy.training.module import ClassifierModule
from training_fixtures import build, train


def save(file: Path, **state: Any) -> None:
    AtomicCheckpointIO().save_checkpoint(state, file)


def read(file: Path) -> dict[str, Any] | None:
    return read_checkpoint(file, ClassifierModule(build()), max_epochs=3)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """The checkpoint of a training."""
    train(build(), checkpoint=tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_last_saved_checkpoint_is_the_only_file(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "last.ckpt"
    for step in (1, 2):
        save(file, step=step, weights=torch.full((2, 2), float(step)))
    assert torch.load(file, weights_only=True)["step"] == 2
    assert [other.name for other in file.parent.iterdir()] == ["last.ckpt"]


def test_missing_checkpoint_reads_as_none(tmp_path: Path) -> None:
    assert read(tmp_path / "last.ckpt") is None


def test_whole_checkpoint_is_read(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    state = read(written)
    assert state is not None
    assert state["epoch"] == 2  # counted from 0
    assert capsys.readouterr().out == ""


def test_broken_checkpoint_is_reported_and_not_used(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written.write_bytes(written.read_bytes()[:-100])
    assert read(written) is None
    assert "last.ckpt can't be used, so the training starts from the beginning: " in capsys.readouterr().out


def test_flipped_bit_in_a_tensor_is_detected(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoiled = bytearray(written.read_bytes())
    weights = torch.load(written, weights_only=True)["state_dict"]["classifier.c1.weight"]
    spoiled[spoiled.index(weights.numpy().tobytes()) + 17] ^= 1
    written.write_bytes(spoiled)
    assert read(written) is None
    assert "is damaged" in capsys.readouterr().out


def test_code_in_a_malicious_checkpoint_is_never_run(tmp_path: Path) -> None:
    class Poison:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "poisoned"),)

    torch.save({"callbacks": Poison()}, tmp_path / "last.ckpt")
    assert read(tmp_path / "last.ckpt") is None
    assert not (tmp_path / "poisoned").exists()


def test_full_disk_keeps_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "last.ckpt"
    save(file, step=1)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(file, step=2)
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert [other.name for other in tmp_path.iterdir()] == ["last.ckpt"]


def test_device_that_is_really_full_raises_an_os_error(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    file.with_suffix(f".{os.getpid()}").symlink_to("/dev/full")  # the kernel's own full disk
    with pytest.raises(OSError):
        save(file, weights=torch.zeros(100_000))
    assert not file.exists()


def test_removed_checkpoint_leaves_no_file(tmp_path: Path) -> None:
    file = tmp_path / "identity" / "last.ckpt"
    save(file, step=1)
    file.with_suffix(".4711").write_bytes(b"half")  # of a process that was killed
    remove_checkpoint(file)
    assert list(tmp_path.iterdir()) == []
    remove_checkpoint(file)  # and again
