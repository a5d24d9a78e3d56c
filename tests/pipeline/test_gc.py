"""Garbage collection: it lists first, and removes only what its rules name."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from convoy.core.errors import ConvoyError
from convoy.promotion.champion import set_champion
from convoy.promotion.retention import find_unneeded_versions
from convoy.registry.versions import TEST_IMAGES
from convoy.tracking.database import local_path
from convoy.tracking.store import TrackingStore, open_store
from pipeline.gc import Rules, collect_garbage, find_checkpoints
from promotion_fixtures import make_promotion

NAME = "convoy"


@pytest.fixture
def root(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with six model versions, of which the first was the champion and the second one is."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path)
    (tmp_path / "params.yaml").write_text(f"register:\n  name: {NAME}\n")
    with open_store(tmp_path, NAME) as store:
        store.client.create_registered_model(NAME)
        for _ in range(6):
            model = store.client.create_logged_model(store.experiment.experiment_id, name="model")
            local_path(model.artifact_location).mkdir(parents=True)
            made = store.client.create_model_version(NAME, source=model.model_uri, model_id=model.model_id)
            images = "new" if int(made.version) > 4 else "old"
            store.client.set_model_version_tag(NAME, made.version, TEST_IMAGES, images)
        set_champion(store, NAME, make_promotion(None, 1))
        set_champion(store, NAME, make_promotion(1, 2))
    return tmp_path


@pytest.fixture
def store(root: Path) -> Iterator[TrackingStore]:
    with open_store(root, NAME) as opened:
        yield opened


def count_model_folders(root: Path) -> int:
    return len(list(root.glob(f"mlartifacts/{NAME}/models/*/artifacts")))


def add_checkpoint(root: Path, name: str, age_days: float) -> Path:
    file = root / "artifacts/.cache/checkpoints/lenet" / name / "last.ckpt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    written = time.time() - age_days * 86400
    os.utime(file, (written, written))
    return file


@pytest.mark.parametrize(
    ("days", "newest", "found"),
    [
        (0, 1, [3, 4]),
        (0, 3, [3]),
        (0, 10, []),
        (1, 1, []),
    ],
)
def test_champions_and_counted_versions_are_kept(
    days: int, newest: int, found: list[int], store: TrackingStore
) -> None:
    assert list_unneeded(store, days, newest) == found


def list_unneeded(store: TrackingStore, days: int, newest: int) -> list[int]:
    return [int(version.version) for version in find_unneeded_versions(store, NAME, days=days, newest=newest)]


def test_version_with_an_alias_is_kept(store: TrackingStore) -> None:
    store.client.set_registered_model_alias(NAME, "shadow", "3")
    assert list_unneeded(store, days=0, newest=1) == [4]


def test_checkpoint_is_old_only_if_all_its_files_are(tmp_path: Path) -> None:
    old = add_checkpoint(tmp_path, "old", age_days=31)
    half = add_checkpoint(tmp_path, "half", age_days=31)
    half.with_name("best.ckpt").touch()
    add_checkpoint(tmp_path, "new", age_days=29)
    assert find_checkpoints(tmp_path, days=30) == [(old.parent, len(b"weights"))]


def test_without_delete_nothing_is_removed(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_history(root, commits=3)
    checkpoint = add_checkpoint(root, "old", age_days=31)
    before = {path for path in root.rglob("*") if ".scratch" not in path.parts and ".dvc/tmp" not in str(path)}

    collect_garbage(root, Rules(days=0, commits=1, versions=1))
    assert {path for path in before if not path.exists()} == set()
    printed = capfd.readouterr().out
    assert "Would remove 1 checkpoints and 2 model versions" in printed
    assert str(checkpoint.parent.relative_to(root)) in printed
    assert [line[:17] for line in printed.splitlines() if line.startswith("version: ")] == [
        "version: convoy 3",
        "version: convoy 4",
    ]

    collect_garbage(root, Rules(days=0, commits=1, versions=1), delete=True)
    assert not checkpoint.exists()
    assert count_model_folders(root) == 4
    assert len(list(root.glob(".dvc/cache/files/md5/*/*"))) == 1
    with open_store(root, NAME) as store:
        left = {int(version.version) for version in store.client.search_model_versions(f"name = '{NAME}'")}
    assert left == {1, 2, 5, 6}


def make_history(root: Path, commits: int) -> None:
    """Commit another version of a file in DVC, several times."""
    commands = ["git init -q", "git config user.name a", "git config user.email a@b.c", "dvc init -q"]
    for command in commands:
        subprocess.run(command.split(), cwd=root, check=True)
    for number in range(commits):
        (root / "data.bin").write_text(str(number))
        subprocess.run(["dvc", "add", "-q", "data.bin"], cwd=root, check=True)
        subprocess.run(["git", "add", "data.bin.dvc", ".dvc/config"], cwd=root, check=True)
        subprocess.run(["git", "commit", "-q", "-m", str(number)], cwd=root, check=True)


def test_folder_without_commits_is_refused(root: Path) -> None:
    with pytest.raises(ConvoyError, match="is no Git repository with a commit"):
        collect_garbage(root, Rules(), delete=True)
    assert count_model_folders(root) == 6
