"""Checksums of files."""

import hashlib
from pathlib import Path


def sha256(file: Path) -> str:
    """Return the SHA-256 checksum of a file as a hexadecimal string."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
