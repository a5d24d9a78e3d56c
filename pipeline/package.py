"""The package command: it writes a folder with a model and its server."""

from pathlib import Path

import convoy
from convoy.core.errors import ConvoyError
from convoy.serving import loading, package
from convoy.serving.onnx_model import ONNX_FILE
from pipeline.model_choice import choose_model


def write_package(root: Path, folder: Path, model: str | None) -> None:
    """Write a package and print its size.

    Args:
        root: The project folder.
        folder: The folder to create.
        model: models:/NAME@ALIAS, models:/NAME/VERSION or a folder; None for the champion.

    Raises:
        ConvoyError: If there is no such model, it has no ONNX file, or the folder exists.
    """
    uri, project = choose_model(root, model)
    if loading.is_registry_uri(uri):
        cache = loading.open_cache(project)
        version = cache.find(uri)
        if f"artifacts/{ONNX_FILE}" not in version.checksums:
            raise ConvoyError(f"{version.uri} has no {ONNX_FILE}, which a package needs: `convoy run` prints why")
        loaded = loading.load_version(cache, version, threads=1)
        onnx = cache.fetch(version) / ONNX_FILE
    else:
        loaded = loading.load_folder(Path(uri), threads=1)
        onnx = loading.find_onnx(Path(uri))
    size = package.write_package(loaded, onnx, Path(convoy.__file__).parent, folder)
    print(f"wrote {folder}: {loaded.name} {loaded.version}, {size / 1e6:.1f} MB; its README.md says how to start it")
