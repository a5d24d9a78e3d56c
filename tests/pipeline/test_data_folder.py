"""The folder data/: it follows data.dvc, and never overwrites files of the user."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from dvc.repo import Repo

from convoy.core import config
from convoy.core.errors import ConvoyError
from factories import PETS, make_png, make_zip
from pipeline.data_folder import sync_commands
from repositories import run_dvc
from small_project import ROOT

Edit = Callable[[Path], object]
PETS_ZIP = make_zip(PETS).decode("latin-1")
SAMPLE = {"digits.zip": PETS_ZIP, "README.md": "about", "more/one.png": "1"}
MINE = {f"{label}/1.png": make_png(value).decode("latin-1") for value, label in enumerate(("cat", "dog"))}


@pytest.fixture(autouse=True)
def dvc_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'src'}")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose data/ was imported from samples/, as in a clone after a first run."""
    root = tmp_path_factory.mktemp("imported") / "a project"
    root.mkdir()
    write_files(root / "samples", SAMPLE)
    shutil.copytree(ROOT / "conf", root / "conf")
    run_dvc(root, "init", "--quiet", "--no-scm")
    run_dvc(root, "import-url", "--quiet", "samples", "data")
    return root


@pytest.fixture
def root(imported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(imported, tmp_path / "a project")


@pytest.fixture
def fresh_clone(root: Path) -> Path:
    """The project as it is cloned: without data/ and without a cache."""
    shutil.rmtree(root / "data")
    shutil.rmtree(root / ".dvc/cache")
    return root


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode("latin-1"))


def read_files(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): file.read_bytes().decode("latin-1")
        for file in folder.rglob("*")
        if file.is_file()
    }


def sync_data(root: Path, *, update: bool = False) -> None:
    """What the main command does."""
    for command in sync_commands(root, update=update):
        run_dvc(root, *command)


def edit_data_dvc(root: Path, old: str, new: str) -> None:
    (root / "data.dvc").write_text((root / "data.dvc").read_text().replace(old, new))


def find_commands(message: str, heading: str) -> list[str]:
    """The commands below a heading of a message."""
    lines = message.splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith(heading)]
    found = []
    for line in lines[start + 1 :]:
        if not line.startswith("  "):
            break
        found.append(line.strip())
    return found


def run_advised_commands(root: Path, message: str, heading: str) -> None:
    """Type what a message says, as far as it is not about the whole pipeline."""
    typed = find_commands(message, heading)
    assert typed[-1] == "convoy run"
    # The project of this test has no pipeline/ of its own, where the installed `convoy` would look for it.
    lines = "\n".join(typed[:-1]).replace("convoy use", "python -m pipeline.cli use")
    subprocess.run(["bash", "-ec", lines], cwd=root, check=True, capture_output=True)


# Nothing is at stake


def test_fresh_clone_gets_its_data(fresh_clone: Path) -> None:
    sync_data(fresh_clone)
    assert read_files(fresh_clone / "data") == SAMPLE
    assert sync_commands(fresh_clone, update=False) == []


def test_data_as_recorded_is_left_alone(root: Path) -> None:
    assert sync_commands(root, update=False) == []


@pytest.mark.parametrize(
    "edit",
    [
        lambda root: shutil.rmtree(root / "data"),
        lambda root: (root / "data/digits.zip").unlink(),
        lambda root: [file.unlink() for file in (root / "data").rglob("*") if file.is_file()],  # empty folders stay
        lambda root: shutil.copy(root / "data/digits.zip", root / "data/copy.zip"),
        lambda root: (root / "data/digits.zip").rename(root / "data/renamed.zip"),
    ],
    ids=["all removed", "one removed", "empty folders", "copied within", "renamed"],
)
@pytest.mark.parametrize("is_fresh", [False, True])
def test_data_saved_elsewhere_is_replaced_without_asking(edit: Edit, is_fresh: bool, root: Path) -> None:
    if is_fresh:
        shutil.rmtree(root / ".dvc/cache")
    edit(root)
    sync_data(root)
    assert read_files(root / "data") == SAMPLE


@pytest.mark.parametrize("is_frozen", [True, False])
def test_changed_source_is_taken_up(is_frozen: bool, root: Path) -> None:
    if not is_frozen:
        edit_data_dvc(root, "frozen: true\n", "")
    write_files(root / "samples", MINE)
    (root / "samples/digits.zip").unlink()
    sync_data(root)
    assert read_files(root / "data") == read_files(root / "samples")
    assert sync_commands(root, update=False) == []


def test_another_path_is_taken_up(root: Path) -> None:
    write_files(root / "flowers", MINE)
    edit_data_dvc(root, "path: samples", "path: flowers")
    sync_data(root)
    assert read_files(root / "data") == MINE


def test_another_recorded_version_is_checked_out(root: Path) -> None:
    recorded = (root / "data.dvc").read_text()
    write_files(root / "samples", MINE)
    sync_data(root)
    (root / "data.dvc").write_text(recorded)
    shutil.rmtree(root / "samples")
    write_files(root / "samples", SAMPLE)
    sync_data(root)
    assert read_files(root / "data") == SAMPLE
    assert (root / "data.dvc").read_text() == recorded


