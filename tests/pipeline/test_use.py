"""The command that chooses the source of the images: what it finds, writes, proposes and refuses."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from command_line import run_command
from convoy.core import config
from convoy.core.errors import ConvoyError
from convoy.launcher import CALLER_FOLDER
from factories import ARCHIVES, PETS, SPLIT_PETS, make_png, make_zip, write
from pipeline import use as command
from pipeline.data_folder import sync_commands
from pipeline.fetch import fetch
from pipeline.stage import Stage
from pipeline.use import use
from repositories import init_git, run_dvc, run_git
from small_project import ROOT

Output = pytest.CaptureFixture[str]
MORE_PETS = {**PETS, **{f"dog/{number}.png": make_png(number) for number in range(10, 40)}}
TABLE = "path,label\n1.png,cat\n2.png,dog\n3.png,dog\n"
IMAGES = {"1.png": make_png(1), "2.png": make_png(2)}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project as it is cloned, with the bundled digits as its source."""
    root = tmp_path_factory.mktemp("cloned") / "project"
    shutil.copytree(ROOT / "conf", root / "conf")
    for file in ("dvc.yaml", "params.yaml", "data.dvc", "data.lock", ".gitignore"):
        shutil.copy(ROOT / file, root)
    write(root / "samples", PETS)
    init_git(root)
    run_dvc(root, "init", "--quiet")
    run_git(root, "add", "--all")
    run_git(root, "commit", "--quiet", "--message", "first")
    return root


@pytest.fixture
def root(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'src'}")
    root = shutil.copytree(clone, tmp_path / "project")
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return write(tmp_path / "pets", PETS)


def read_choice(root: Path) -> dict[str, bytes]:
    files = [root / "data.dvc", *(root / "conf").rglob("*.yaml")]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


def dataset(root: Path) -> dict:
    return config.parse(config.compose_text(root))["dataset"]


def git_status(root: Path) -> str:
    return subprocess.check_output(["git", "status", "--porcelain"], cwd=root, text=True)


def find_line(output: str, start: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith(start)]
    return line.removeprefix(start)


def run_commands(root: Path, *commands: str) -> None:
    """Run printed commands; the installed `convoy` would run this repository's own project."""
    lines = "\n".join(commands).replace("convoy use", "python -m pipeline.cli use")
    subprocess.run(["bash", "-ec", lines], cwd=root, check=True, capture_output=True)


def make_photo(width: int, height: int, mode: str = "RGB", value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height), value).save(file, "JPEG")
    return file.getvalue()


# What it finds and writes


def test_table_with_other_columns_is_chosen_by_options(root: Path, tmp_path: Path, capsys: Output) -> None:
    write(tmp_path / "moles", {f"part_{number}/{number}.png": make_png(number) for number in range(4)})
    write(tmp_path / "moles", {"metadata.csv": "id,dx,lesion\n0,nv,a\n1,nv,a\n2,mel,b\n3,mel,c\n"})
    with pytest.raises(ConvoyError, match=r"moles/metadata\.csv has the columns id, dx, lesion: .* --path COLUMN"):
        use(root, "../moles")
    options = {"table.file": "metadata.csv", "table.path": "id", "table.label": "dx", "table.group": "lesion"}
    use(root, "../moles", options=options)
    assert "found 4 images in 2 classes (mel 2, nv 2)" in capsys.readouterr().out
    columns = {"file": "metadata.csv", "path": "id", "label": "dx", "group": "lesion", "split": None}
    assert dataset(root)["table"] == columns
    use(root, "../moles", options={"table.group": ""})
    assert dataset(root)["table"] == columns | {"group": None}
    assert "undo: convoy use" in (output := capsys.readouterr().out)
    assert "--group lesion" in output


def test_folder_is_described_and_chosen(root: Path, pets: Path, capsys: Output) -> None:
    use(root, "../pets")
    output = capsys.readouterr().out
    assert "found 3 images in 2 classes (cat 2, dog 1); no splits; grey, about 4x3 pixels\n" in output
    assert "wrote conf/dataset/pets.yaml, data.dvc, conf/config.yaml\n" in output
    found = dataset(root)
    assert (found["name"], found["longest_side"], found["group"], found["exclude"]) == ("pets", 256, None, None)
    assert f"- path: {pets}\n" in (root / "data.dvc").read_text()


