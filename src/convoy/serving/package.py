"""Packages: a folder with a model and its server, which runs without convoy's other libraries."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

from convoy.core.errors import ConvoyError
from convoy.inference.library_copy import copy_library
from convoy.serving.loading import MODEL_CARD, LoadedModel
from convoy.serving.onnx_model import ONNX_FILE

# The parts of this library that the server needs.
PACKAGED = (
    "__init__.py",
    "core/__init__.py",
    "core/artifact_names.py",
    "core/errors.py",
    "core/hashing.py",
    "core/malloc.py",
    "data/__init__.py",
    "data/completeness.py",
    "data/image_io.py",
    "inference/__init__.py",
    "inference/image_text.py",
    "serving",
    "tracking/__init__.py",
    "tracking/tags.py",
)
# The libraries that it needs, which are installed in the versions that are installed here.
REQUIREMENTS = ("fastapi", "fastapi-offline", "httptools", "numpy", "onnxruntime", "pi-heif", "pillow",
                "prometheus-client", "pydantic", "python-multipart", "simplejpeg", "uvicorn", "uvloop")  # fmt: skip
DOCKERFILE = """\
FROM python:3.12-slim
RUN useradd --create-home server
WORKDIR /server
COPY requirements.txt .
RUN pip install --no-cache-dir --requirement requirements.txt
COPY . .
USER server
EXPOSE 8000
HEALTHCHECK CMD python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready')"
# Start it with: docker run --env CONVOY_API_KEY=... --publish 8000:8000 IMAGE
CMD ["python", "-m", "convoy.serving", ".", "--host", "0.0.0.0"]
"""
README = """\
# {name}, version {version}

An image classifier of {count} classes ({architecture}) with its server.

    python -m venv .venv
    .venv/bin/pip install --requirement requirements.txt
    .venv/bin/python -m convoy.serving .

The server then has a page at http://127.0.0.1:8000/ and describes its API at /docs:

    curl -F file=@image.jpg http://127.0.0.1:8000/predict

In a container: `docker build -t {tag} .`, and `docker run --env CONVOY_API_KEY=... --publish 8000:8000 {tag}`.
`model.json` lists the classes, and what the model expects of an image.
"""


def write_package(loaded: LoadedModel, onnx: Path, library: Path, folder: Path) -> int:
    """Write a package.

    Args:
        loaded: The model.
        onnx: Its ONNX file.
        library: The folder of this library.
        folder: The folder to create.

    Returns:
        The size of the package in bytes.

    Raises:
        ConvoyError: If the folder exists, or the model has no ONNX file.
    """
    if folder.exists():
        raise ConvoyError(f"{folder} exists: remove it, or name another folder")
    if not onnx.is_file():
        raise ConvoyError(f"{loaded.source} has no {ONNX_FILE}, which a package needs: `convoy run` prints why")
    # So that a folder which looks like a package is complete.
    scratch = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        shutil.copyfile(onnx, scratch / ONNX_FILE)
        (scratch / MODEL_CARD).write_text(json.dumps(describe(loaded), indent=2, ensure_ascii=False) + "\n")
        copy_library(library, PACKAGED, scratch / library.name)
        lines = [f"{name}=={version(name)}\n" for name in REQUIREMENTS]
        (scratch / "requirements.txt").write_text("".join(lines))
        (scratch / "Dockerfile").write_text(DOCKERFILE)
        (scratch / ".dockerignore").write_text(".venv\n__pycache__\n")
        facts = {"name": loaded.name, "version": loaded.version, "architecture": loaded.model.architecture}
        tag = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in loaded.name).lower()
        text = README.format(**facts, count=len(loaded.model.classes), tag=tag.strip("-") or "model")
        (scratch / "README.md").write_text(text)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def describe(loaded: LoadedModel) -> dict[str, object]:
    """Describe the model of a package: where it comes from, its classes and its preprocessing."""
    spec = loaded.model.spec
    return {
        "name": loaded.name,
        "version": loaded.version,
        "source": loaded.source,
        "sha256": loaded.sha256,
        "architecture": loaded.model.architecture,
        "classes": loaded.model.classes,
        "preprocessing": {
            "size": spec.size,
            "channels": spec.channels,
            "longest_side": spec.longest_side,
            "steps": [
                "turn the image upright, on a white background",
                f"reduce it to {spec.longest_side} pixels on its longest side, bilinear with anti-aliasing",
                f"convert it to {'grey' if spec.channels == 1 else 'RGB'}",
                f"resize its middle square to {spec.size}x{spec.size} pixels, bilinear with anti-aliasing",
            ],
        },
    }
