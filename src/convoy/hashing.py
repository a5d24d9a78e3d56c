"""Hashes: what a file is known and checked by."""

import hashlib
from pathlib import Path


def sha256(file: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