def test_next_run_fetches_what_was_chosen(root: Path, pets: Path) -> None:
    use(root, str(pets))
    config.compose(root)
    for arguments in sync_commands(root, update=False):
        run_dvc(root, *arguments)
    assert sync_commands(root, update=False) == []
    Stage(root, "fetch").run(fetch)
    assert "pets:\n" in (root / "data.lock").read_text()


@pytest.mark.parametrize("again", ["../pets", "../pets/", "../project/../pets"])
def test_second_use_of_a_source_changes_nothing(again: str, root: Path, pets: Path, capsys: Output) -> None:
    use(root, str(pets))
    before = read_choice(root)
    capsys.readouterr()
    use(root, again)
    assert read_choice(root) == before
    assert "data.dvc and conf/ name this source already\n" in capsys.readouterr().out


def test_use_after_a_fetch_keeps_the_recorded_version(root: Path, pets: Path) -> None:
    use(root, str(pets))
    for arguments in sync_commands(root, update=False):
        run_dvc(root, *arguments)
    before = read_choice(root)
    use(root, str(pets))
    assert read_choice(root) == before


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archive_is_chosen_under_its_name(kind: str, root: Path, tmp_path: Path, capsys: Output) -> None:
    archive = tmp_path / f"Pets 2.{kind}"
    archive.write_bytes(ARCHIVES[kind](SPLIT_PETS))
    use(root, str(archive))
    assert "found 4 images in 2 classes (cat 2, dog 2); splits: train 2, val 1, test 1;" in capsys.readouterr().out
    assert dataset(root)["name"] == "Pets-2"


def test_labels_in_a_table_are_found(root: Path, tmp_path: Path, capsys: Output) -> None:
    write(tmp_path / "pets", {"labels.csv": TABLE, "images.zip": make_zip(IMAGES)})
    use(root, "../pets")
    output = capsys.readouterr().out
    assert "found 2 images in 2 classes (cat 1, dog 1);" in output
    assert "note: 1 image can't be used (too many for fetch.max_invalid_fraction=0.05, so that a run stops): " in output


def test_parquet_file_with_images_is_found(root: Path, tmp_path: Path, capsys: Output) -> None:
    table = pd.DataFrame({"image": [{"bytes": content} for content in IMAGES.values()], "label": ["cat", "dog"]})
    table.to_parquet(tmp_path / "pets.parquet")
    use(root, "../pets.parquet")
    assert "found 2 images in 2 classes (cat 1, dog 1);" in capsys.readouterr().out
    assert dataset(root)["name"] == "pets"


def test_folder_in_the_project_is_named_relative_to_it(root: Path) -> None:
    write(root / "my-images/pets", PETS)
    use(root, str(root / "my-images/pets"))
    assert "- path: my-images/pets\n" in (root / "data.dvc").read_text()


def test_address_is_not_looked_at(root: Path, capsys: Output) -> None:
    use(root, "s3://bucket/some/flowers/")
    assert "s3://bucket/some/flowers/ was not looked at" in capsys.readouterr().out
    assert dataset(root)["name"] == "flowers"
    assert sync_commands(root, update=False) == [["update", "data.dvc"]]


def test_torchvision_set_is_chosen_by_its_file(root: Path, capsys: Output) -> None:
    use(root, "fashion_mnist")
    output = capsys.readouterr().out
    assert output.startswith("Fashion-MNIST (Xiao et al. 2017): 70,000 images of clothing")
    assert "wrote conf/config.yaml\n" in output
    assert dataset(root)["torchvision"]["name"] == "FashionMNIST"


# Names


@pytest.mark.parametrize("name", ["null", "007", "no", "1e3", "my pets", "Tiere-Größe", "v1.2", "_x", "true"])
def test_valid_names_reach_the_composed_settings(name: str, root: Path, pets: Path) -> None:
    use(root, str(pets), name)
    assert dataset(root)["name"] == name
    use(root, str(pets), name)


