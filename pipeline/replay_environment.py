"""The Python environment of a run: this one if it has the same packages, else one that uv makes of the run's lock."""

import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.tracking.logged_run import LoggedRun

LOCK = "requirements.lock"
PACKAGES = ("numpy", "pytorch-lightning", "torch")


def find_python(root: Path, checkout: Path, run: LoggedRun, folder: Path) -> Path:
    """Return the interpreter of an environment with the packages of a run.

    Args:
        root: The project folder.
        checkout: The project folder of the checkout of the run's commit.
        run: The run.
        folder: Where to make an environment if this one differs.

    Raises:
        ConvoyError: If the lock of the run is not that of its commit, or can't be installed.
    """
    lock = checkout / LOCK
    if not lock.exists():
        return Path(sys.executable)
    recorded = run.tags.get("lock")
    if recorded and sha256(lock)[:12] != recorded:
        raise ConvoyError(
            f"run {run.name} was made with a {LOCK} that was not committed (its tag lock is {recorded}, and the file "
            f"of its commit has {sha256(lock)[:12]}): commit it, and train again"
        )
    own = root / LOCK
    if own.exists() and sha256(own) == sha256(lock) and has_versions(run):
        return Path(sys.executable)
    return make_environment(lock, str(run.record.environment["python"]), folder, run.name)


def has_versions(run: LoggedRun) -> bool:
    """Return whether this environment has the Python and the main packages of a run."""
    versions = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    return all(run.record.environment.get(name) == value for name, value in versions.items())


def make_environment(lock: Path, python: str, folder: Path, run: str) -> Path:
    """Install a lock into a new environment, and return its interpreter.

    Args:
        lock: The file with the versions and the hashes of all packages.
        python: The version of Python. If uv neither finds nor downloads it, this process's is used.
        folder: The folder to create.
        run: The name of the run, for messages.

    Raises:
        ConvoyError: If uv is missing, or packages can't be downloaded.
    """
    uv = Path(sys.executable).with_name("uv")
    command = str(uv) if uv.exists() else shutil.which("uv")
    if command is None:
        raise ConvoyError(
            f"run {run} has other packages than this environment, and uv, which would install them, is missing: "
            "`python -m pip install uv`"
        )
    print(f"installing the {LOCK} of the run for Python {python}, as this environment differs", file=sys.stderr)
    create = [command, "venv", "--quiet", str(folder), "--python"]
    if subprocess.run([*create, python], capture_output=True).returncode:
        print(f"there is no Python {python} for uv: {platform.python_version()} is used", file=sys.stderr)
        subprocess.run([*create, sys.executable], check=True)
    # Without bytecode, as a replay imports only a part of the packages.
    install = [command, "pip", "sync", "--quiet", "--python", str(folder), str(lock)]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split())[:400]
        raise ConvoyError(
            f"the packages in the {LOCK} of run {run} can't be installed: {reason}. Name an index that has them, "
            "as by UV_INDEX_URL, and run this again"
        )
    return folder / "bin" / "python"
