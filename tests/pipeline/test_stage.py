"""Stages: which inputs and settings they may read, and how their outputs appear."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from convoy.core import config
from convoy.core.artifact_names import MANIFEST
from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.data.preprocessing import PreprocessConfig
from pipeline.stage import RANKS, Stage, print_limited
from small_project import ROOT, SMALL, make_project


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


def write_hello(stage: Stage) -> None:
    (stage.scratch / "hello.txt").write_text("hello")


def test_interrupted_replacement_of_an_output_is_restored(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(root, "fetch")
    stage.run(lambda stage: (stage.scratch / "one").write_text("1"))
    truly = Path.rename

    def stop(folder: Path, target: Path) -> Path:
        if folder == stage.scratch:
            raise KeyboardInterrupt
        return truly(folder, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        stage.run(lambda stage: (stage.scratch / "two").write_text("2"))
    monkeypatch.undo()
    found: list[bool] = []
    Stage(root, "fetch").run(lambda stage: found.append((stage.folder / "one").exists()))
    assert found == [True]
    assert not stage.previous.exists()


def test_stage_reads_the_sections_listed_in_dvc_yaml(root: Path) -> None:
    assert Stage(root, "preprocess").validate(PreprocessConfig, "preprocess").size == 32
    assert Stage(root, "train", "resnet").section("model.resnet")["block"] == "basic"


@pytest.mark.parametrize(
    ("stage", "item", "section"),
    [
        ("preprocess", "", "train"),
        ("fetch", "", "split"),
        ("train", "lenet", "model.resnet"),
        ("evaluate", "lenet", "model"),
    ],
)
def test_stage_that_reads_another_section_fails(root: Path, stage: str, item: str, section: str) -> None:
    with pytest.raises(ConvoyError, match=f"{stage}.* reads '{section}': add it to the stage's params in dvc.yaml"):
        Stage(root, stage, item).section(section)


def test_outputs_appear_complete_with_a_manifest(root: Path) -> None:
    stage = Stage(root, "fetch")
    stage.run(write_hello)
    assert json.loads((root / "artifacts/fetch" / MANIFEST).read_text()) == {
        "hello.txt": sha256(root / "artifacts/fetch/hello.txt")
    }
    assert Stage(root, "preprocess").input("fetch") == root / "artifacts/fetch"


def test_stage_that_fails_leaves_no_output(root: Path) -> None:
    def fail(stage: Stage) -> None:
        write_hello(stage)
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        Stage(root, "fetch").run(fail)
    assert not (root / "artifacts/fetch").exists()


def test_first_of_many_notes_are_printed_and_others_counted(capsys: pytest.CaptureFixture[str]) -> None:
    print_limited("note", [str(number) for number in range(1000)], "card.md")
    first, *_, last = lines = capsys.readouterr().out.splitlines()
    assert (first, last) == ("note: 0", f"note: {1000 - len(lines) + 1} more in card.md")
    assert len(lines) < 50


def test_leftovers_of_a_killed_stage_are_not_reused(root: Path) -> None:
    stage = Stage(root, "fetch")
    stage.scratch.mkdir(parents=True)
    (stage.scratch / "torn.txt").write_text("half")
    stage.run(write_hello)
    assert sorted(file.name for file in stage.folder.iterdir()) == ["hello.txt", MANIFEST]


def test_input_without_its_manifest_is_incomplete(root: Path) -> None:
    (root / "artifacts/fetch").mkdir(parents=True)
    with pytest.raises(ConvoyError, match="artifacts/fetch/ is missing or incomplete: run `dvc repro fetch`"):
        Stage(root, "preprocess").input("fetch")


def test_one_changed_byte_in_an_input_is_found(root: Path) -> None:
    Stage(root, "fetch").run(write_hello)
    (root / "artifacts/fetch/hello.txt").write_text("hellO")
    with pytest.raises(ConvoyError, match=r"artifacts/fetch/hello.txt is not what its stage wrote"):
        Stage(root, "preprocess").input("fetch")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"hello.txt": 1}'])
def test_damaged_manifest_is_named_without_traceback(content: str, root: Path) -> None:
    Stage(root, "fetch").run(write_hello)
    (root / "artifacts/fetch" / MANIFEST).write_text(content)
    said = r"^artifacts/fetch/.* is not what its stage wrote: run `rm -rf artifacts/fetch && dvc repro fetch`$"
    with pytest.raises(ConvoyError, match=said):
        Stage(root, "preprocess").input("fetch")


# A damaged file in DVC's cache, which DVC takes for what its name says

THREE_STAGES = """
stages:
  fetch:
    cmd: python fetch.py
    outs: [artifacts/fetch]
  evaluate:
    foreach: ${model}
    do:
      cmd: python evaluate.py ${key}
      deps: [artifacts/fetch]
      outs: ["artifacts/evaluate/${key}/manifest.json", "artifacts/evaluate/${key}/b.txt"]
  register:
    cmd: python register.py
    deps: [artifacts/evaluate, artifacts/fetch]
    outs: [artifacts/register]
    always_changed: true
