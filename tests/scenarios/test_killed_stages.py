"""Killed stages: running them again gives bit-identical outputs."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

import stage_processes
import training_process
from convoy.core import config
from pipeline.fetch import fetch
from pipeline.preprocess import preprocess
from pipeline.stage import Stage
from small_project import ROOT, make_project, run_stages

OVERRIDES = ["model=[lenet]", "train.max_epochs=2", "trainer.threads=1"]
OVERRIDES += ["register.gate.min_accuracy=0.0", "register.gate.min_test_images=1"]
WORK = {"fetch": fetch, "preprocess": preprocess}


def start_stage(root: Path, stage: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", f"pipeline.{stage}"],
        cwd=root,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def read_results(root: Path, stage: str) -> dict[str, bytes]:
    return read_files(root / "artifacts" / stage) | {"data.lock": (root / "data.lock").read_bytes()}


@pytest.mark.parametrize("stage", ["fetch", "preprocess"])
def test_stage_killed_at_any_time_reruns_to_identical_bytes(stage: str, tmp_path: Path) -> None:
    undisturbed, killed = make_project(tmp_path / "undisturbed"), make_project(tmp_path / "killed")
    run_stages(undisturbed, until=stage)
    if stage == "preprocess":
        run_stages(killed, until="fetch")

    running = start_stage(killed, stage)  # once to its end: so long it takes
    begun = time.monotonic()
    assert running.wait() == 0
    takes = time.monotonic() - begun
    assert read_results(killed, stage) == read_results(undisturbed, stage)

    moments = random.Random(0)
    for number in range(6):
        running = start_stage(killed, stage)
        time.sleep(takes * (0.4 + 0.6 * moments.random()))  # before that it imports
        match number % 3:
            case 0:
                os.killpg(running.pid, signal.SIGKILL)
            case 1:  # the stage alone: what it started must end by itself
                running.kill()
            case 2:
                running.terminate()
        # terminated while it still imports, or at work; or it was done already
        assert running.wait() in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 0)
        assert_no_process_is_left(running.pid)
    Stage(killed, stage).run(WORK[stage])
    assert read_results(killed, stage) == read_results(undisturbed, stage)
    assert [folder.name for folder in (killed / "artifacts" / ".scratch").iterdir() if folder.is_dir()] == []


def assert_no_process_is_left(session: int) -> None:
    """The processes that decode notice that nobody waits for them any more."""
    for _ in range(100):
        left = [process for process in psutil.process_iter() if find_session(process.pid) == session]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(left)


def find_session(process: int) -> int:
    try:
        return os.getsid(process)
    except ProcessLookupError:  # it has just ended
        return 0


# Training


@pytest.mark.parametrize("architecture", ["lenet", "resnet"])
def test_repeatedly_killed_training_ends_bit_identical(
    architecture: str, tmp_path: Path, fork_server: multiprocessing.context.ForkServerContext
) -> None:
    overrides = [f"model=[{architecture}]", "train.max_epochs=6", "trainer.threads=1"]
    overrides += ["train.checkpoint_minutes=0.0005", f"model.{architecture}.recipe.batch_size=8"]
    root = make_project(tmp_path / "project", overrides)
    run_stages(root, until="preprocess")

    def train_apart() -> multiprocessing.context.ForkServerProcess:
        process = fork_server.Process(target=training_process.run_train_stage, args=(root, architecture))
        process.start()
        return process

    begun = time.monotonic()
    undisturbed = train_apart()
    undisturbed.join()
    takes = time.monotonic() - begun
    assert undisturbed.exitcode == 0
    expected = read_files(root / "artifacts/train" / architecture)
    shutil.rmtree(root / "artifacts/train")

    def list_checkpoints() -> list[tuple[Path, int]]:
        try:
            files = (root / "artifacts/.cache/checkpoints").rglob("last.ckpt")
            return [(file, file.stat().st_mtime_ns) for file in files]
        except FileNotFoundError:  # the training has just ended and removed it
            return []

    moments, ends, kept = random.Random(1), [], 0
    for number in range(12):
        before, process = list_checkpoints(), train_apart()
        # On a busy machine all random moments may come before the first checkpoint.
        while number % 2 and list_checkpoints() == before and process.is_alive():
            time.sleep(0.005)
        process.join(takes * moments.random() * (0.1 if number % 2 else 0.5))
        if number % 4 == 3:
            process.terminate()
        else:
            process.kill()
        process.join()
        ends.append(process.exitcode)
        kept += len(list_checkpoints())
        if (root / "artifacts/train" / architecture).exists():
            break  # it had been on its last steps
    assert set(ends) <= {-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 0}
    assert ends.count(-signal.SIGKILL) >= 2
    assert kept >= 2  # so that it did go on from where it was
    last = train_apart()
    last.join()
    assert last.exitcode == 0
    assert read_files(root / "artifacts/train" / architecture) == expected
    assert not list((root / "artifacts/.cache/checkpoints").rglob("*.ckpt"))  # success cleans up


# The whole pipeline


def read_pipeline_results(root: Path) -> dict[str, object]:
    """What a user has at the end of a run."""
    folders = ("fetch", "preprocess", "train", "evaluate", "register")
    files = {name: read_files(root / "artifacts" / name) for name in folders} | {
        "lock": (root / "data.lock").read_bytes()
    }
    store = MlflowClient(f"sqlite:///{root / 'mlflow.db'}", f"sqlite:///{root / 'mlflow.db'}")
    experiment = store.get_experiment_by_name("convoy")
    assert experiment
    runs = store.search_runs([experiment.experiment_id])
    versions = [version.version for version in store.search_model_versions("name = 'convoy'")]
    champion = store.get_model_version_by_alias("convoy", "champion").version
    shown = sorted((run.info.run_name, run.info.status, run.data.metrics["test/accuracy"]) for run in runs)
    lock = (root / "data.lock").read_bytes()
    return {"files": files, "lock": lock, "runs": shown, "versions": versions, "champion": champion}


@pytest.mark.slow
def test_pipeline_killed_at_random_ends_as_if_undisturbed(
    tmp_path: Path, fork_server: multiprocessing.context.ForkServerContext, embedded_store: None
) -> None:
    def run_apart(root: Path) -> multiprocessing.context.ForkServerProcess:
        process = fork_server.Process(target=stage_processes.run_remaining_stages, args=(root,))
        process.start()
        return process

    undisturbed = make_project(tmp_path / "undisturbed", OVERRIDES)
    begun = time.monotonic()
    process = run_apart(undisturbed)
    process.join()
    takes = time.monotonic() - begun
    assert process.exitcode == 0
    expected = read_pipeline_results(undisturbed)

    moments, kills, project = random.Random(2), 0, 0
    root = make_project(tmp_path / "killed0", OVERRIDES)
    while True:
        process = run_apart(root)
        # early moments come often, as later stages are reached by what earlier kills left
        process.join(takes * moments.uniform(0.02, moments.choice([0.15, 0.6])) if kills < 30 else None)
        if process.is_alive():
            kills += 1
            kill_all(process.pid)
            process.join()
            continue
        assert process.exitcode == 0
        assert read_pipeline_results(root) == expected
        assert_no_temporary_files(root)
        if kills == 30:
            break
        project += 1
        root = make_project(tmp_path / f"killed{project}", OVERRIDES)


def kill_all(process: int | None) -> None:
    """Kill a process and all that it has started, wherever these belong."""
    first = psutil.Process(process)
    for each in [*first.children(recursive=True), first]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def assert_no_temporary_files(root: Path) -> None:
    assert [folder.name for folder in (root / "artifacts/.scratch").iterdir() if folder.is_dir()] == []
    assert not (root / "mlflow.db.new").exists()


@pytest.mark.slow
def test_main_command_killed_with_dvc_ends_as_if_undisturbed(tmp_path: Path, embedded_store: None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CONVOY_LIVE"}
    environment |= {"PYTHONPATH": str(ROOT), "DVC_SITE_CACHE_DIR": str(tmp_path / "site"), "DVC_NO_ANALYTICS": "1"}

    def run_main(root: Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "pipeline"]
        with (tmp_path / "said").open("a") as said:
            return subprocess.Popen(command, cwd=root, env=environment, stdout=said, stderr=said)

    project = make_project(tmp_path / "project", OVERRIDES)
    settings = (project / "conf/config.yaml").read_text()
    changes = {"[lenet, alexnet, vgg, googlenet, resnet]": "[lenet]", "max_epochs: 16": "max_epochs: 2"}
    for before, after in (
        changes | {"min_test_images: 300": "min_test_images: 1", "min_accuracy: 0.9": "min_accuracy: 0.0"}
    ).items():
        assert before in settings
        settings = settings.replace(before, after)
    (project / "conf/config.yaml").write_text(settings)
    config.compose(project)
    for folder in ("pipeline", "src"):  # which DVC hashes
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for command in ("init --no-scm --quiet", "add --quiet data"):
        subprocess.run([sys.executable, "-m", "dvc", *command.split()], cwd=project, env=environment, check=True)

    undisturbed = shutil.copytree(project, tmp_path / "undisturbed")
    begun = time.monotonic()
    process = run_main(undisturbed)
    assert process.wait() == 0, (tmp_path / "said").read_text()
    takes = time.monotonic() - begun
    expected = read_pipeline_results(undisturbed), (undisturbed / "dvc.lock").read_bytes()

    moments = random.Random(3)
    for _ in range(5):
        process = run_main(project)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(takes * moments.uniform(0.2, 0.6))
        if process.poll() is None:
            kill_all(process.pid)
        process.wait()
    process = run_main(project)
    assert process.wait() == 0, (tmp_path / "said").read_text()
    assert (read_pipeline_results(project), (project / "dvc.lock").read_bytes()) == expected
    assert_no_temporary_files(project)
