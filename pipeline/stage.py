"""The stage: what all stages share, from the settings they may see to outputs that appear only when whole."""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from filelock import FileLock, Timeout

from convoy import config
from convoy.disk import explain_full_disk
from convoy.errors import ConvoyError
from convoy.hashing import sha256
from pipeline import signals

Schema = TypeVar("Schema")
# where torchrun, Lightning and Slurm say a process' number; a shell in Slurm says 0 to all that Lightning starts in it
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
SAID = 20  # sentences of a kind, on the terminal
AGAIN = "run `dvc repro` again"
MARK = "complete.json"  # in every output folder: the sha256 of each file in it, written last


class Stage:
    """A stage at work in the project folder `root`, as `dvc.yaml` describes it."""

    def __init__(self, root: Path, name: str, item: str = "") -> None:
        self.root = root
        self.home = project_root(root)
        self.params = config.load(root / "params.yaml")  # first, as it says so where there is no project
        self.item = item  # of a foreach stage: "lenet" in train@lenet, else ""
        self.name = f"{name}@{item}" if item else name
        described = yaml.safe_load((root / "dvc.yaml").read_text())["stages"][name]
        watched = described.get("do", described).get("params", [])
        self.watched = [section.replace("${key}", item) for section in watched]
        self.deps = [dep.replace("${key}", item) for dep in described.get("do", described).get("deps", [])]
        self.folder = root / "artifacts" / name / item
        # processes that train together each run the stage; the first alone, of rank 0, has its outputs published
        self.rank = next((int(os.environ[name]) for name in RANKS if os.environ.get(name)), 0)
        self.scratch = root / "artifacts" / ".scratch" / (f"{self.name}.{self.rank}" if self.rank else self.name)
        self.before = self.scratch.with_name(f"{self.scratch.name}.before")  # the folder's last version, for a moment
        self.checked: set[str] = set()  # inputs that were found untouched
        self.afterwards: list[Callable[[], None]] = []  # called when the outputs are in place

    def section(self, name: str) -> Any:
        """A section of params.yaml, by its dotted name. Only what dvc.yaml says the stage watches can be read."""
        if name not in self.watched:
            raise ConvoyError(f"stage {self.name} reads {name!r}: add it to the stage's params in dvc.yaml")
        values: Any = self.params
        for key in name.split("."):
            if not isinstance(values, Mapping) or key not in values:
                raise ConvoyError(f"params.yaml has no {name}: compose it anew with `make repro`")
            values = values[key]
        return values

    def typed(self, schema: type[Schema], name: str) -> Schema:
        """A section as its checked schema."""
        return config.typed(schema, self.section(name), name)

    def input(self, name: str) -> Path:
        """The output folder of an earlier stage ("preprocess", "train/lenet"), its files found untouched."""
        folder = self.root / "artifacts" / name
        if name in self.checked:
            return folder
        if fault := self._fault(folder):
            stage = name.replace("/", "@")
            damaged = damaged_objects(self.root, stage)
            because = ", and DVC's cache holds it damaged" if damaged else ""
            removed = [folder, *damaged] if damaged or (folder / MARK).exists() else []
            removal = shlex.join(["rm", "-rf", *(_shown(each, self.root) for each in removed)]) + " && "
            raise ConvoyError(f"{fault}{because}: run `{removal if removed else ''}dvc repro {stage}`")
        self.checked.add(name)
        return folder

    def _fault(self, folder: Path) -> str:
        """What is wrong with an output folder, by its mark; "" for nothing."""
        shown = _shown(folder, self.root)
        try:
            hashes = json.loads((folder / MARK).read_text())
            for file, digest in hashes.items():
                if not (folder / file).is_file() or sha256(folder / file) != digest:
                    return f"{shown}/{file} is not what its stage wrote"
        except FileNotFoundError:
            return f"{shown}/ is missing or incomplete"
        except (ValueError, AttributeError, TypeError):
            return f"{shown}/{MARK} is not what its stage wrote"
        return ""

    def identity(self, *more: object) -> str:
        """The hash of what defines this run: its settings, the data and code that dvc.yaml names, and `more`."""
        settings = {name: self.section(name) for name in self.watched}
        # an output folder is known by the hashes in its mark
        inputs = [file for dep in self.deps for file in _hashed_files(self.root / dep)]
        files = {str(file.relative_to(self.root)): sha256(file) for file in inputs}
        return hashlib.sha256(json.dumps([self.name, settings, files, more], sort_keys=True).encode()).hexdigest()

    def run(self, work: Callable[["Stage"], None]) -> None:
        """Let `work` write into `self.scratch`, then put that folder in place, whole and marked."""
        self.scratch.parent.mkdir(parents=True, exist_ok=True)
        try:
            # an orphan of a killed `dvc repro` may still be writing here
            with FileLock(f"{self.scratch}.lock", timeout=0):
                if self.before.exists() and not self.folder.exists():  # it was stopped in that moment
                    self.before.rename(self.folder)
                _remove(self.scratch)
                self.scratch.mkdir()
                work(self)
                if self.rank:
                    shutil.rmtree(self.scratch)
                else:
                    self._publish()
                    for finish in self.afterwards:
                        finish()
        except Timeout:
            raise ConvoyError(f"another process is at work on {self.name}: wait for it, or end it") from None

    def _publish(self) -> None:
        files = sorted(file for file in self.scratch.rglob("*") if file.is_file())
        hashes = {str(file.relative_to(self.scratch)): sha256(file) for file in files}
        (self.scratch / MARK).write_text(json.dumps(hashes, indent=2) + "\n")
        for file in (*files, self.scratch / MARK):
            with file.open("rb") as written:
                os.fsync(written.fileno())
        _remove(self.before)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self.folder.exists():
            _move(self.folder, self.before)
        self.scratch.rename(self.folder)
        _remove(self.before)


