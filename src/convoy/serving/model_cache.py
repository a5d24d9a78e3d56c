"""Cache of the files of registered versions, each verified by the sha256 that MLflow's database has of it."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from convoy.core.artifact_names import CALIBRATION, RECORD, WEIGHTS
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.serving import mlflow_client, version_store
from convoy.serving.onnx_model import ONNX_FILE
from convoy.serving.version_store import RegisteredVersion, UnsupportedStoreError

# The number of versions of a model that are kept.
MAX_VERSIONS = 3
# The file with the version that each alias named last.
ALIASES = "aliases.json"
# The files from which PyTorch restores a model that has no ONNX file.
TORCH_FILES = (RECORD, WEIGHTS, CALIBRATION)


class ModelCache:
    """Files of registered versions on the local disk.

    Args:
        folder: The folder of the cache.
        store: The URI of the tracking store.
    """

    def __init__(self, folder: Path, store: str) -> None:
        self.folder = folder
        self.store = store

    def find(self, uri: str) -> RegisteredVersion:
        """Find a registered version in the store, and remember it for times when the store can't be reached.

        Raises:
            ConvoyError: If there is no such version, or the store can't be reached (`StoreUnavailableError`).
        """
        try:
            version = version_store.find(self.store, uri)
        except UnsupportedStoreError:
            version = mlflow_client.find(self.store, uri)
        known, found = self._read_aliases(), dataclasses.asdict(version)
        if known.get(self._key(uri)) != found:
            _write(self.folder / ALIASES, json.dumps(known | {self._key(uri): found}, indent=2))
        return version

    def find_last(self, uri: str) -> RegisteredVersion | None:
        """Return the version that a URI named when it was last found, or None."""
        found = self._read_aliases().get(self._key(uri))
        return RegisteredVersion(**found) if found else None

    def fetch(self, version: RegisteredVersion) -> Path:
        """Return a folder with the verified files of a version, of which those that are missing are downloaded.

        Returns:
            A folder with `ONNX_FILE`, or with `TORCH_FILES` if the version has no ONNX file.

        Raises:
            ConvoyError: If a file is missing or was changed, or can't be fetched (`StoreUnavailableError`).
        """
        has_onnx = f"artifacts/{ONNX_FILE}" in version.checksums
        # Without the checksums in the name, another project's version of the same number would be overwritten.
        digest = version.checksums.get(f"artifacts/{ONNX_FILE if has_onnx else WEIGHTS}", "none")[:16]
        folder = self.folder / _file_name(version.name) / f"{version.version}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        for name in (ONNX_FILE,) if has_onnx else TORCH_FILES:
            self._fetch_file(version, name, folder / name)
        os.utime(folder)
        self._remove_old(folder)
        return folder

    def _fetch_file(self, version: RegisteredVersion, name: str, target: Path) -> None:
        path = f"artifacts/{name}"
        expected = version.checksums.get(path)
        if expected is None:
            raise ConvoyError(f"{version.uri} has no hash of {name}: register it again")
        if target.exists() and sha256(target) == expected:
            return
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            fetched = Path(scratch, name)
            try:
                version_store.download(self.store, version, path, fetched)
            except UnsupportedStoreError:
                mlflow_client.download(self.store, version, path, fetched)
            if sha256(fetched) != expected:
                raise ConvoyError(
                    f"{version.uri}: {name} of the model was changed since it was registered; nothing of the model was "
                    "used. Find out who changed it, and promote or train another"
                )
            fetched.replace(target)

    def _remove_old(self, current: Path) -> None:
        """Remove the versions of a model that were not used for the longest time."""
        others = [folder for folder in current.parent.iterdir() if folder != current]
        with contextlib.suppress(OSError):
            others.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
            for folder in others[MAX_VERSIONS - 1 :]:
                shutil.rmtree(folder)

    def _key(self, uri: str) -> str:
        """Return the name of an alias in `ALIASES`, without the store's password."""
        return f"{uri} {hashlib.sha256(self.store.encode()).hexdigest()[:16]}"

    def _read_aliases(self) -> dict[str, dict]:
        try:
            return dict(json.loads((self.folder / ALIASES).read_text()))
        except (OSError, ValueError):
            return {}


def _file_name(name: str) -> str:
    """Return a name of a folder for a model, whose name may hold any character."""
    return re.sub(r"[^\w.-]", "_", name)


def _write(file: Path, text: str) -> None:
    """Write a file at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as scratch:
        scratch.write(text)
    Path(scratch.name).replace(file)
