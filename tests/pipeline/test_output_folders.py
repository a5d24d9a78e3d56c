"""The folders below artifacts/: outputs of stages may be replaced and removed, and nothing else."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from dvc.repo import Repo

from convoy.core.artifact_names import MANIFEST
from convoy.core.errors import ConvoyError
from pipeline.output_folders import refuse_strays, remove_unlisted

HASHES = [hashlib.md5(content).hexdigest() for content in (b"1\n", b"2\n")]
FOLDERS = ("fetch", "preprocess", "train/lenet", "evaluate/lenet", "register")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project in which the stages have run for LeNet."""
    Repo.init(str(tmp_path), no_scm=True).close()
    for name in FOLDERS:
        write_output(tmp_path / "artifacts" / name)
    refuse_strays(tmp_path, ["lenet"])
    return tmp_path


def write_output(folder: Path) -> None:
    (folder / "more").mkdir(parents=True)
    (folder / "result.csv").write_text("1\n")
    (folder / "more/result.csv").write_text("2\n")
    (folder / MANIFEST).write_text(json.dumps({"result.csv": "hash", "more/result.csv": "hash"}))


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("file", ["notes.txt", ".hidden", "more/notes.txt", "mine/manifest.json"])
def test_file_of_the_user_in_an_output_stops_the_run(name: str, file: str, root: Path) -> None:
    stray = root / "artifacts" / name / file
    stray.parent.mkdir(exist_ok=True)
    stray.write_text("mine")
    with pytest.raises(ConvoyError, match=f"^artifacts/{name}/{file}: no stage wrote this") as refusal:
        refuse_strays(root, ["lenet"])
    assert f"`mv artifacts/{name}/{file} .`" in str(refusal.value)
    assert stray.read_text() == "mine"


def test_file_in_results_off_the_list_stops_the_run(root: Path) -> None:
    (root / "artifacts/train/lenet/notes.txt").write_text("mine")
    with pytest.raises(ConvoyError, match=r"^artifacts/train/lenet/notes\.txt: no stage wrote this"):
        refuse_strays(root, ["resnet"])


@pytest.mark.parametrize("name", ["train/resnet", "register", "fetch"])
def test_folder_in_the_place_of_an_output_stops_the_run(name: str, root: Path) -> None:
    shutil.rmtree(root / "artifacts" / name, ignore_errors=True)
    (root / "artifacts" / name).mkdir()
    (root / "artifacts" / name / "weights.safetensors").write_text("mine")
    with pytest.raises(ConvoyError, match=f"^artifacts/{name}/weights.safetensors: no stage wrote this"):
        refuse_strays(root, ["lenet", "resnet"])


@pytest.mark.parametrize("mark", [None, "{", "3", '{"resolt.csv": "hash"}'])
def test_results_without_manifest_do_not_stop_the_run(mark: str | None, root: Path) -> None:
    folder = root / "artifacts/train/lenet"
    with Repo(str(root)) as repo:
        repo.cache.local.add([str(folder / "result.csv"), str(folder / "more/result.csv")], repo.fs, HASHES)
    (folder / MANIFEST).unlink()
    if mark:
        (folder / MANIFEST).write_text(mark)
    refuse_strays(root, ["lenet"])


@pytest.mark.parametrize(
    "place",
    ["artifacts/notes.txt", "artifacts/mine/notes.txt", "artifacts/train/notes.txt", "artifacts/train/mine/notes.txt"],
)
@pytest.mark.parametrize("names", [["lenet"], ["resnet"]])
def test_files_outside_the_outputs_are_left_alone(place: str, names: list[str], root: Path) -> None:
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).write_text("mine")
    refuse_strays(root, names)
    remove_unlisted(root, names)
    assert (root / place).read_text() == "mine"


def test_results_of_an_architecture_off_the_list_are_removed(root: Path) -> None:
    write_output(root / "artifacts/train/vgg")
    (root / "artifacts/train/.DS_Store").write_bytes(b"of macOS")
    remove_unlisted(root, ["lenet"])
    assert sorted(path.name for path in (root / "artifacts/train").iterdir()) == [".DS_Store", "lenet"]
