"""`convoy replay`: what is refused, the settings of a run, and the answer."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from convoy.core import config
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.tracking.differences import Comparison
from convoy.tracking.logged_run import LoggedRun
from convoy.tracking.provenance import git, provenance_tags
from convoy.training.record import ResolvedTrainer, TrainingRecord
from pipeline.replay import OTHER_RESULT, Replay, SeedSpread
from pipeline.replay_environment import find_python, make_environment
from pipeline.replay_workspace import check_commit, pull_images, restore_settings
from record_factory import make_record
from repositories import init_git, run_dvc, run_git
from small_project import ROOT

FORMAT_1 = ROOT / "tests/training/format_1"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with one commit."""
    root = tmp_path / "project"
    (root / "conf").mkdir(parents=True)
    (root / "conf/config.yaml").write_text("a: 1\n")
    init_git(root)
    run_git(root, "add", "--all")
    run_git(root, "commit", "--quiet", "--message", "first")
    return root


def make_run(folder: Path, record: TrainingRecord | None = None, **tags: str) -> LoggedRun:
    folder.mkdir(parents=True, exist_ok=True)
    (record or make_record()).save(folder / "record.json")
    return LoggedRun("0123456789abcdef" * 2, "FINISHED", tags, {}, folder)


# Refusals


def test_run_of_a_clean_commit_is_accepted(repository: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **provenance_tags(repository))
    check_commit(repository, run)


def test_run_of_an_uncommitted_tree_is_refused_by_name(repository: Path, tmp_path: Path) -> None:
    (repository / "conf/config.yaml").write_text("a: 2\n")
    run = make_run(tmp_path / "run", **provenance_tags(repository))
    with pytest.raises(ConvoyError, match=r"run 01234567 \(lenet\) was made from code .* not committed .*with changes"):
        check_commit(repository, run)


def test_run_made_outside_of_git_is_refused(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match=r"run 01234567 \(lenet\) has no tag `commit`"):
        check_commit(repository, make_run(tmp_path / "run"))


def test_commit_that_is_missing_here_names_the_fetch(repository: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **{"commit": "a27f84d1acca", "mlflow.source.git.commit": "a27f84d1acca3dd9"})
    with pytest.raises(ConvoyError, match=r"commit a27f84d1acca .* not in this clone: `git fetch origin a27f84d1acca3"):
        check_commit(repository, run)
    run_git(repository, "commit", "--quiet", "--allow-empty", "--message", "second")
    run_git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{repository}", "shallow")
    with pytest.raises(ConvoyError, match="`git fetch --unshallow`"):
        check_commit(tmp_path / "shallow", run)


def test_images_that_are_nowhere_name_the_pull(repository: Path) -> None:
    run_dvc(repository, "init", "--quiet")
    (repository / "data.dvc").write_text(
        "frozen: true\ndeps:\n- path: samples\nouts:\n- md5: a99769f9303d2e7e36b466ca6f71ec6c.dir\n  hash: md5\n"
        "  path: data\n"
    )
    with pytest.raises(ConvoyError, match=r"md5 a99769f.*neither in DVC's cache nor .* samples .*`dvc pull data\.dvc`"):
        pull_images(repository, "01234567 (lenet)")


def test_lock_that_was_not_committed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "requirements.lock").write_text("numpy==2\n")
    run = make_run(tmp_path / "run", lock="0" * 12)
    with pytest.raises(ConvoyError, match=r"requirements.lock that was not committed \(its tag lock is 000000000000"):
        find_python(tmp_path, tmp_path, run, tmp_path / "environment")


def test_packages_that_no_index_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_OFFLINE", "1")
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"convoy-no-such-package==1 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(ConvoyError, match=r"requirements.lock of run lenet can't be installed: .*no-such-package"):
        make_environment(lock, "no-such-python", tmp_path / "environment", "lenet")


def test_environment_with_the_same_lock_and_versions_is_used(tmp_path: Path) -> None:
    versions = {"python": sys.version.split()[0]}
    code = "import importlib.metadata as m; print(*map(m.version, ('numpy', 'pytorch-lightning', 'torch')))"
    found = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    versions |= dict(zip(("numpy", "pytorch-lightning", "torch"), found, strict=True))
    (tmp_path / "requirements.lock").write_text("numpy==2\n")
    record = make_record(environment=make_record().environment | versions)
    run = make_run(tmp_path / "run", record, lock=sha256(tmp_path / "requirements.lock")[:12])
    assert find_python(tmp_path, tmp_path, run, tmp_path / "environment") == Path(sys.executable)


# Settings


