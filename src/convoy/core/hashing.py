"""Checksums of files and values."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from convoy.core.errors import ConvoyError


def sha256(file: Path) -> str:
    """Return the SHA-256 checksum of a file as a hexadecimal string."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def hash_json(value: object) -> str:
    """Return the SHA-256 of a JSON-serializable value, whatever the order of its keys, as a hexadecimal string."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def verify_checksums(folder: Path, hashes: Mapping[str, str]) -> None:
    """Raise `ConvoyError` if a file in `folder` is missing or differs from its checksum.

    Args:
        folder: The folder of the files.
        hashes: The expected sha256 of each file, by its path in `folder`.
    """
    for file, digest in hashes.items():
        if not (folder / file).is_file():
            raise ConvoyError(f"{file} of the model is missing; nothing of the model was used")
        if sha256(folder / file) != digest:
            raise ConvoyError(f"{file} of the model was changed since it was registered; nothing of the model was used")
