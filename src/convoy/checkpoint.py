"""The checkpoint: the state of a training on disk, always whole, from which it goes on to the same bits."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch


class Checkpoint:
    """One file, replaced in one step: whoever reads it finds the last state that was written whole, or none."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def save(self, state: dict[str, Any]) -> None:
        """Write tensors and plain values. Raises OSError where it can't; then the state before is still there."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        beside = self.file.with_suffix(f".{os.getpid()}")  # on the same file system, so that it can take the name
        try:
            with beside.open("wb") as opened:
                torch.save(state, opened)
                opened.flush()
                os.fsync(opened.fileno())
            beside.replace(self.file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(*getattr(error.__context__, "args", (str(error),))) from error
        finally:
            beside.unlink(missing_ok=True)
        folder = os.open(self.file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too
        finally:
            os.close(folder)

    def load(self) -> dict[str, Any] | None:
        """The last state, its tensors on the CPU; None where there is none, or none that can be read."""
        try:
            with zipfile.ZipFile(self.file) as archive:  # which has a checksum for each tensor, that torch ignores
                if spoiled := archive.testzip():
                    raise ValueError(f"{spoiled} is damaged")
            return torch.load(self.file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None
        except Exception as error:  # torch raises whatever a broken file leads it to
            print(f"{self.file} can't be read, so the training starts anew ({type(error).__name__})", flush=True)
            return None

    def remove(self) -> None:
        """Remove the file, and its folder where nothing else is in it."""
        self.file.unlink(missing_ok=True)
        for left in self.file.parent.glob(f"{self.file.stem}.*"):
            left.unlink()  # of a process that was killed while it wrote
        if self.file.parent.is_dir() and not any(self.file.parent.iterdir()):
            self.file.parent.rmdir()