def _hashed_files(dep: Path) -> list[Path]:
    """Return the files that tell what a dependency holds: itself, its mark, or the modules of a package."""
    if dep.is_file():
        return [dep]
    return [dep / MARK] if (dep / MARK).is_file() else sorted(dep.rglob("*.py"))


def project_root(root: Path) -> Path:
    """Where what outlives an experiment belongs: DVC may run one in a temporary copy of the project."""
    return Path(os.environ.get("DVC_ROOT", root))


def damaged_objects(root: Path, stage: str) -> list[Path]:
    """The files in DVC's cache that hold the outputs of `stage` ("train@lenet") and are not what their names say.

    The name of such a file is the MD5 of its content. DVC does not hash it again, and would check it out each time.
    """
    try:
        locked = yaml.safe_load((root / "dvc.lock").read_text())["stages"][stage]["outs"]
        asked = subprocess.run(
            [sys.executable, "-m", "dvc", "cache", "dir"], cwd=root, capture_output=True, text=True, check=True
        )
        outputs = [out["md5"] for out in locked if isinstance(out.get("md5"), str)]
    # no DVC here, or no such stage in its lock
    except (OSError, subprocess.CalledProcessError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return []
    cache = root / asked.stdout.strip() / "files" / "md5"
    names = set(outputs)
    for output in outputs:
        if output.endswith(".dir"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged, or not there
                names |= {entry["md5"] for entry in json.loads((cache / output[:2] / output[2:]).read_text())}
    files = {cache / name[:2] / name[2:]: name.removesuffix(".dir") for name in names}
    return sorted(file for file, digest in files.items() if file.is_file() and _md5(file) != digest)


def _md5(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "md5").hexdigest()


def _shown(path: Path, root: Path) -> str:
    """As a user types it in the project's folder."""
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _remove(folder: Path) -> None:
    if not folder.exists():
        return
    try:
        shutil.rmtree(folder)
    except OSError as error:
        error.filename = str(folder)  # it names no more than the file in it
        raise


def _move(folder: Path, elsewhere: Path) -> None:
    try:
        folder.rename(elsewhere)
    except OSError as error:
        error.filename2 = None  # it is the folder that has to be mended
        raise


def print_limited(what: str, sentences: Sequence[str], listed: str) -> None:
    """Print the first `SAID` of them, and how many more there are in `listed`."""
    for sentence in sentences[:SAID]:
        print(f"{what}: {sentence}")
    if len(sentences) > SAID:
        print(f"{what}: {len(sentences) - SAID} more in {listed}")


def main(name: str, work: Callable[[Stage], None], item: str = "") -> None:
    """Run a stage as a command: what the user can mend ends in one clear message and exit code 1.

    `item` names the argument of a foreach stage: "architecture".
    """
    parser = argparse.ArgumentParser(prog=f"python -m pipeline.{name}", description=work.__doc__)
    if item:
        parser.add_argument(item)
    chosen = vars(parser.parse_args())
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # of names that a terminal can't show
    # without a handler Lightning would catch SIGTERM, stop training early and let the stage end as if it were whole
    signals.install()
    try:
        Stage(Path.cwd(), name, chosen.get(item, "")).run(work)
    except ConvoyError as error:
        sys.exit(f"convoy: {name}: {error}")
    except OSError as error:
        sys.exit(f"convoy: {name}: {_mend(error)}")
    except Exception as error:
        # libraries wrap what the system says
        if full := explain_full_disk(error, Path.cwd(), AGAIN):
            sys.exit(f"convoy: {name}: {full}")
        if type(error).__name__ != "OutOfMemoryError":  # of torch, which few stages import
            raise
        sys.exit(f"convoy: {name}: the memory of the GPU is full: end what else uses it, or set trainer: cpu ({error})")


def _mend(error: OSError) -> str:
    """What to tell the user of a disk that is full or can't be written; any other error is raised again."""
    if full := explain_full_disk(error, Path.cwd(), AGAIN):
        return full
    match error.errno:
        case errno.EROFS | errno.EACCES | errno.EPERM:
            where = error.filename2 or error.filename or "artifacts/"
            said = (error.strerror or "not permitted").lower()
            return f"{where}: {said}: let this user read and write there, and run `dvc repro` again"
    raise error
