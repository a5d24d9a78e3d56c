"""The command `convoy`: it runs the command line of the project in which it is typed.

It imports only the standard library: a project has its own version of convoy, in src/, and that is the one to be run.
"""

import importlib.metadata
import os
import sys
from pathlib import Path

# The folder in which the user typed the command, to which paths on the command line are relative.
CALLER_FOLDER = "CONVOY_CALLER_FOLDER"
HELP = """\
Usage: convoy [OPTIONS] COMMAND [ARGS]...

  From labelled images to a registered champion.

  convoy works on a project: a folder with dvc.yaml and pipeline/. This folder is in none. In a project, and in any
  folder below it, `convoy --help` lists the commands.

Options:
  --version  Show the version and exit.
  --help     Show this message and exit.
"""


def main() -> None:
    """Run the command line of the nearest project, or explain that there is none."""
    if sys.platform == "win32":
        sys.exit("convoy: Windows is not supported: install WSL (`wsl --install`) and run convoy there")
    caller = Path.cwd()
    root = find_project(caller)
    if root is None:
        sys.exit(explain_missing_project(caller, sys.argv[1:]))
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *inherited])
    os.environ[CALLER_FOLDER] = str(caller)
    os.chdir(root)
    os.execv(sys.executable, [sys.executable, "-m", "pipeline.cli", *sys.argv[1:]])


def find_project(folder: Path) -> Path | None:
    """Return the nearest folder that holds a project, among a folder and its parents, or None."""
    for candidate in (folder, *folder.parents):
        if (candidate / "dvc.yaml").is_file() and (candidate / "pipeline" / "stage.py").is_file():
            return candidate
    return None


def explain_missing_project(folder: Path, arguments: list[str]) -> str | None:
    """Answer what can be answered outside a project.

    Returns:
        The message of an error, or None if the command was answered.
    """
    # The shell asks for completions; there are none.
    if "_CONVOY_COMPLETE" in os.environ:
        return None
    if arguments == ["--version"]:
        print(f"convoy {importlib.metadata.version('convoy')}")
        return None
    if "--help" in arguments:
        print(HELP, end="")
        return None
    return (
        f"convoy: {folder} is in no project, which has dvc.yaml and pipeline/: change to a clone of convoy, or to any "
        "folder below it"
    )
