"""The stages of the pipeline, one module each; and the command line `convoy`, which runs them all."""

import importlib.util
import os
import sys
from pathlib import Path

from pipeline import fork_server, signals

# Threads that spin while they wait stop each other where anything else runs on the machine: a training step took 28
# times as long beside two other processes on 2 cores. OpenMP reads this when torch is imported, so it stands here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# MLflow reads this when it is imported; DVC's counterpart is in .dvc/config. Nothing is sent to their makers.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

PROJECT = Path(__file__).resolve().parents[1]


def use_own_interpreter() -> None:
    """Make this interpreter the `python` of every process started from here, the name by which DVC starts stages.

    Without this, `.venv/bin/convoy` would run them in whatever environment is active, or in none.

    Exits with a message where this interpreter lacks the project's packages, as where `.venv/bin/dvc repro` starts
    stages without an active environment.
    """
    folder = str(Path(sys.executable).parent)
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if folders[0] != folder:
        os.environ["PATH"] = os.pathsep.join([folder, *folders])
    if importlib.util.find_spec("pytorch_lightning") is None:
        sys.exit(
            f"convoy: {sys.executable} lacks the packages of this project: run `make install`, then"
            " `source .venv/bin/activate` and the same command again"
        )


def use_own_library() -> None:
    """Make `convoy` the library of this very project, here and in every process started from here.

    An editable install is bound to the one folder that it was made in. DVC runs queued experiments in a temporary
    copy, and a copied project or a git worktree may use the environment of another folder: without this they would
    train with that folder's library, while DVC records the hashes of theirs.

    Exits with a message where another library, or another project's stages, would run all the same.
    """
    source = str(PROJECT / "src")
    if sys.path[0] != source:
        sys.path.insert(0, source)
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if inherited[0] != source:
        os.environ["PYTHONPATH"] = os.pathsep.join([source, *filter(None, inherited)])

    here = Path.cwd() / "pipeline" / "__init__.py"
    if here.is_file() and not here.samefile(__file__):
        sys.exit(
            f"convoy: the stages of {PROJECT} would run in {Path.cwd()}, which has its own: "
            "unset PYTHONSAFEPATH and PYTHONPATH, and run this again in the project's folder"
        )
    found = importlib.util.find_spec("convoy")
    if found is None or not found.origin or not Path(found.origin).is_relative_to(source):
        where = found.origin if found else "none at all"
        sys.exit(f"convoy: this project's library is {source}/convoy, but {where} was found: restore src/ by git")


# Python's word for a command that is run by its name and still being looked for: the imports that follow take seconds
if sys.argv[0] == "-m":
    signals.install()
    if fork_server.VARIABLE in os.environ:
        fork_server.hand_over(signals.ENDING)
use_own_interpreter()
use_own_library()