@pytest.mark.parametrize("name", ["a/b", "-x", "a:b", "Default", "x" * 61, " x"])
def test_invalid_names_are_refused(name: str, root: Path, pets: Path) -> None:
    with pytest.raises(ConvoyError, match=r"; give it a name by --name$"):
        use(root, str(pets), name)
    assert git_status(root) == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", "data.lock records that the images of digits come from samples: give these another name by --name"),
        ("mnist", "conf/dataset/mnist.yaml is for other images: give these another name by --name"),
        ("folder", "conf/dataset/folder.yaml is for other images"),
    ],
)
def test_name_of_other_images_is_refused(name: str, message: str, root: Path, pets: Path) -> None:
    with pytest.raises(ConvoyError, match=f"^{message}"):
        use(root, str(pets), name)
    assert git_status(root) == ""


def test_name_chosen_for_another_folder_is_refused(root: Path, pets: Path, tmp_path: Path) -> None:
    use(root, str(pets))
    write(tmp_path / "more/pets", PETS)
    with pytest.raises(ConvoyError, match=r"^conf/dataset/pets\.yaml is for other images"):
        use(root, "../more/pets")


def test_edited_file_of_the_same_source_is_kept(root: Path, pets: Path) -> None:
    use(root, str(pets))
    file = root / "conf/dataset/pets.yaml"
    file.write_text(file.read_text().replace("256", "512"))
    use(root, "mnist")
    use(root, str(pets))
    assert dataset(root)["longest_side"] == 512


# The way back


def test_undo_restores_the_committed_choice(root: Path, pets: Path, capsys: Output) -> None:
    use(root, str(pets))
    undo = find_line(capsys.readouterr().out, "undo: ")
    assert undo == "git checkout -- data.dvc conf/config.yaml && rm conf/dataset/pets.yaml"
    run_commands(root, undo)
    assert git_status(root) == ""


def test_undo_keeps_what_was_not_committed(root: Path, pets: Path, capsys: Output) -> None:
    settings = root / "conf/config.yaml"
    settings.write_text(settings.read_text().replace("size: 32", "size: 64"))
    before = read_choice(root)
    use(root, str(pets))
    undo = find_line(capsys.readouterr().out, "undo: ")
    run_commands(root, undo)
    assert read_choice(root) == before


def test_undo_of_a_second_choice_returns_to_the_first(root: Path, pets: Path, capsys: Output) -> None:
    use(root, str(pets))
    before = read_choice(root)
    write(pets.with_name("more pets"), PETS)
    capsys.readouterr()
    use(root, "../more pets")
    run_commands(root, find_line(capsys.readouterr().out, "undo: "))
    assert read_choice(root) == before


def test_error_in_other_settings_changes_nothing(root: Path, pets: Path) -> None:
    (root / "conf/model/lenet.yaml").write_text("lenet: [")
    before = read_choice(root)
    with pytest.raises(ConvoyError, match="conf/ does not compose"):
        use(root, str(pets))
    assert read_choice(root) == before


