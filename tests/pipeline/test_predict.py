"""The predict command: it predicts images with a registered model."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from command_line import run_command
from convoy.inference import predictor
from convoy.serving import decode_worker
from convoy.serving.onnx_model import OnnxModel
from pipeline import predict
from registry_fixtures import CLASSES, register_model
from serving_fixtures import draw, write_onnx
from small_project import ROOT


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with a champion."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        register_model(folder)
    return folder


@pytest.fixture
def working_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder as the working directory, and in it a new folder `images` of pictures."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder with three pictures, one of them below it, and what is none."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(["b.png", "a.jpg", "more/c.PNG"]):
        draw_image(number).save(folder / name)
    (folder / "labels.csv").write_text("path,label\n")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def draw_image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8))


def end_of_command(*arguments: object) -> int | str | None:
    """Run a command; returns what it exits with, None where all went well."""
    try:
        run_command(*arguments)
    except SystemExit as end:
        return end.code
    return None


def read_lines(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_folder_yields_all_images_below_it_in_order(
    working_folder: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of_command("predict", image_folder, "--json") is None
    found = read_lines(capsys)
    assert [Path(each["image"]).relative_to(image_folder).as_posix() for each in found] == [
        "a.jpg",
        "b.png",
        "more/c.PNG",
    ]
    assert all(each["label"] in CLASSES and 1 / 3 <= each["probability"] <= 1 for each in found)


def test_files_without_suffix_are_images_and_others_are_counted(
    working_folder: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "more/c.PNG").rename(image_folder / "more/c")
    (image_folder / "more/notes.txt").write_text("milk, bread")
    assert end_of_command("predict", image_folder / "more", "--json") is None
    said = capsys.readouterr()
    assert [json.loads(line)["image"] for line in said.out.splitlines()] == [str(image_folder / "more/c")]
    assert "more: 1 files without an image suffix are ignored" in said.err


def test_predictions_are_in_the_order_of_the_arguments(
    working_folder: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [image_folder / "more/c.PNG", image_folder / "a.jpg", image_folder / "b.png"]
    assert end_of_command("predict", *given, "--json", "--model", "models:/convoy/1") is None
    restored = predictor.restore(working_folder / "left")
    expected = restored.probabilities(np.stack([restored.preprocess(file.read_bytes()) for file in given]))
    for each, row, file in zip(read_lines(capsys), expected, given, strict=True):
        assert each["image"] == str(file)
        assert each["label"] == CLASSES[row.argmax()]
        assert each["probability"] == pytest.approx(row.max(), abs=1e-6)


@pytest.mark.parametrize("pattern", ["*.png", "**/*.[pP][nN][gG]", "more"])
def test_pattern_gives_what_it_matches(
    pattern: str,
    working_folder: Path,
    image_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = {"*.png": ["b.png"], "**/*.[pP][nN][gG]": ["b.png", "more/c.PNG"], "more": ["more/c.PNG"]}[pattern]
    assert end_of_command("predict", image_folder / pattern, "--json") is None
    assert [each["image"] for each in read_lines(capsys)] == [str(image_folder / name) for name in expected]


def test_name_that_looks_like_a_pattern_is_a_file_first(image_folder: Path) -> None:
    draw_image(7).save(image_folder / "a[1].png")
    assert list(predict.find_images([str(image_folder / "a[1].png")])) == [image_folder / "a[1].png"]


def test_table_shows_model_label_and_probability(
    working_folder: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(image_folder)
    for name in ("mlflow.db", "params.yaml"):
        (image_folder / name).symlink_to(working_folder / name)
    assert end_of_command("predict", "a.jpg", "b.png") is None
    said = capsys.readouterr().out
    assert said.startswith("convoy 1, lenet")
    assert [line.split()[0] for line in said.splitlines()[3:]] == ["a.jpg", "b.png"]
    assert all(line.split()[1] in CLASSES for line in said.splitlines()[3:])


def test_invalid_image_is_named_and_the_others_are_predicted(
    working_folder: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (image_folder / "torn.png").write_bytes((image_folder / "b.png").read_bytes()[:500])
    (image_folder / "empty").mkdir()
    given = [
        image_folder / name for name in ("torn.png", "a.jpg", "labels.csv", "none.png", "empty", "no*.gif", "b.png")
    ]
    reasons = {
        "torn.png": "can't be decoded: ",
        "labels.csv": "is not an image in BMP, GIF",
        "none.png": "does not exist",
        "empty": "is a folder without images",
        "no*.gif": "does not exist",
    }
    assert end_of_command("predict", *given, "--json") == "convoy: 5 images could not be predicted"
    found = {Path(each["image"]).name: each for each in read_lines(capsys)}
    assert list(found) == [path.name for path in given]
    assert all(found[name]["error"].startswith(reason) for name, reason in reasons.items())
    assert found["a.jpg"]["label"] in CLASSES

    monkeypatch.setenv("COLUMNS", "300")
    assert end_of_command("predict", *given[:3]) == "convoy: 2 images could not be predicted"
    said = capsys.readouterr()
    assert f"{image_folder / 'torn.png'} can't be decoded: " in said.err
    assert "a.jpg" in said.out


def test_file_may_have_any_name(
    working_folder: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a[bold].png", "b\x1b[2J.png", os.fsdecode(b"c\xff.png"), "d [red].txt"):
        (image_folder / name).write_bytes(
            (image_folder / "b.png").read_bytes() if name.endswith("png") else b"no image"
        )
    monkeypatch.setenv("COLUMNS", "300")
    assert (
        end_of_command("predict", image_folder, image_folder / "d [red].txt")
        == "convoy: 1 image could not be predicted"
    )
    said = capsys.readouterr()
    assert all(name in said.out for name in ("a[bold].png", r"b\x1b[2J.png", r"c\udcff.png"))
    assert "\x1b" not in said.out
    assert "d [red].txt is not an image" in said.err
    end_of_command("predict", image_folder, "--json")
    assert str(image_folder / "b\x1b[2J.png") in [each["image"] for each in read_lines(capsys)]


def test_device_is_not_read(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert end_of_command("predict", "/dev/zero", "--json") == "convoy: 1 image could not be predicted"
    assert read_lines(capsys) == [{"image": "/dev/zero", "error": "is not a file"}]


@pytest.fixture
def colours(tmp_path: Path) -> OnnxModel:
    """A model that takes an image for a cat, a dog or a fox by its colour."""
    return OnnxModel(write_onnx(tmp_path / "model" / "model.onnx"), threads=1)


def test_only_one_batch_is_in_memory(colours: OnnxModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read, sizes = [], []
    probabilities = colours.probabilities

    def predict_batch(pixels: np.ndarray) -> np.ndarray:
        sizes.append(len(pixels))
        return probabilities(pixels)

    def read_file(path: Path) -> bytes:
        read.append(path)
        return draw("dog")

    monkeypatch.setattr(colours, "probabilities", predict_batch)
    monkeypatch.setattr(decode_worker, "read_file", read_file)
    names = [f"{number}.png" for number in range(150)]
    answers = predict.predict(colours, names)
    assert next(answers)["image"] == "0.png"
    assert len(read) == predict.BATCH_SIZE
    assert [each["image"] for each in answers] == names[1:]
    assert sum(sizes) == len(read) == 150
    assert max(sizes) == predict.BATCH_SIZE


def test_many_images_are_decoded_in_parallel_in_order(colours: OnnxModel, tmp_path: Path) -> None:
    labels = [CLASSES[number % 3] for number in range(230)]
    for number, label in enumerate(labels):
        (tmp_path / f"{number:03}.png").write_bytes(draw(label))
    (tmp_path / "100.png").write_bytes(draw("cat")[:-20])
    (tmp_path / "101.png").unlink()
    (tmp_path / "101.png").mkdir()
    found = list(predict.predict(colours, [str(tmp_path / f"{number:03}.png") for number in range(230)], top_k=2))
    assert "can't be decoded" in str(found[100]["error"])
    assert found[101]["error"] == "is a folder without images"
    assert [each.get("label") for each in found] == [*labels[:100], None, None, *labels[102:]]
    assert all(len(each["probabilities"]) == 2 for each in found if "label" in each)


def test_folder_of_a_model_needs_no_project(
    colours: OnnxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(draw("fox"))
    (tmp_path / "b,c.png").write_bytes(b"no image")
    said = end_of_command("predict", "a.png", "b,c.png", "--model", "model", "--csv", "--top-k", "2")
    assert said == "convoy: 1 image could not be predicted"
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["image"] for row in rows] == ["a.png", "b,c.png"]
    assert rows[0]["label"] == "fox"
    assert float(rows[0]["probability"]) > float(rows[0]["probability_2"])
    assert rows[1]["error"].startswith("is not an image")
    assert end_of_command("predict", "a.png", "--model", "model", "--json", "--top-k", "3") is None
    (line,) = read_lines(capsys)
    assert next(iter(line["probabilities"])) == "fox"
    assert len(line["probabilities"]) == 3


def test_command_with_onnx_imports_neither_torch_nor_mlflow(colours: OnnxModel, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(draw("fox"))
    code = (
        "import sys\nfrom pipeline import cli\n"
        f"cli.app(['predict', {str(tmp_path / 'a.png')!r}, '--model', {str(tmp_path / 'model')!r}], "
        "standalone_mode=False)\n"
        "print(sorted({'torch', 'mlflow', 'pandas', 'sklearn', 'dvc', 'hydra'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("models:/convoy/7", "MLflow has no models:/convoy/7"),
        ("models:/convoy@best", "MLflow has no models:/convoy@best"),
        ("left", "left has no model.onnx: give a folder of `convoy package`, or models:/NAME@ALIAS"),
    ],
)
def test_model_that_is_not_there_is_one_clear_line(
    uri: str, said: str, working_folder: Path, image_folder: Path
) -> None:
    assert str(end_of_command("predict", image_folder, "--model", uri)).startswith(f"convoy: {said}")


def test_nothing_is_created_if_no_model_is_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert "params.yaml is missing" in str(end_of_command("predict", "a.png"))
    (tmp_path / "params.yaml").write_text("register:\n  name: convoy\ntrainer:\n  accelerator: cpu\n")
    assert "mlflow.db does not exist" in str(end_of_command("predict", "a.png"))
    assert [file.name for file in tmp_path.iterdir()] == ["params.yaml"]


# The check before a version is used


@pytest.fixture
def evaluated(root: Path, tmp_path: Path) -> Path:
    """Prepared images of three classes, and what the model makes of them."""
    restored = predictor.restore(root / "left")
    pixels = np.random.default_rng(0).integers(0, 256, (450, 32, 32, 1), dtype=np.uint8)
    np.save(tmp_path / "test_pixels.npy", pixels)
    np.save(tmp_path / "test_labels.npy", np.zeros(450, np.int64))
    restored.info.save(tmp_path / "task.json")
    table = pd.DataFrame(restored.probabilities(pixels), columns=[f"probability_{name}" for name in CLASSES])
    table.to_parquet(tmp_path / "predictions.parquet")
    return tmp_path


def test_model_that_predicts_as_evaluated_passes_in_one_line(
    working_folder: Path, evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of_command("verify", "models:/convoy@champion", evaluated, evaluated) is None
    assert capsys.readouterr().out.startswith("models:/convoy@champion predicts 200 images as evaluated; probabilities")


def test_model_with_other_recorded_predictions_fails(working_folder: Path, evaluated: Path) -> None:
    table = pd.read_parquet(evaluated / "predictions.parquet")
    table.iloc[0] = np.roll(table.iloc[0], 1)
    table.to_parquet(evaluated / "predictions.parquet")
    said = end_of_command("verify", "models:/convoy@champion", evaluated, evaluated)
    assert str(said).startswith("convoy: models:/convoy/1 does not answer as it was evaluated")
    table[1:].to_parquet(evaluated / "predictions.parquet")
    said = end_of_command("verify", "models:/convoy@champion", evaluated, evaluated)
    assert "has 449 images" in str(said)


def test_folder_without_an_evaluation_is_one_clear_line(working_folder: Path, evaluated: Path) -> None:
    said = end_of_command("verify", "models:/convoy@champion", "nowhere", evaluated)
    assert said == (
        "convoy: nowhere/predictions.parquet does not exist: give the folder of an evaluation, such as "
        "artifacts/evaluate/x"
    )
    assert "nowhere/task.json does not exist" in str(
        end_of_command("verify", "models:/convoy@champion", evaluated, "nowhere")
    )
    pd.DataFrame({"probability_yak": [1.0]}).to_parquet(evaluated / "predictions.parquet")
    assert "have different classes" in str(end_of_command("verify", "models:/convoy@champion", evaluated, evaluated))
