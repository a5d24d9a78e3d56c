"""The base of all stages: access to declared settings and inputs, and atomic publication of complete outputs."""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from filelock import FileLock, Timeout

from convoy.core import config
from convoy.core.artifact_names import MANIFEST
from convoy.core.errors import ConvoyError
from convoy.core.hashing import hash_json, sha256
from convoy.core.yaml_parser import parse_yaml
from pipeline import signals
from pipeline.errors import exit_on_error, explain_system_errors

Schema = TypeVar("Schema")
# Environment variables in which torchrun, Lightning and Slurm set the rank of a process. Slurm's comes last, because
# in an interactive Slurm shell it is 0 for every process that Lightning starts.
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
MAX_PRINTED = 20  # messages of one kind


class Stage:
    """A running stage of the pipeline, with the settings, inputs and output folder that `dvc.yaml` declares.

    Args:
        root: The project folder.
        name: The name of the stage in `dvc.yaml`, such as "train".
        foreach_key: The key of a foreach stage, such as "lenet" in `train@lenet`; "" for other stages.
    """

    def __init__(self, root: Path, name: str, foreach_key: str = "") -> None:
        self.root = root
        self.project_root = project_root(root)
        # This is read first because its error message explains that `root` is not a project folder.
        self.params = config.load(root / "params.yaml")
        self.foreach_key = foreach_key
        self.name = f"{name}@{foreach_key}" if foreach_key else name
        stage = parse_yaml((root / "dvc.yaml").read_text())["stages"][name]
        declared = stage.get("do", stage)
        self.sections = [self._interpolate(section) for section in declared.get("params", [])]
        self.deps = [self._interpolate(dep) for dep in declared.get("deps", [])]
        self.folder = root / "artifacts" / name / foreach_key
        # In distributed training every process runs the stage. Only the process of rank 0 publishes its outputs.
        self.rank = next((int(os.environ[name]) for name in RANKS if os.environ.get(name)), 0)
        self.scratch = root / "artifacts" / ".scratch" / (f"{self.name}.{self.rank}" if self.rank else self.name)
        # Holds the previous version of the output folder while the new one is moved into place.
        self.previous = self.scratch.with_name(f"{self.scratch.name}.before")
        self.verified: set[str] = set()  # inputs whose checksums were verified
        self.on_published: list[Callable[[], None]] = []  # called after the outputs are published

    def _interpolate(self, text: str) -> str:
        """Replace `${key}` and `${item.x}` in a foreach stage as DVC does."""
        item = self.params.get("model", {}).get(self.foreach_key, {})
        text = text.replace("${key}", self.foreach_key)
        return re.sub(r"\$\{item\.(\w+)\}", lambda match: str(item.get(match[1], "")), text)

    def section(self, name: str) -> Any:
        """Return a section of params.yaml by its dotted name.

        Args:
            name: The dotted name of the section, such as "model.lenet".

        Raises:
            ConvoyError: If dvc.yaml does not list the section in the params of this stage, or params.yaml lacks it.
        """
        if name not in self.sections:
            raise ConvoyError(f"stage {self.name} reads {name!r}: add it to the stage's params in dvc.yaml")
        values: Any = self.params
        for key in name.split("."):
            if not isinstance(values, Mapping) or key not in values:
                raise ConvoyError(f"params.yaml has no {name}: compose it again with `convoy settings compose`")
            values = values[key]
        return values

    def validate(self, schema: type[Schema], name: str) -> Schema:
        """Return a section of params.yaml, validated as an instance of `schema`."""
        return config.validate(schema, self.section(name), name)

    def input(self, name: str, *, only: Collection[str] = ()) -> Path:
        """Return the output folder of an earlier stage after verifying the checksums of its files.

        Args:
            name: The folder relative to artifacts/, such as "preprocess" or "train/lenet".
            only: Names of the files to verify; by default all, and otherwise no other file is opened.

        Raises:
            ConvoyError: If the folder is missing, incomplete or was modified.
        """
        folder = self.root / "artifacts" / name
        if name in self.verified:
            return folder
        if fault := self._find_fault(folder, only):
            stage = name.partition("/")[0] if name.startswith("resize/") else name.replace("/", "@")
            damaged = damaged_objects(self.root, stage)
            cause = ", and DVC's cache holds it damaged" if damaged else ""
            removed = [folder, *damaged] if damaged or (folder / MANIFEST).exists() else []
            removal = shlex.join(["rm", "-rf", *(_relative(path, self.root) for path in removed)]) + " && "
            raise ConvoyError(f"{fault}{cause}: run `{removal if removed else ''}dvc repro {stage}`")
        if not only:
            self.verified.add(name)
        return folder

    def images(self, architecture: str = "") -> Path:
        """Return the folder with the images at the size of an architecture, after verifying their checksums.

        Args:
            architecture: The name of the architecture; by default that of this foreach stage.
        """
        return self.input(self.images_name(architecture))

    def images_name(self, architecture: str = "") -> str:
        """Return the name of the folder of `images`, relative to artifacts/."""
        return find_images_name(self.params, architecture or self.foreach_key)

    def _find_fault(self, folder: Path, only: Collection[str]) -> str:
        """Return a description of how an output folder deviates from its manifest, or "" if it does not."""
        path = _relative(folder, self.root)
        try:
            checksums = json.loads((folder / MANIFEST).read_text())
            for file in only or checksums.keys():
                if not (folder / file).is_file() or sha256(folder / file) != checksums.get(file):
                    return f"{path}/{file} is not what its stage wrote"
        except FileNotFoundError:
            return f"{path}/ is missing or incomplete"
        except (ValueError, AttributeError, TypeError):
            return f"{path}/{MANIFEST} is not what its stage wrote"
        return ""

    def fingerprint(self, *more: object) -> str:
        """Return the fingerprint of this run, as a hexadecimal sha256.

        It covers the settings, data and code that dvc.yaml declares for the stage.

        Args:
            *more: Further JSON-serializable values that define the run.
        """
        settings = {name: self.section(name) for name in self.sections}
        # An output folder is represented by its manifest, which holds the checksums of its files.
        inputs = [file for dep in self.deps for file in _hashed_files(self.root / dep)]
        files = {str(file.relative_to(self.root)): sha256(file) for file in inputs}
        return hash_json([self.name, settings, files, more])

    def run(self, work: Callable[["Stage"], None]) -> None:
        """Run the stage and publish its outputs atomically.

        Args:
            work: A function that writes the outputs into `self.scratch`.

        Raises:
            ConvoyError: If another process is running the same stage.
        """
        self.scratch.parent.mkdir(parents=True, exist_ok=True)
        try:
            # A stage process that outlived a killed `dvc repro` may still be writing here.
            with FileLock(f"{self.scratch}.lock", timeout=0):
                # An earlier run was stopped while it was replacing the output folder.
                if self.previous.exists() and not self.folder.exists():
                    self.previous.rename(self.folder)
                _remove(self.scratch)
                self.scratch.mkdir()
                work(self)
                if self.rank:
                    shutil.rmtree(self.scratch)
                else:
                    self._publish()
                    for callback in self.on_published:
                        callback()
        except Timeout:
            raise ConvoyError(f"another process is running {self.name}: wait for it, or end it") from None

    def _publish(self) -> None:
        files = sorted(file for file in self.scratch.rglob("*") if file.is_file())
        checksums = {str(file.relative_to(self.scratch)): sha256(file) for file in files}
        (self.scratch / MANIFEST).write_text(json.dumps(checksums, indent=2) + "\n")
        for file in (*files, self.scratch / MANIFEST):
            with file.open("rb") as written:
                os.fsync(written.fileno())
        _remove(self.previous)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self.folder.exists():
            _move(self.folder, self.previous)
        self.scratch.rename(self.folder)
        _remove(self.previous)


