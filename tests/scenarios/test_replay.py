"""Replay: runs of this and of earlier code are trained again, to the last bit, and told apart."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from convoy.core import config
from repositories import init_git, run_git
from small_project import ROOT, draw_images

pytestmark = pytest.mark.slow

# The last commit with training records of format 1.
FORMAT_1_COMMIT = "a27f84d1acca3dd92e26fbeef63747eb2fa97da1"
SMALL_FORMAT_1 = {"[lenet, alexnet, vgg, googlenet, resnet]": "[lenet]", "max_epochs: 16": "max_epochs: 1"}
SMALL = SMALL_FORMAT_1 | {"min_accuracy: 0.9": "min_accuracy: 0.0", "min_test_images: 300": "min_test_images: 1"}


def copy_project(root: Path) -> None:
    """Copy the files of this project that git knows, as they are now."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)


def commit(root: Path, message: str) -> None:
    run_git(root, "add", "--all")
    run_git(root, "commit", "--quiet", "--message", message)


def run_convoy(root: Path, *arguments: str, module: str = "pipeline.cli", **variables: str) -> str:
    """The output of a command that must succeed."""
    kept = {name: value for name, value in os.environ.items() if not re.match("MLFLOW_|DVC_|CONVOY_|PYTHONPATH", name)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    environment = kept | {"PATH": path, "PYTHONPATH": str(root / "src"), "CONVOY_LIVE": "0"} | variables
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def replay(root: Path, run: str, **variables: str) -> dict:
    return json.loads(run_convoy(root, "replay", run, "--json", **variables))


def make_small(root: Path, replacements: Mapping[str, str]) -> None:
    """Write settings with one network and one epoch."""
    settings = root / "conf/config.yaml"
    for old, new in replacements.items():
        assert old in settings.read_text()
        settings.write_text(settings.read_text().replace(old, new))


def list_worktrees(root: Path) -> Sequence[str]:
    return subprocess.check_output(["git", "worktree", "list"], cwd=root, text=True).splitlines()


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone after `make repro` with few epochs, with its five runs."""
    root = tmp_path_factory.mktemp("reproduced") / "convoy"
    copy_project(root)
    make_small(root, {"max_epochs: 16": "max_epochs: 3"})
    config.compose(root)
    init_git(root)
    commit(root, "first")
    # What `make repro` does in an environment that is ready.
    run_convoy(root, "run", "--jobs", "auto")
    return root


@pytest.mark.parametrize("architecture", ["lenet", "alexnet", "vgg", "googlenet", "resnet"])
def test_each_run_of_make_repro_is_bit_identical(architecture: str, reproduced: Path) -> None:
    outcome = replay(reproduced, architecture)
    assert outcome["answer"] == "bit-identical", outcome
    assert outcome["weights"] == outcome["history"] == outcome["metrics"] == "identical"
    assert (outcome["inputs"], outcome["environment"]) == ({}, {})
    assert len(list_worktrees(reproduced)) == 1


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A project with a run of LeNet of two epochs, on 60 images."""
    root = tmp_path / "convoy"
    copy_project(root)
    make_small(root, SMALL)
    config.compose(root)
    shutil.rmtree(root / "samples")
    draw_images(root / "samples", each=20)
    init_git(root)
    (root / "data.lock").unlink()
    for name in ("data.dvc", "dvc.lock"):
        (root / name).unlink()
    subprocess.run([sys.executable, "-m", "dvc", "import-url", "--quiet", "samples", "data"], cwd=root, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "freeze", "--quiet", "data.dvc"], cwd=root, check=True)
    commit(root, "first")
    run_convoy(root, "run", "train.max_epochs=2")
    return root


def test_run_of_earlier_code_and_images_is_bit_identical(small: Path) -> None:
    first = json.loads(run_convoy(small, "diff", "lenet", "lenet", "--json"))["runs"][0]["run"]
    (small / "src/convoy/training/module.py").write_text("raise SystemExit('not the code of the run')\n")
    commit(small, "break the training")
    run_git(small, "revert", "--no-edit", "HEAD")
    module = small / "src/convoy/training/module.py"
    module.write_text(module.read_text() + "\n# changed\n")
    (small / "samples/lying/00.png").unlink()
    (small / "samples/standing/00.png").rename(small / "samples/leaning/moved.png")
    commit(small, "change the code and the images")
    run_convoy(small, "run", "--update")
    outcome = replay(small, first[:10])
    assert outcome["answer"] == "bit-identical", outcome
    # Images come from DVC's cache.
    difference = json.loads(run_convoy(small, "diff", first[:10], "lenet", "--json"))
    assert difference["settings"]["train.max_epochs"] == [2, 1]
    assert difference["code"]["changed_files"] == ["src/convoy/training/module.py"]
    assert difference["data"]["images"]["removed"] == ["data/lying/00.png"]
    assert difference["data"]["images"]["relabelled"] == ["data/leaning/moved.png"]
    assert "weights" in difference["results"]
    table = run_convoy(small, "diff", first[:10], "lenet")
    assert re.search(r"^  train.max_epochs +2 +1 ", table, re.MULTILINE)


def test_other_instructions_compare_the_accuracy_of_seeds(small: Path) -> None:
    # The images are then imported again from their source, which has not changed.
    shutil.rmtree(small / ".dvc/cache")
    outcome = replay(small, "lenet", ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41")
    assert outcome["environment"]["ATEN_CPU_CAPABILITY"] == ["", "default"]
    assert outcome["environment"]["ONEDNN_MAX_CPU_ISA"] == ["", "SSE41"]
    assert not outcome["bit_identical"]
    # What the first epoch shows may be rounded alike.
    assert re.match(r"first in epoch [12]: ", outcome["history"])
    assert len(outcome["accuracy"]["by_seed"]) == 3


def test_run_with_a_record_of_format_1_is_bit_identical(tmp_path: Path) -> None:
    root = tmp_path / "convoy"
    known = subprocess.run(["git", "cat-file", "-e", FORMAT_1_COMMIT], cwd=ROOT, capture_output=True)
    if known.returncode:
        pytest.skip("this clone does not have the history")
    run_git(tmp_path, "clone", "--quiet", "--shared", str(ROOT), "convoy")
    run_git(root, "checkout", "--quiet", "--detach", FORMAT_1_COMMIT)
    for name, value in (("name", "convoy"), ("email", "convoy@localhost")):
        run_git(root, "config", f"user.{name}", value)
    make_small(root, SMALL_FORMAT_1)
    commit(root, "small settings")
    run_convoy(root, module="pipeline")
    # As after an upgrade, with the images left where they are.
    run_git(root, "stash")
    shutil.rmtree(root / "artifacts")
    run_git(root, "rm", "-r", "--quiet", ".")
    copy_project(root)
    commit(root, "the present code")
    (run,) = (root / "mlartifacts").glob("*/*/artifacts/record.json")
    assert "format" not in json.loads(run.read_text())
    outcome = replay(root, run.parts[-3])
    assert outcome["answer"] == "bit-identical", outcome
    earlier = subprocess.check_output(["git", "rev-parse", "HEAD^"], cwd=root, text=True)
    assert earlier.startswith(outcome["commit"])
