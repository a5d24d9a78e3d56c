"""Log of predictions, as Parquet files in a folder, for monitoring and for the next round of labelling.

What was predicted is first appended to a text file, once a second, so that a killed server loses at most the last
second; from time to time, and at the next start, such a file becomes a Parquet file.
"""

import asyncio
import base64
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from convoy.core.errors import ConvoyError, describe_error

# Seconds between two writes.
WRITE_INTERVAL_S = 1.0
# A Parquet file is written when the text file has one of these: age in seconds, rows, bytes.
MAX_AGE_S, MAX_ROWS, MAX_BYTES = 3600.0, 50_000, 64 << 20
# Predictions are dropped, and counted, if more bytes of images wait to be written, as on a disk that has failed.
MAX_WAITING_BYTES = 128 << 20
DAY_S = 86_400
# The columns besides the time and the image.
COLUMNS = ("sha256", "label", "probability", "version")

log = logging.getLogger("convoy.serving")


@dataclasses.dataclass(frozen=True)
class LogEntry:
    """A prediction."""

    image: bytes
    label: str
    probability: float
    version: str
    time: float = dataclasses.field(default_factory=time.time)


class RequestLog:
    """Writes predictions to a folder.

    Args:
        folder: The folder, which other servers may use too.
        days: Files older than this are removed.
        keep_images: Whether to write the image files as well.

    Raises:
        ConvoyError: If the folder can't be written.
    """

    def __init__(self, folder: Path, days: int, *, keep_images: bool) -> None:
        self.folder = folder
        self.days = days
        self.keep_images = keep_images
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._waiting: list[LogEntry] = []
        self._waiting_bytes = 0
        self._text: IO[bytes] | None = None
        self._text_rows = 0
        self._text_since = 0.0
        self._has_failed = False
        try:
            # pyarrow is not part of a package without a log.
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ConvoyError("a log needs pyarrow: install it with `pip install pyarrow`") from error
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._finish_left_files()
            self._remove_old()
        except OSError as error:
            raise ConvoyError(f"{folder}: can't write a log there ({describe_error(error)})") from error

    def add(self, entries: Sequence[LogEntry]) -> int:
        """Add predictions to those that will be written, and return how many of them are dropped instead."""
        size = sum(len(entry.image) for entry in entries)
        with self._lock:
            if self._waiting_bytes + size > MAX_WAITING_BYTES:
                return len(entries)
            self._waiting += entries
            self._waiting_bytes += size
        return 0

    async def write_regularly(self) -> None:
        """Write what waits once a second, until this is cancelled."""
        while True:
            await asyncio.sleep(WRITE_INTERVAL_S)
            await asyncio.to_thread(self.write)

    def write(self) -> None:
        """Write what waits. An error of the disk is logged; what could not be written is tried again."""
        with self._writing:
            with self._lock:
                entries, self._waiting, self._waiting_bytes = self._waiting, [], 0
            try:
                if entries:
                    self._append(entries)
                    entries = []
                if self._is_due():
                    self._finish_text()
                    self._remove_old()
                self._has_failed = False
            except OSError as error:
                if not self._has_failed:
                    log.warning("%s: can't write the log (%s)", self.folder, describe_error(error))
                self._has_failed = True
                with self._lock:
                    self._waiting = entries + self._waiting
                    self._waiting_bytes += sum(len(entry.image) for entry in entries)

    def close(self) -> None:
        """Write what waits, and turn the text file into a Parquet file."""
        self.write()
        with contextlib.suppress(OSError):
            self._finish_text()

    def _append(self, entries: Sequence[LogEntry]) -> None:
        if self._text is None:
            name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.jsonl"
            self._text = (self.folder / name).open("ab", buffering=0)
            # Another server that starts leaves a locked file alone.
            fcntl.flock(self._text, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._text_since = time.monotonic()
            self._text_rows = 0
        lines = b"".join(json.dumps(self._describe(entry)).encode() + b"\n" for entry in entries)
        end = self._text.tell()
        try:
            # A raw file may write only a part.
            view = memoryview(lines)
            while view:
                view = view[self._text.write(view) :]
        except OSError:
            # On a full disk, half a line would be followed by the next one.
            self._text.truncate(end)
            raise
        self._text_rows += len(entries)

    def _describe(self, entry: LogEntry) -> dict[str, str | float]:
        row: dict[str, str | float] = {
            "time": entry.time,
            "sha256": hashlib.sha256(entry.image).hexdigest(),
            "label": entry.label,
            "probability": entry.probability,
            "version": entry.version,
        }
        return row | {"image": base64.b64encode(entry.image).decode()} if self.keep_images else row

    def _is_due(self) -> bool:
        return self._text is not None and (
            self._text_rows >= MAX_ROWS
            or self._text.tell() >= MAX_BYTES
            or time.monotonic() - self._text_since >= MAX_AGE_S
        )

    def _finish_text(self) -> None:
        """Turn the text file into a Parquet file."""
        if self._text:
            _to_parquet(Path(self._text.name))
            self._text.close()
            self._text = None

    def _finish_left_files(self) -> None:
        """Turn the text files of servers that were killed into Parquet files."""
        for file in sorted(self.folder.glob("*.jsonl")):
            with file.open("rb") as opened, contextlib.suppress(BlockingIOError):
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _to_parquet(file)

    def _remove_old(self) -> None:
        limit = time.time() - self.days * DAY_S
        for file in self.folder.glob("*.parquet"):
            if file.stat().st_mtime < limit:
                file.unlink(missing_ok=True)


def read_images(folder: Path, limit: int) -> dict[str, bytes]:
    """Return the newest different image files in a log, by their sha256.

    Args:
        folder: The folder of the log.
        limit: How many to return at most.

    Raises:
        ConvoyError: If the log was written without images.
    """
    import pandas as pd

    images: dict[str, bytes] = {}
    # The names of files begin with the time.
    for file in sorted((*folder.glob("*.jsonl"), *folder.glob("*.parquet")), reverse=True):
        rows = list(_read_rows(file)) if file.suffix == ".jsonl" else pd.read_parquet(file).to_dict("records")
        for row in reversed(rows):
            if "image" not in row:
                raise ConvoyError(f"{file} holds no images: start the server with --log-images")
            content = row["image"]
            images.setdefault(row["sha256"], base64.b64decode(content) if isinstance(content, str) else content)
            if len(images) == limit:
                return images
    return images


def _to_parquet(file: Path) -> None:
    """Turn a text file into a Parquet file, and remove it."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = list(_read_rows(file))
    if rows:
        times = pa.array([round(row["time"] * 1000) for row in rows], pa.timestamp("ms", "UTC"))
        columns = {
            "time": times,
            **{key: [row[key] for row in rows] for key in rows[0] if key not in ("time", "image")},
        }
        if "image" in rows[0]:
            columns["image"] = pa.array([base64.b64decode(row["image"]) for row in rows], pa.binary())
        scratch = file.with_suffix(".partial")
        parquet.write_table(pa.table(columns), scratch, compression="zstd")
        scratch.replace(file.with_suffix(".parquet"))
    file.unlink()


def _read_rows(file: Path) -> Iterator[dict]:
    with file.open("rb") as lines:
        for line in lines:
            # A killed server may leave half a line.
            with contextlib.suppress(ValueError):
                yield json.loads(line)