def test_data_that_dvc_added_are_their_own_source(root: Path) -> None:
    (root / "data.dvc").unlink()
    run_dvc(root, "add", "--quiet", "data")
    write_files(root / "data", MINE)
    assert sync_commands(root, update=False) == []


def test_remote_source_is_checked_only_on_update(root: Path) -> None:
    edit_data_dvc(root, "path: samples", "path: https://example.invalid/flowers")
    with Repo(str(root)) as repo:  # as if it had been imported from there
        stage = repo.stage.load_one(str(root / "data.dvc"))
        stage.md5 = stage.compute_md5()
        stage.dump()
    assert sync_commands(root, update=False) == []
    assert sync_commands(root, update=True) == [["update", "data.dvc"]]
    (root / "data/digits.zip").unlink()
    sync_data(root)
    assert read_files(root / "data") == SAMPLE


# Files at stake


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda root: write_files(root / "data", MINE), "data/cat/1.png, data/dog/1.png"),
        (lambda root: write_files(root / "data/more", {"two.png": "2"}), "data/more/two.png"),
        (lambda root: write_files(root / "data", {".labels.csv": "mine"}), "data/.labels.csv"),
        (lambda root: write_files(root / "data", {"digits.zip": "changed"}), "data/digits.zip"),
        (lambda root: write_files(root / "data", {"my pictures/ä 'b'.png": "mine"}), "data/my pictures/ä 'b'.png"),
    ],
    ids=["beside", "within", "hidden", "changed", "odd names"],
)
@pytest.mark.parametrize(("is_fresh", "is_frozen"), [(True, True), (False, False)])
def test_files_of_the_user_stop_the_run(edit: Edit, named: str, is_fresh: bool, is_frozen: bool, root: Path) -> None:
    if is_fresh:
        shutil.rmtree(root / ".dvc/cache")
    if not is_frozen:
        edit_data_dvc(root, "frozen: true\n", "")
    edit(root)
    before = read_files(root)
    with pytest.raises(ConvoyError) as refusal:
        sync_commands(root, update=False)
    assert f"nowhere else: {named}. A run would replace " in str(refusal.value)
    with pytest.raises(ConvoyError, match="nowhere else"):
        sync_commands(root, update=True)
    untouched = {name: text for name, text in read_files(root).items() if not name.startswith(".dvc/")}
    assert untouched == {name: text for name, text in before.items() if not name.startswith(".dvc/")}


@pytest.mark.parametrize(
    "change",
    [
        lambda root: write_files(root / "samples", {"new.png": "new"}),
        lambda root: shutil.rmtree(root / "samples"),
        lambda root: edit_data_dvc(root, "path: samples", "path: https://example.invalid/flowers"),
    ],
    ids=["changed source", "lost source", "remote source"],
)
def test_files_of_the_user_stop_the_run_whatever_the_source(change: Edit, root: Path) -> None:
    write_files(root / "data", MINE)
    change(root)
    with pytest.raises(ConvoyError, match=r"nowhere else: data/cat/1\.png, data/dog/1\.png"):
        sync_commands(root, update=False)


@pytest.mark.parametrize(
    ("source", "beside"),
    [("samples", True), ("samples", False), ("a: b/{flowers}", True), ("https://example.invalid/flowers", False)],
)
def test_training_on_own_files_as_advised_works(source: str, beside: bool, fresh_clone: Path) -> None:
    write_files(fresh_clone / "data", MINE | (SAMPLE if beside else {}))
    edit_data_dvc(fresh_clone, "path: samples", f"path: {json.dumps(source)}" if " " in source else f"path: {source}")
    write_files(fresh_clone / "a: b/{flowers}", SAMPLE)
    with pytest.raises(ConvoyError) as refusal:
        sync_commands(fresh_clone, update=False)
    run_advised_commands(fresh_clone, str(refusal.value), "To train on ")
    sync_data(fresh_clone)
    assert read_files(fresh_clone / "data") == read_files(fresh_clone / "my-images") == MINE
    assert config.parse(config.compose_text(fresh_clone))["dataset"]["name"] == "my-images"
    assert sync_commands(fresh_clone, update=False) == []


def test_files_among_those_of_the_sample_move_with_them(fresh_clone: Path) -> None:
    write_files(fresh_clone / "data/more", {"two.png": "2"})
    write_files(fresh_clone / "data", SAMPLE)
    with pytest.raises(ConvoyError) as refusal:
        sync_commands(fresh_clone, update=False)
    run_advised_commands(fresh_clone, str(refusal.value), "To train on ")
    sync_data(fresh_clone)
    assert read_files(fresh_clone / "data") == SAMPLE | {"more/two.png": "2"}