def test_settings_are_those_of_the_run_without_auto(tmp_path: Path) -> None:
    params = config.load(ROOT / "params.yaml")
    settings = params["model"]["lenet"] | {"c1": 7}
    trainer = ResolvedTrainer("cpu", 1, 1, "auto", "32-true", False, False, 2)
    run = make_run(tmp_path / "run", make_record(settings=settings, trainer=trainer))
    lock = {"stages": {"preprocess": {"params": {"params.yaml": {"preprocess": {"size": 64}, "split": {"seed": 9}}}}}}
    (run.folder / "dvc.lock").write_text(json.dumps(lock))
    restored = restore_settings(params, run)
    assert restored["model"] == {"lenet": settings}
    assert restored["train"]["max_epochs"] == run.record.train.max_epochs != params["train"]["max_epochs"]
    assert restored["preprocess"] == {"size": 64}
    assert restored["split"]["seed"] == run.record.data.split_seed
    assert restored["trainer"] == params["trainer"] | {"accelerator": "cpu", "threads": 2, "precision": "32-true"}
    assert restored["evaluate"] == params["evaluate"]


def test_run_on_a_gpu_is_repeated_without_one(tmp_path: Path) -> None:
    trainer = ResolvedTrainer("gpu", 1, 1, "auto", "bf16-mixed", False, False, 1)
    run = make_run(tmp_path / "run", make_record(trainer=trainer))
    assert restore_settings(config.load(ROOT / "params.yaml"), run)["trainer"]["accelerator"] == "auto"


def test_settings_of_format_1_keep_their_names(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run.folder / "record.json").write_bytes((FORMAT_1 / "record.json").read_bytes())
    record = json.loads((FORMAT_1 / "record.json").read_text())
    trainer = {
        "accelerator": "auto",
        "devices": 1,
        "nodes": 1,
        "precision": "auto",
        "compile": False,
        "threads": "auto",
    }
    restored = restore_settings({"seed": 5, "trainer": trainer, "model": {"vgg": {}}}, run)
    assert restored["model"] == {"lenet": record["settings"]}
    assert restored["trainer"] == record["trainer"]
    assert (restored["train"], restored["seed"]) == (record["train"], record["seed"])


# The answer

IDENTICAL = [Comparison("weights", "10 tensors", ""), Comparison("history", "3 epochs", "")]
DIFFERENT = [Comparison("weights", "10 tensors", "2 differ"), *IDENTICAL[1:]]


@pytest.mark.parametrize(
    ("comparisons", "inputs", "environment", "recorded", "answer", "status"),
    [
        (IDENTICAL, {}, {}, None, "bit-identical", 0),
        (IDENTICAL, {}, {"threads": (1, 2)}, None, "bit-identical", 0),
        (DIFFERENT, {}, {}, None, "not bit-identical, in the same environment", OTHER_RESULT),
        (DIFFERENT, {"images": ("a", "b")}, {}, None, "not bit-identical, from other inputs", OTHER_RESULT),
        (DIFFERENT, {}, {"threads": (1, 2)}, 0.98, "in another environment; its accuracy is as another seed", 0),
        (DIFFERENT, {}, {"threads": (1, 2)}, 0.5, "its accuracy is unlike another seed", OTHER_RESULT),
    ],
)
def test_answer_depends_on_result_inputs_and_environment(
    comparisons: list[Comparison], inputs: dict, environment: dict, recorded: float | None, answer: str, status: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    spread = SeedSpread(recorded, {1: 0.985, 2: 0.98, 3: 0.982}, 500) if recorded else None
    repeated = Replay(make_run(tmp_path), comparisons, inputs, environment, spread)
    assert answer in repeated.answer
    assert repeated.status == status


def test_interval_of_seeds_is_that_of_student() -> None:
    low, high = SeedSpread(0.9, {1: 0.89, 2: 0.90, 3: 0.91}, 1000).interval()
    # t(0.975, 2) = 4.303, times the standard deviation of 0.01, times the root of 4/3
    assert (low, high) == pytest.approx((0.9 - 0.04968, 0.9 + 0.04968), abs=1e-5)


def test_equal_seeds_leave_room_for_one_image() -> None:
    spread = SeedSpread(0.99, {1: 0.98, 2: 0.98, 3: 0.98}, 100)
    assert spread.is_usual()
    assert not dataclasses.replace(spread, recorded=0.96).is_usual()


def test_complete_commit_is_recorded_for_git_fetch(repository: Path) -> None:
    assert provenance_tags(repository)["mlflow.source.git.commit"] == git(repository, "rev-parse", "HEAD")
