"""`convoy diff`: what differs between two runs, by part, in a table and as JSON."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest

from convoy.tracking.logged_run import LoggedRun
from convoy.training.record import DatasetVersion
from pipeline import diff
from record_factory import make_record
from repositories import init_git, run_git

BEFORE = pd.DataFrame(
    {"sha256": list("abcd"), "path": ["cat/1", "cat/2", "dog/1", "dog/2"], "label": ["cat", "cat", "dog", "dog"],
     "split": ["train", "test", "train", "val"]}
)  # fmt: skip
AFTER = pd.DataFrame(
    {"sha256": list("abce"), "path": ["cat/1", "dog/3", "dog/1", "dog/4"], "label": ["cat", "dog", "dog", "dog"],
     "split": ["train", "test", "val", "train"]}
)  # fmt: skip


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with two commits of code."""
    root = tmp_path / "project"
    (root / "src").mkdir(parents=True)
    init_git(root)
    for text in ("1", "2"):
        (root / "src/code.py").write_text(text)
        run_git(root, "add", "--all")
        run_git(root, "commit", "--quiet", "--message", text)
        run_git(root, "tag", f"v{text}")
    return root


@pytest.fixture
def runs(tmp_path: Path) -> tuple[LoggedRun, LoggedRun]:
    """Two runs that differ in a setting, the images, the commit, the threads and the results."""
    record = make_record(settings={"recipe": {"lr": 0.1}, "init": "scratch"})
    other = make_record(
        settings={"recipe": {"lr": 0.05}, "init": "scratch"},
        data=DatasetVersion("digits", "0123456789ab", "data.dvc", {"images": 1798}, split_seed=1),
        environment=record.environment | {"threads": 4, "ATEN_CPU_CAPABILITY": ""},
        trainer=dataclasses.replace(record.trainer, threads=4),
    )
    made = []
    for number, each in enumerate((record, other), 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        each.save(folder / "record.json")
        (folder / "history.csv").write_text(f"epoch,val_loss\n1,0.{number}\n")
        tags = {"commit": f"v{number}", "lock": "9c490d05f003", "data": f"digits@{each.data.digest}"}
        made.append(LoggedRun(str(number) * 32, "FINISHED", tags, {"test/accuracy": 0.9 + number / 100}, folder))
    return made[0], made[1]


def use_images(monkeypatch: pytest.MonkeyPatch, *tables: pd.DataFrame | None) -> None:
    """Let the first run be of the first of these tables of images, and the second of the second."""

    def find(_: Path, run: LoggedRun) -> bytes | None:
        table = tables[int(run.run_id[0]) - 1]
        return None if table is None else table.to_parquet()

    monkeypatch.setattr(diff, "find_image_table", find)


def test_every_part_lists_what_differs(
    repository: Path, runs: tuple[LoggedRun, LoggedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_images(monkeypatch, BEFORE, AFTER)
    found = json.loads(json.dumps(diff.describe(diff.compare(repository, *runs))))
    assert found["settings"] == {"model.recipe.lr": [0.1, 0.05], "trainer.threads": [2, 4]}
    assert found["data"]["images"] == {
        "added": ["dog/4"], "removed": ["dog/2"], "relabelled": ["dog/3"], "moved": ["dog/1"]
    }  # fmt: skip
    assert found["code"] == {"commit": ["v1", "v2"], "changed_files": ["src/code.py"]}
    assert found["environment"] == {"threads": [2, 4]}
    assert found["results"] == {"test/accuracy": [0.91, 0.92]}
    assert found["first_difference"]["history"] == "first in epoch 1: val_loss 0.1 became 0.2"


def test_run_does_not_differ_from_itself(repository: Path, runs: tuple[LoggedRun, LoggedRun]) -> None:
    rows = list(diff.table_rows(diff.compare(repository, runs[0], runs[0])))
    parts = ("settings", "data", "code", "environment", "results")
    assert rows == [(part, "the same", "") for part in parts]


def test_lists_of_images_that_are_nowhere_are_said_to_be(
    repository: Path, runs: tuple[LoggedRun, LoggedRun], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    use_images(monkeypatch, BEFORE, None)
    diff.print_table(diff.compare(repository, *runs))
    shown = " ".join(capsys.readouterr().out.split())
    assert "images not known here: the list of images is neither in DVC's cache nor on its remote" in shown
    assert "model.recipe.lr 0.1 0.05" in shown


def test_commit_that_is_not_here_names_git_fetch(repository: Path, runs: tuple[LoggedRun, LoggedRun]) -> None:
    stranger = dataclasses.replace(runs[0], tags=runs[0].tags | {"commit": "a27f84d1acca"})
    rows = list(diff.table_rows(diff.compare(repository, stranger, runs[0])))
    assert ("  changed files", "", "a commit is not in this clone (`git fetch`)") in rows
