"""Documented commands: they are run as they are written, in a clone with small settings."""

import contextlib
import functools
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from convoy.core import config
from repositories import init_git, run_git
from servers import run_process, wait_until
from small_project import ROOT, draw_images
from test_docs import list_commands, parse

pytestmark = pytest.mark.slow

# Commands that are not run here, and why.
NOT_RUN = {
    "bash .ci/run": "it runs these tests",
    "convoy diff lenet": "test_replay.py runs it",
    "convoy migrate": "test_mlflow_server.py runs it",
    "convoy rollback": "test_promotion_scenarios.py runs it",
    "convoy run experiment=": "it downloads weights, or trains five networks; test_docs.py checks its settings",
    "convoy run trainer=ray": "test_ray.py runs it",
    "convoy tune ": "test_tune.py and test_ray.py run searches",
    "convoy use cifar10": "the archive is not here",
    "convoy use mnist": "it downloads the data",
    "convoy run 'model=[lenet]'": "it trains on MNIST",
    "cp deploy/": "it is for Docker",
    "docker": "needs Docker",
    "dvc exp apply NAME": "NAME is that of any experiment",
    "dvc remote add --default store s3://dvc": "test_deploy.py runs it",
    "dvc remote modify": "test_deploy.py runs it",
    "export MLFLOW_TRACKING_URI=http": "test_mlflow_server.py runs a server",
    "git checkout --theirs": "nothing is in conflict",
    "git clone": "the tests run in a clone",
    "git pull": "nothing is newer",
    "git push": "it is for a release",
    "git tag": "it is for a release",
    "make ": "continuous integration runs it",
    "pre-commit": "it is installed outside the environment",
    "ray ": "test_ray.py runs a cluster",
    "source .venv/bin/activate": "the tests run in an environment",
    "torchrun": "test_distributed_training.py runs it",
    "uv tool install": "it is installed outside the environment",
}
# Commands that answer by their exit code.
ANSWERS = {"convoy monitor": (0, 3), "convoy retrain": (0, 3, 4)}
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))]
# The port at which a server answers.
SERVERS = {"convoy ui": 5000, "convoy serve": 8000, "mlflow models serve": 5001}
SMALL = {
    "[lenet, alexnet, vgg, googlenet, resnet]": "[resnet]",
    "max_epochs: 16": "max_epochs: 1",
    "min_accuracy: 0.9": "min_accuracy: 0.0",
    "min_test_images: 300": "min_test_images: 1",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the project with small settings, a remote for git, photos and a study in the home folder."""
    folder = tmp_path_factory.mktemp("documented")
    root = folder / "convoy"
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, listed):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    # For make, the environment is then newer than these.
    for name in ("requirements.lock", "pyproject.toml"):
        os.utime(root / name, (0, 0))
    settings = root / "conf/config.yaml"
    for old, new in SMALL.items():
        assert old in settings.read_text()
        settings.write_text(settings.read_text().replace(old, new))
    config.compose(root)
    draw_images(folder / "photos", each=30)
    draw_images(folder / "study/images", each=30)
    rows = [
        f"{path.parent.name}/{path.name},{path.parent.name},{n // 3}"
        for n, path in enumerate(sorted(folder.glob("study/*/*/*")))
    ]
    (folder / "study/labels.csv").write_text("\n".join(["image_name,diagnosis,patient_id", *rows]))
    init_git(root)
    run_git(root, "add", "--all")
    run_git(root, "commit", "--quiet", "--message", "first")
    run_git(folder, "init", "--quiet", "--bare", "origin.git")
    run_git(root, "remote", "add", "origin", str(folder / "origin.git"))
    return root


@pytest.fixture(scope="module")
def environment(project: Path) -> dict[str, str]:
    """The environment variables of a new user in the activated environment."""
    kept = {name: value for name, value in os.environ.items() if not re.match("MLFLOW_|DVC_|CONVOY_", name)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"HOME": str(project.parent), "PATH": path, "VENV": sys.prefix, "PYTHONPATH": str(project / "src")}


def run_bash(command: str, root: Path, environment: Mapping[str, str]) -> str:
    """The output of a command that must succeed."""
    bash = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(bash, cwd=root, env=environment, capture_output=True, text=True)
    codes = next((codes for start, codes in ANSWERS.items() if command.startswith(start)), (0,))
    assert done.returncode in codes, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def finished_project(project: Path, environment: Mapping[str, str]) -> Path:
    """The clone after a run on the bundled digits, whose results are committed."""
    run_bash("convoy run && git commit --all --quiet --message results", project, environment)
    return project


@pytest.fixture(scope="module")
def saved_project(finished_project: Path) -> Path:
    """A copy of the clone with its results and its MLflow store."""
    return shutil.copytree(finished_project, finished_project.with_name("saved"), symlinks=True)


@pytest.fixture
def root(finished_project: Path, saved_project: Path) -> Iterator[Path]:
    """The clone with its results; what a test changes is undone."""
    yield finished_project
    shutil.rmtree(finished_project)
    shutil.copytree(saved_project, finished_project, symlinks=True)


def is_open(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("name", [name for name in PAGES if list_commands(ROOT / name)])
def test_commands_of_a_page_run_as_they_are_written(
    name: str, root: Path, environment: Mapping[str, str], tmp_path: Path
) -> None:
    environment = {**environment}
    commands = [command for command in list_commands(ROOT / name) if not command.startswith(tuple(NOT_RUN))]
    with contextlib.ExitStack() as servers:
        for command in commands:
            command = command.replace("s3://bucket/convoy", str(tmp_path / "store"))
            port = next((port for start, port in SERVERS.items() if command.startswith(start)), None)
            if export := re.fullmatch(r"export (\w+)=(\S+)", command):
                environment[export[1]] = export[2]
            elif port:
                server = run_process(["bash", "-c", command], tmp_path / "log", cwd=root, env=environment)
                servers.enter_context(server)
                wait_until(functools.partial(is_open, port))
            else:
                run_bash(command, root, environment)


def test_python_of_the_pages_runs(root: Path, environment: Mapping[str, str]) -> None:
    tokens = [token for name in PAGES for token in parse(ROOT / name)]
    blocks = [token.content for token in tokens if (token.type, token.info) == ("fence", "python")]
    assert blocks
    run_bash("python -m zipfile -e samples/digits.zip downloads", root, environment)
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], cwd=root, env=environment, check=True)


def test_commands_that_are_not_run_are_documented() -> None:
    commands = [command for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")] for command in list_commands(page)]
    assert [start for start in NOT_RUN if not any(command.startswith(start) for command in commands)] == []