@pytest.mark.parametrize("beside", [True, False], ids=["beside the sample", "alone"])
def test_moving_the_files_as_advised_resolves_the_error(beside: bool, fresh_clone: Path) -> None:
    write_files(fresh_clone / "data", {"my pictures/ä 'b'.png": "mine", **(SAMPLE if beside else {})})
    (fresh_clone.parent / "my-images").mkdir()  # which is taken
    with pytest.raises(ConvoyError) as refusal:
        sync_commands(fresh_clone, update=False)
    run_advised_commands(fresh_clone, str(refusal.value), "To exclude ")
    sync_data(fresh_clone)
    assert read_files(fresh_clone / "data") == SAMPLE
    assert read_files(fresh_clone.parent / "my-images-2") == {"my pictures/ä 'b'.png": "mine"}


def test_file_in_place_of_the_folder_is_not_overwritten(fresh_clone: Path) -> None:
    (fresh_clone / "data").write_text("all my images")
    with pytest.raises(ConvoyError, match=r"holds a file that .* nowhere else: data. A run"):
        sync_commands(fresh_clone, update=False)


@pytest.mark.parametrize("exists", [True, False])
def test_link_in_the_place_of_the_folder_is_refused(exists: bool, fresh_clone: Path) -> None:
    mine = fresh_clone.parent / "my pictures"
    (fresh_clone / "data").symlink_to(mine)
    if exists:
        write_files(mine, MINE)
    with pytest.raises(ConvoyError, match="data is a link to ") as refusal:
        sync_commands(fresh_clone, update=False)
    if exists:
        run_advised_commands(fresh_clone, str(refusal.value), "data is a link")
        sync_data(fresh_clone)
        assert sync_commands(fresh_clone, update=False) == []
        assert read_files(fresh_clone / "data") == read_files(mine) == MINE


@pytest.mark.parametrize("target", ["/etc/hostname", "nowhere", "../samples"])
def test_links_among_the_images_are_refused(target: str, root: Path) -> None:
    (root / "data/link.png").symlink_to(target)
    with pytest.raises(ConvoyError, match=f"data/link.png is a link to {re.escape(target)}, which"):
        sync_commands(root, update=False)


# Plain DVC


def test_plain_dvc_loses_no_file_of_the_user(fresh_clone: Path) -> None:
    write_files(fresh_clone / "data", MINE)
    run_dvc(fresh_clone, "repro", "--quiet", "data.dvc")
    assert read_files(fresh_clone / "data") == MINE
    shutil.rmtree(fresh_clone / "data")
    run_dvc(fresh_clone, "checkout", "--quiet")
    assert read_files(fresh_clone / "data") == MINE


@pytest.mark.parametrize("change", ["files", "path"])
@pytest.mark.parametrize("choice", ["To train on data/ as it is", "To train on "])
def test_data_recorded_by_plain_dvc_is_neither_mixed_nor_lost(change: str, choice: str, root: Path) -> None:
    write_files(root / "flowers", {"rose/1.png": "a rose"})
    if change == "files":
        write_files(root / "data", MINE)
    else:
        edit_data_dvc(root, "path: samples", "path: flowers")
    source = {"files": "samples", "path": "flowers"}[change]
    run_dvc(root, "repro", "--quiet", "data.dvc")
    kept = read_files(root / "data")
    with pytest.raises(ConvoyError, match=f"names {source} as the source of data/, but they differ in ") as refusal:
        sync_commands(root, update=False)
    run_advised_commands(root, str(refusal.value), choice if choice.endswith("is") else f"To train on {source}")
    sync_data(root)
    assert read_files(root / "data") == (kept if choice.endswith("is") else read_files(root / source))


# The source


def test_lost_source_is_an_error_only_where_it_is_needed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / "samples")
    assert sync_commands(root, update=False) == []
    assert "samples, the source of the images in data.dvc, does not exist: data/ is used" in capsys.readouterr().out
    with pytest.raises(ConvoyError, match=r"^samples, the source of the images .* by `convoy run`$"):
        sync_commands(root, update=True)
    shutil.rmtree(root / "data")
    assert sync_commands(root, update=False) == [["checkout", "data.dvc"]]
    shutil.rmtree(root / ".dvc/cache")
    with pytest.raises(ConvoyError, match=r"^samples, the source of the images .*`dvc pull data.dvc`"):
        sync_commands(root, update=False)


def test_dvc_is_kept_from_removing_data_for_a_lost_source(root: Path) -> None:
    edit_data_dvc(root, "frozen: true\n", "")
    shutil.rmtree(root / "samples")
    with pytest.raises(
        ConvoyError, match=r"^samples, the source of the images .* by `dvc freeze data\.dvc` and `convoy run`$"
    ):
        sync_commands(root, update=False)


def test_links_in_the_source_are_refused_before_dvc_copies_them(root: Path) -> None:
    (root / "samples/secret.png").symlink_to("/etc/hostname")
    with pytest.raises(ConvoyError, match=r"^samples/secret.png is a link to /etc/hostname, which is not a file"):
        sync_commands(root, update=False)
