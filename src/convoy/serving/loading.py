"""Loading of a model by its URI or from a folder, ready to predict."""

import dataclasses
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.serving import onnx_model
from convoy.serving.model_cache import ModelCache
from convoy.serving.onnx_model import ONNX_FILE, OnnxModel, ServedModel
from convoy.serving.torch_model import TorchModel
from convoy.serving.version_store import RegisteredVersion, StoreUnavailableError, tracking_uri

# The file of a package with the name, the version and the checksum of its model.
MODEL_CARD = "model.json"
# Where the files of registered versions are kept, in the project folder.
CACHE_FOLDER = "artifacts/.cache/served"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to predict, and where it comes from."""

    model: ServedModel
    name: str
    version: str
    source: str  # the URI or the folder
    sha256: str  # of the ONNX file, "" if there is none
    loaded_at: str  # ISO 8601

    def describe(self) -> dict[str, Any]:
        """Describe the model in an answer."""
        spec = self.model.spec
        return {
            "name": self.name,
            "version": self.version,
            "source": self.source,
            "sha256": self.sha256,
            "architecture": self.model.architecture,
            "runtime": self.model.runtime,
            "classes": self.model.classes,
            "size": spec.size,
            "channels": spec.channels,
            "loaded_at": self.loaded_at,
        }


def load_model(uri: str, project: Path, threads: int) -> LoadedModel:
    """Load a model, from a local folder or from MLflow, or from the cache if MLflow can't be reached.

    Args:
        uri: A folder with an ONNX file, models:/NAME@ALIAS or models:/NAME/VERSION.
        project: The project folder.
        threads: The number of threads of a prediction.

    Raises:
        ConvoyError: If there is no such model, or it can't be loaded.
    """
    if not is_registry_uri(uri):
        return load_folder(Path(uri), threads)
    cache = open_cache(project)
    try:
        version = cache.find(uri)
    except StoreUnavailableError:
        last = cache.find_last(uri)
        if last is None:
            raise
        version = last
    return load_version(cache, version, threads)


def is_registry_uri(uri: str) -> bool:
    """Return whether a URI names a registered model and not a folder."""
    return uri.startswith("models:")


def has_alias(uri: str) -> bool:
    """Return whether a URI names an alias, which may later name another version."""
    return is_registry_uri(uri) and "@" in uri


def open_cache(project: Path) -> ModelCache:
    """Return the cache of registered versions of a project."""
    return ModelCache(project / CACHE_FOLDER, tracking_uri(project))


def load_version(cache: ModelCache, version: RegisteredVersion, threads: int) -> LoadedModel:
    """Load and check a registered version.

    Raises:
        ConvoyError: If a file is missing or was changed, or the model can't be run.
    """
    folder = cache.fetch(version)
    digest = version.checksums.get(f"artifacts/{ONNX_FILE}", "")
    try:
        return _load(folder, version.name, version.version, version.uri, digest, threads)
    except ConvoyError as error:
        raise ConvoyError(f"{version.uri}: {error}".replace(f"{folder}{os.sep}", "")) from error


def load_folder(folder: Path, threads: int) -> LoadedModel:
    """Load and check a model in a folder that `convoy package` made, or that was downloaded from MLflow.

    Raises:
        ConvoyError: If the folder has no ONNX file, or the file differs from the checksum in the folder.
    """
    file = find_onnx(folder)
    digest = sha256(file)
    card = read_card(file.parent)
    if card.get("sha256", digest) != digest:
        raise ConvoyError(f"{file} differs from its checksum in {MODEL_CARD}: package the model again")
    name, version = card.get("name", folder.resolve().name), card.get("version", digest[:8])
    return _load(file.parent, name, version, str(folder), digest, threads)


def find_onnx(folder: Path) -> Path:
    """Return the ONNX file in a folder.

    Raises:
        ConvoyError: If there is none.
    """
    found = [file for file in (folder / ONNX_FILE, folder / "artifacts" / ONNX_FILE) if file.is_file()]
    if not found:
        raise ConvoyError(
            f"{folder} has no {ONNX_FILE}: give a folder of `convoy package`, or models:/NAME@ALIAS or "
            "models:/NAME/VERSION"
        )
    return found[0]


def read_card(folder: Path) -> dict[str, str]:
    """Read the description of the model in a package, empty if there is none."""
    file = folder / MODEL_CARD
    try:
        return dict(json.loads(file.read_text())) if file.exists() else {}
    except ValueError as error:
        raise ConvoyError(f"{file} is broken ({error}): package the model again") from error


def _load(folder: Path, name: str, version: str, source: str, digest: str, threads: int) -> LoadedModel:
    file = folder / ONNX_FILE
    model: ServedModel = OnnxModel(file, threads) if file.exists() else TorchModel(folder, threads)
    onnx_model.check(model)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return LoadedModel(model, name, version, source, digest, now)
