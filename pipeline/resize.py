"""The resize stage, which prepares the images once more for each further size that a network has."""

import json
import os
from pathlib import Path

from convoy.core.artifact_names import MANIFEST
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256, verify_checksums
from convoy.data.cache import CacheDir
from convoy.data.packed.packed_dataset import PackedDataset
from convoy.data.preprocessing import prepare_size
from convoy.data.resize import fingerprint_code
from pipeline.stage import Stage, main


def resize(stage: Stage) -> None:
    """Resize the images to each size in the settings of the networks; the splits stay those of preprocess."""
    for size in sorted({settings["size"] for settings in stage.section("model").values()}):
        folder = stage.scratch / str(size)
        folder.mkdir()
        # The images of preprocess.size are in the output of preprocess.
        if size != stage.section("preprocess")["size"]:
            write_size(stage, size, folder)
        checksums = {file.name: sha256(file) for file in sorted(folder.iterdir())}
        (folder / MANIFEST).write_text(json.dumps(checksums, indent=2) + "\n")


def write_size(stage: Stage, size: int, folder: Path) -> None:
    """Write the images of one size into a folder, or link those of the last run if their inputs are unchanged.

    Args:
        stage: The running stage.
        size: Height and width, in pixels.
        folder: The folder to write into.
    """
    inputs = {name: sha256(stage.root / "artifacts" / name / MANIFEST) for name in ("fetch", "preprocess")}
    inputs["code"] = fingerprint_code(size)
    # Beside the folder, because networks depend on its files alone.
    inputs_file, earlier = f"{size}.json", stage.folder / str(size)
    (stage.scratch / inputs_file).write_text(json.dumps(inputs, indent=2) + "\n")
    if read_inputs(stage.folder / inputs_file, earlier) == inputs:
        for file in earlier.iterdir():
            if file.name != MANIFEST:
                os.link(file, folder / file.name)
        return
    packed, prepared = PackedDataset.load(stage.input("fetch")), stage.input("preprocess")
    cache = CacheDir(stage.project_root / f"artifacts/.cache/resized-{size}" / packed.name, earlier)
    for note in prepare_size(packed, prepared, size, folder, cache):
        print(f"note: {note}")


def read_inputs(file: Path, folder: Path) -> dict[str, str] | None:
    """Return what the images in a folder were made of, or None if they are not there or are damaged."""
    try:
        verify_checksums(folder, json.loads((folder / MANIFEST).read_text()))
        return json.loads(file.read_text())
    except (ConvoyError, OSError, ValueError):
        return None


if __name__ == "__main__":
    main("resize", resize)
