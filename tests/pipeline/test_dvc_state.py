"""Files of DVC: the next run starts, whatever a killed one left of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zc.lockfile

from convoy.core.errors import ConvoyError
from pipeline.dvc_state import remove_damaged_databases, remove_torn_path_locks, restore_lock_file


@pytest.mark.parametrize("cut", [0, 20, 25, 32, 60, 75, 85])
def test_dvc_lock_that_was_cut_short_is_restored(cut: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = tmp_path / "dvc.lock"
    whole = (
        "schema: '2.0'\nstages:\n  fetch:\n    cmd: fetch\n    deps:\n    - path: data\n      md5: 5d41402abc4b2a76\n"
    )
    restore_lock_file(tmp_path)  # there is none yet
    lock.write_text(whole)
    restore_lock_file(tmp_path)
    lock.write_text(whole[:cut])
    restore_lock_file(tmp_path)
    assert lock.read_text() == whole
    assert "dvc.lock was truncated" in capsys.readouterr().out
    lock.write_text(f"<<<<<<< HEAD\n{whole}=======\n>>>>>>> other\n")
    with pytest.raises(ConvoyError, match=r"dvc\.lock can't be read: resolve the merge conflict"):
        restore_lock_file(tmp_path)


@pytest.mark.parametrize("torn", ["", "schema", "schema: '2.0'\nstages:\n  fetch:\n    deps:\n    - path: da"])
def test_dvc_lock_of_a_killed_first_run_is_removed(
    torn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "dvc.lock"
    restore_lock_file(tmp_path)  # there is none yet
    lock.write_text(torn)
    restore_lock_file(tmp_path)
    assert not lock.exists()
    assert "removed, as there was none" in capsys.readouterr().out


def test_damaged_dvc_lock_of_a_fresh_clone_is_kept(tmp_path: Path) -> None:
    (tmp_path / "dvc.lock").write_text("schema")
    with pytest.raises(ConvoyError, match=r"restore it by `git checkout dvc\.lock`"):
        restore_lock_file(tmp_path)
    assert (tmp_path / "dvc.lock").read_text() == "schema"


# The list of locked paths


@pytest.fixture(scope="module")
def dvc_project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project with one stage that DVC has run, and DVC's databases in a folder of the test's own."""
    root = tmp_path_factory.mktemp("project")
    (root / "given").write_text("1")
    (root / "dvc.yaml").write_text("stages: {copy: {cmd: cp given made, deps: [given], outs: [made]}}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path_factory.mktemp("site")))
        for command in ("init --no-scm --quiet", "repro --quiet"):
            assert run_dvc(root, *command.split()) == 0
        yield root


def run_dvc(root: Path, *command: str) -> int:
    return subprocess.run([sys.executable, "-m", "dvc", *command], cwd=root, capture_output=True).returncode


def make_lock(process: int) -> str:
    return json.dumps({"write": {"/made": {"pid": process, "cmd": "dvc repro"}}, "read": {}})


@pytest.mark.parametrize("torn", ["", '{"/a', '{"write": {"/made": {"pid": 1', "null", "[]", '{"write": 7}'])
def test_truncated_list_of_locked_paths_is_removed(torn: str, dvc_project: Path) -> None:
    file = dvc_project / ".dvc/tmp/rwlock"
    file.write_text(torn)
    remove_torn_path_locks(dvc_project)
    assert not file.exists()


def test_dvc_runs_again_after_its_path_list_was_truncated(
    dvc_project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (dvc_project / ".dvc/tmp/rwlock").write_text('{"/a')
    assert run_dvc(dvc_project, "repro") == 255
    remove_torn_path_locks(dvc_project)
    assert capsys.readouterr().out.startswith(".dvc/tmp/rwlock was left by a run that was stopped")
    assert run_dvc(dvc_project, "repro") == 0


@pytest.mark.parametrize("name", ["lock", "rwlock.lock"])
def test_truncated_list_is_kept_while_dvc_is_running(
    name: str, dvc_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dvc.lock.DEFAULT_TIMEOUT", 0)
    file = dvc_project / ".dvc/tmp/rwlock"
    file.write_text('{"/a')
    with_lock = zc.lockfile.LockFile(str(file.with_name(name)))
    remove_torn_path_locks(dvc_project)
    assert file.exists()
    with_lock.close()
    remove_torn_path_locks(dvc_project)
    assert not file.exists()


def test_paths_locked_by_a_living_process_stay_locked(dvc_project: Path) -> None:
    file = dvc_project / ".dvc/tmp/rwlock"
    file.write_text(make_lock(os.getpid()))
    remove_torn_path_locks(dvc_project)
    assert file.read_text() == make_lock(os.getpid())
    file.unlink()


def test_process_number_given_to_another_locks_no_path(dvc_project: Path) -> None:
    file = dvc_project / ".dvc/tmp/rwlock"
    file.write_text(make_lock(os.getpid()))
    os.utime(file, (1e9, 1e9))  # written long before this process began
    remove_torn_path_locks(dvc_project)
    assert not file.exists()


# The databases


@pytest.mark.parametrize("how", ["half", "garbage"])
def test_damaged_databases_of_dvc_are_made_again(
    how: str, dvc_project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not remove_damaged_databases(dvc_project)
    databases = sorted(Path(os.environ["DVC_SITE_CACHE_DIR"]).rglob("*.db"))
    assert len(databases) >= 2
    for file in databases:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] if how == "half" else b"garbage" * 1000)
    assert run_dvc(dvc_project, "repro") == 255
    assert remove_damaged_databases(dvc_project)
    assert "DVC's database of hashes, was damaged" in capsys.readouterr().out
    assert run_dvc(dvc_project, "repro") == 0
    assert not remove_damaged_databases(dvc_project)


def test_project_that_dvc_cannot_read_has_no_damage_found(dvc_project: Path) -> None:
    config = dvc_project / ".dvc/config"
    before = config.read_text()
    config.write_text("[core]\n    nonsense = true\n")
    assert not remove_damaged_databases(dvc_project)
    config.write_text(before)