"""
FETCH = """
from pipeline.stage import main
main("fetch", lambda stage: (stage.scratch / "a b").write_text("images"))
"""
EVALUATE = """
from pipeline.stage import main

def evaluate(stage):
    stage.input("fetch")
    (stage.scratch / "b.txt").write_text("metrics")

main("evaluate", evaluate, "architecture")
"""
REGISTER = """
from pipeline.stage import main
main("register", lambda stage: [stage.input(name) for name in ("fetch", "evaluate/lenet")])
"""


@pytest.fixture
def dvc_project(tmp_path: Path) -> Path:
    """A project of DVC with three small stages that have run."""
    root = tmp_path / "a project"
    root.mkdir()
    (root / "params.yaml").write_text("model:\n  lenet: {}\n")
    (root / "dvc.yaml").write_text(THREE_STAGES)
    (root / "fetch.py").write_text(FETCH)
    (root / "evaluate.py").write_text(EVALUATE)
    (root / "register.py").write_text(REGISTER)
    run_dvc(root, "init", "--no-scm", "--quiet")
    return root


def run_dvc(root: Path, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dvc", *command], cwd=root, env=make_environment(), capture_output=True, text=True
    )


def corrupt(cache: Path, old: str, new: str) -> None:
    """Change what is in the cache, as a disk does: time and mode stay."""
    (file,) = (file for file in cache.rglob("*") if file.is_file() and old in file.read_text())
    before = file.stat()
    file.chmod(0o644)
    file.write_text(file.read_text().replace(old, new))
    file.chmod(before.st_mode)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_damaged_file_in_dvcs_cache_is_named_with_its_removal(root: Path) -> None:
    Stage(root, "fetch").run(write_hello)
    (root / "artifacts/fetch/hello.txt").write_text("hellO")
    cache = root / ".dvc/cache/files/md5"
    names = {name: hashlib.md5(name.encode()).hexdigest() for name in ("hello", "mark")}
    listing = json.dumps([{"md5": digest, "relpath": name} for name, digest in names.items()])
    contents = {names["hello"]: "hellO", names["mark"]: "mark"}
    contents[f"{hashlib.md5(listing.encode()).hexdigest()}.dir"] = listing
    for name, content in contents.items():
        (cache / name[:2]).mkdir(parents=True)
        (cache / name[:2] / name[2:]).write_text(content)
    (root / ".dvc/config").write_text("[core]\n    no_scm = true\n")
    output = {"path": "artifacts/fetch", "md5": name, "hash": "md5"}
    (root / "dvc.lock").write_text(json.dumps({"stages": {"fetch": {"outs": [output, {"path": "data.lock"}]}}}))
    damaged = f".dvc/cache/files/md5/{names['hello'][:2]}/{names['hello'][2:]}"
    with pytest.raises(ConvoyError) as refusal:
        Stage(root, "preprocess").input("fetch")
    assert str(refusal.value) == (
        "artifacts/fetch/hello.txt is not what its stage wrote, and DVC's cache holds it damaged: "
        f"run `rm -rf artifacts/fetch {damaged} && dvc repro fetch`"
    )
    for lock in ("", "stages: []", "stages: {fetch: 1}", "<<<<<<<", "stages: {fetch: {outs: [{md5: 3}, {}, 7]}}"):
        (root / "dvc.lock").write_text(lock)
        with pytest.raises(ConvoyError, match=r"wrote: run `rm -rf artifacts/fetch && dvc repro fetch`$"):
            Stage(root, "preprocess").input("fetch")


IN_A_FOLDER, IN_A_FILE = ("images", "imagez"), ("metrics", "metricz")
IN_A_MARK, IN_A_LISTING = ('"b.txt": "', '"b.txt": "0'), ('"relpath": "a b"', '"relpath": "a c"')


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "damage"),
    [
        ("copy", IN_A_FOLDER),
        ("hardlink", IN_A_FOLDER),
        ("symlink", IN_A_FILE),
        ("elsewhere", IN_A_FILE),
        ("copy", IN_A_MARK),
        ("copy", IN_A_LISTING),
    ],
)
def test_damaged_dvc_cache_is_repaired_by_the_advised_fix(
    cache: str, damage: tuple[str, str], dvc_project: Path, tmp_path: Path
) -> None:
    root = dvc_project
    run_dvc(
        root,
        "config",
        *(["cache.dir", str(tmp_path / "else where")] if cache == "elsewhere" else ["cache.type", cache]),
    )
    objects = tmp_path / "else where" if cache == "elsewhere" else root / ".dvc/cache"
    assert run_dvc(root, "repro").returncode == 0
    lock = (root / "dvc.lock").read_text()
    corrupt(objects / "files/md5", *damage)
    shutil.rmtree(root / "artifacts")
    for _ in range(5):
        failed = run_dvc(root, "repro")
        if failed.returncode == 0:
            break
        (advice,) = [line for line in failed.stderr.splitlines() if "dvc repro" in line and "rm -rf" in line]
        assert "and DVC's cache holds it damaged: run `rm -rf " in advice
        command = advice[advice.index("`") + 1 : advice.rindex("`")]
        done = subprocess.run(command, shell=True, cwd=root, env=make_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert failed.returncode == 0, failed.stderr
    assert (root / "dvc.lock").read_text() == lock
    for stage in ("fetch", "evaluate/lenet"):
        Stage(root, "register").input(stage)
    assert (root / "artifacts/fetch/a b").read_text() == "images"


def test_two_processes_never_work_on_the_same_stage(root: Path) -> None:
    stage = Stage(root, "fetch")
    stage.scratch.parent.mkdir(parents=True)
    with FileLock(f"{stage.scratch}.lock"), pytest.raises(ConvoyError, match="another process is running fetch"):
        stage.run(write_hello)


@pytest.mark.parametrize(
    ("said", "rank"),
    [
        ({}, 0),
        ({"RANK": "3", "LOCAL_RANK": "1"}, 3),  # torchrun, on the second machine of two GPUs
        ({"RANK": "3", "LOCAL_RANK": "1", "SLURM_PROCID": "1"}, 3),  # torchrun, started by srun on each machine
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, 3),  # srun
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash"}, 0),  # a shell in Slurm, and ...
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash", "LOCAL_RANK": "1"}, 1),  # ... Lightning
    ],
)
def test_processes_that_train_together_know_their_rank(
    root: Path, said: dict[str, str], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert Stage(root, "train", "lenet").rank == rank


def test_only_the_process_of_rank_0_publishes_its_outputs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Stage(root, "fetch").run(write_hello)
    monkeypatch.setenv("RANK", "1")
    other = Stage(root, "fetch")
    other.on_published.append(lambda: pytest.fail("published"))
    other.run(lambda stage: (stage.scratch / "hello.txt").write_text("hello from another process"))
    assert (root / "artifacts/fetch/hello.txt").read_text() == "hello"
    assert not other.scratch.exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_stage_exits_nonzero_and_leaves_no_output(root: Path, number: int, status: int) -> None:
    code = (
        "import time; from pipeline.stage import main\n"
        "def work(stage):\n    print('at work', flush=True)\n    time.sleep(60)\n"
        "main('fetch', work)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, cwd=root, env=make_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"at work\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    assert process.returncode == status
    assert b"Traceback" not in said
    assert not (root / "artifacts/fetch").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("ENOSPC, 'No space left on device'", "the disk is full: make room and run `convoy run` again"),
        ("EDQUOT, 'Disk quota exceeded'", "the disk is full: make room and run `convoy run` again"),
        ("EROFS, 'Read-only file system', 'artifacts/x'", "artifacts/x: read-only file system: let this user read and"),
        ("EACCES, 'Permission denied', 'artifacts/x'", "artifacts/x: permission denied: let this user read and write"),
        ("EPERM, 'Operation not permitted'", "artifacts/: operation not permitted: let this user read and write there"),
    ],
)
def test_full_or_read_only_disk_is_one_line(root: Path, error: str, said: str) -> None:
    process = fail_with(root, f"OSError(errno.{error})")
    assert process.returncode == 1
    assert process.stderr.startswith(f"convoy: fetch: {said}")
    assert process.stderr.count("\n") == 1


@pytest.mark.skipif(shutil.which("setpriv") is None or os.getuid() != 0, reason="root takes its own rights away")
@pytest.mark.parametrize("unwritable", ["artifacts", "artifacts/.scratch/fetch", "artifacts/fetch"])
def test_folder_of_another_user_is_named_with_the_fix(root: Path, unwritable: str) -> None:
    folder = root / unwritable
    folder.mkdir(parents=True)
    if unwritable != "artifacts":
        (folder / "left.txt").write_text("by another user")
    os.chown(folder, 65534, 65534)
    work = (
        "import pipeline.stage as s\ns.main('fetch', lambda stage: (stage.scratch / 'hello.txt').write_text('hello'))"
    )
    command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", work]
    process = subprocess.run(command, cwd=root, env=make_environment(), capture_output=True, text=True)
    assert process.stderr.startswith(f"convoy: fetch: {folder}")
    assert process.stderr.endswith(
        ": permission denied: let this user read and write there, and run `convoy run` again\n"
    )
    assert process.stderr.count("\n") == 1
    assert unwritable == "artifacts" or (folder / "left.txt").exists()


def test_internal_error_keeps_its_traceback(root: Path) -> None:
    process = fail_with(root, "OSError(errno.EIO, 'Input/output error')")
    assert process.returncode == 1
    assert process.stderr.startswith("Traceback")
    assert process.stderr.endswith("Input/output error\n")


def fail_with(root: Path, error: str) -> subprocess.CompletedProcess:
    code = f"import errno; from pipeline.stage import main\ndef work(stage):\n    raise {error}\nmain('fetch', work)"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=make_environment(), capture_output=True, text=True
    )


def test_error_that_the_user_can_fix_is_one_line(root: Path) -> None:
    (root / "data").rename(root / "elsewhere")
    (root / "data").mkdir()
    command = [sys.executable, "-m", "pipeline.fetch"]
    process = subprocess.run(command, cwd=root, env=make_environment(), capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.startswith("convoy: fetch: data/ holds no images")
    assert process.stderr.count("\n") == 1


def make_environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}


def test_fingerprint_covers_settings_data_code_and_machine(root: Path) -> None:
    def identity(*more: object, architecture: str = "lenet") -> str:
        return Stage(root, "train", architecture).fingerprint(*more)

    mark, code = root / "artifacts/preprocess" / MANIFEST, root / "src/convoy/training/module.py"
    for file in (mark, code):
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    found = [identity()]
    assert identity() == found[0]
    config.compose(root, [*SMALL, "evaluate.batch_size=7"])  # which is no affair of a training
    assert identity() == found[0]
    found += [identity({"threads": 2}), identity({"threads": 3}), identity(architecture="resnet")]
    for file in (mark, code):
        file.write_text('{"changed": 1}')
        found.append(identity())
    config.compose(root, [*SMALL, "train.seed=2"])
    found.append(identity())
    assert len(set(found)) == len(found) == 7