def _hashed_files(dep: Path) -> list[Path]:
    """Return the files whose checksums identify a dependency: the file, its manifest or the modules of a package."""
    if dep.is_file():
        return [dep]
    return [dep / MANIFEST] if (dep / MANIFEST).is_file() else sorted(dep.rglob("*.py"))


def find_images_name(params: Mapping[str, Any], architecture: str) -> str:
    """Return the name of the folder with the images at the size of an architecture, relative to artifacts/.

    Args:
        params: The settings in params.yaml.
        architecture: The name of the architecture; one that params.yaml lacks has images of the common size.
    """
    size = params["model"].get(architecture, {}).get("size")
    return "preprocess" if size in (None, params["preprocess"]["size"]) else f"resize/{size}"


def project_root(root: Path) -> Path:
    """Return the project folder for files that outlive an experiment.

    DVC may run an experiment in a temporary copy of the project; `DVC_ROOT` then names the original folder.
    """
    return Path(os.environ.get("DVC_ROOT", root))


def damaged_objects(root: Path, stage: str) -> list[Path]:
    """Return the damaged files in DVC's cache that belong to the outputs of a stage.

    The name of a file in the cache is the MD5 checksum of its content. DVC does not verify it on checkout, so a damaged
    file would be checked out every time.

    Args:
        root: The project folder.
        stage: The name of the stage in dvc.lock, such as "train@lenet".
    """
    try:
        locked = parse_yaml((root / "dvc.lock").read_text())["stages"][stage]["outs"]
        command = [sys.executable, "-m", "dvc", "cache", "dir"]
        folder = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        outputs = [out["md5"] for out in locked if isinstance(out.get("md5"), str)]
    # DVC is not installed, or dvc.lock does not contain the stage.
    except (OSError, subprocess.CalledProcessError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return []
    cache = root / folder / "files" / "md5"
    names = set(outputs)
    for output in outputs:
        if output.endswith(".dir"):
            # The listing of the folder may be damaged or missing.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                names |= {entry["md5"] for entry in json.loads((cache / output[:2] / output[2:]).read_text())}
    files = {cache / name[:2] / name[2:]: name.removesuffix(".dir") for name in names}
    return sorted(file for file, md5 in files.items() if file.is_file() and _md5(file) != md5)


def _md5(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "md5").hexdigest()


def _relative(path: Path, root: Path) -> str:
    """Return a path as a user types it in the project folder."""
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _remove(folder: Path) -> None:
    if not folder.exists():
        return
    try:
        shutil.rmtree(folder)
    except OSError as error:
        # The error names only the entry inside the folder.
        error.filename = str(folder)
        raise


def _move(folder: Path, elsewhere: Path) -> None:
    try:
        folder.rename(elsewhere)
    except OSError as error:
        # The folder to be fixed is the source, not the destination.
        error.filename2 = None
        raise


def print_limited(kind: str, messages: Sequence[str], full_list: str) -> None:
    """Print the first `MAX_PRINTED` messages and the number of those left out.

    Args:
        kind: The kind of the messages, printed in front of each.
        messages: The messages.
        full_list: The file that holds all of them.
    """
    for message in messages[:MAX_PRINTED]:
        print(f"{kind}: {message}")
    if len(messages) > MAX_PRINTED:
        print(f"{kind}: {len(messages) - MAX_PRINTED} more in {full_list}")


def main(name: str, work: Callable[[Stage], None], argument: str = "") -> None:
    """Run a stage as a command; errors that the user can fix end in one message and exit status 1.

    Args:
        name: The name of the stage in dvc.yaml.
        work: The function that runs the stage. Its docstring is the description in the command's help.
        argument: The name of the command-line argument of a foreach stage, such as "architecture"; "" for other stages.
    """
    parser = argparse.ArgumentParser(prog=f"python -m pipeline.{name}", description=work.__doc__)
    if argument:
        parser.add_argument(argument)
    options = vars(parser.parse_args())
    # File names may contain characters that the terminal can't encode.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # Without this handler Lightning would catch SIGTERM, stop the training early and let the stage end as if complete.
    signals.install()
    with exit_on_error(name), explain_system_errors():
        Stage(Path.cwd(), name, options.get(argument, "")).run(work)