def test_undo_from_another_folder_begins_in_the_project(
    root: Path, pets: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.chdir(pets)
    use(root, ".")
    run_commands(pets, find_line(capsys.readouterr().out, "undo: "))
    assert git_status(root) == ""


# What it proposes


@pytest.mark.parametrize(
    ("width", "height", "mode", "next_command"),
    [
        (28, 28, "L", "convoy run"),
        (32, 32, "RGB", "convoy run experiment=photographs"),
        (400, 300, "RGB", "convoy run experiment=finetune_small"),
        (500, 500, "L", "convoy run experiment=finetune_small"),
    ],
)
def test_preset_follows_from_size_and_colour(
    width: int, height: int, mode: str, next_command: str, root: Path, tmp_path: Path, capsys: Output
) -> None:
    images = {f"{label}/{number}.jpg": make_photo(width, height, mode) for label in "ab" for number in range(3)}
    write(tmp_path / "images", images)
    use(root, "../images")
    assert find_line(capsys.readouterr().out, "next: ") == next_command


def test_chosen_experiment_is_not_proposed_again(root: Path, pets: Path, capsys: Output) -> None:
    settings = root / "conf/config.yaml"
    settings.write_text(settings.read_text().replace("experiment: null", "experiment: photographs"))
    use(root, str(pets))
    output = capsys.readouterr().out
    assert "conf/config.yaml chooses experiment: photographs\n" in output
    assert find_line(output, "next: ") == "convoy run"


def test_too_few_test_images_are_noted(root: Path, pets: Path, capsys: Output) -> None:
    use(root, str(pets))
    assert "note: about 1 images will be for testing, and with fewer than" in capsys.readouterr().out


def test_packing_many_files_as_proposed_works(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(command, "MANY_FILES", 30)
    write(tmp_path / "my pets", MORE_PETS)
    use(root, "../my pets")
    lines = capsys.readouterr().out.splitlines()
    run_commands(root, *(line for line in lines if line.startswith("  ")))
    assert f'- path: "{tmp_path}/my pets.zip"\n' in (root / "data.dvc").read_text()
    assert dataset(root)["name"] == "my-pets"


# What it refuses


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("../nowhere", r"^\.\./nowhere: there is no such file or folder$"),
        ("pets.zip", r"^pets\.zip: there is no such file or folder$"),
        ("minst", "^minst: there is no such file or folder, and no such data set .* did you mean mnist"),
        ("folder", "^folder: there is no such file or folder, and no such data set"),
        (".", r"^\. contains the project itself"),
        ("..", r"^\.\. contains the project itself"),
        ("gs://bucket/pets", r"^gs://bucket/pets: DVC needs another package for it: `uv pip install dvc-gs`$"),
    ],
)
def test_what_is_no_source_is_refused(source: str, message: str, root: Path) -> None:
    with pytest.raises(ConvoyError, match=message):
        use(root, source)
    assert git_status(root) == ""


def test_torchvision_set_keeps_its_name(root: Path) -> None:
    with pytest.raises(ConvoyError, match=r"^--name digits: data sets of torchvision keep the names"):
        use(root, "mnist", "digits")


def test_links_in_the_source_are_refused(root: Path, pets: Path) -> None:
    (pets / "cat/secret.png").symlink_to("/etc/hostname")
    with pytest.raises(ConvoyError, match=r"^pets/cat/secret\.png is a link to /etc/hostname"):
        use(root, str(pets))


# Files in data/


@pytest.mark.parametrize("source", ["data", "data/pets"])
def test_source_in_data_is_refused(source: str, root: Path) -> None:
    write(root / "data/pets", PETS)
    with pytest.raises(ConvoyError, match=f"^{source} is in data/, .* by `mv {source} my-images`, and use that$"):
        use(root, source)


def replace_by_link(root: Path) -> None:
    (root / "data").symlink_to(root / "samples")


def track_data(root: Path) -> None:
    write(root / "data", PETS)
    (root / "data.dvc").unlink()
    run_dvc(root, "add", "--quiet", "data")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: write(root / "data", PETS), "^data/ .* 3 files that DVC did not put there"),
        (replace_by_link, "^data is a link to "),
        (track_data, "^data/ itself is the source of the images"),
    ],
    ids=["files of the user", "link", "dvc add"],
)
def test_source_that_would_replace_own_files_is_refused(
    prepare: Callable[[Path], object], message: str, root: Path, pets: Path
) -> None:
    if prepare is not track_data:
        shutil.rmtree(root / "samples")
    prepare(root)
    before = read_choice(root)
    with pytest.raises(ConvoyError, match=message):
        use(root, str(pets))
    assert read_choice(root) == before


# The command


def test_command_explains_an_error_in_one_line(root: Path) -> None:
    arguments = [sys.executable, "-m", "pipeline.cli", "use", "nowhere/at/all"]
    result = subprocess.run(arguments, cwd=root, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "convoy: nowhere/at/all: there is no such file or folder\n"


def test_path_is_relative_to_the_folder_of_the_user(root: Path, pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CALLER_FOLDER, str(pets))
    run_command("use", ".", "--name", "animals")
    assert f"- path: {pets}\n" in (root / "data.dvc").read_text()
    assert dataset(root)["name"] == "animals"


def test_command_starts_without_what_it_does_not_need() -> None:
    code = "import sys, pipeline.use; print(sorted({'dvc', 'hydra', 'mlflow', 'torch'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"
