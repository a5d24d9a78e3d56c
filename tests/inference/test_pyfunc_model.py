"""The registered model: it accepts images in every documented form."""

import ast
import base64
import dataclasses
import io
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from PIL import Image
from sklearn.datasets import load_sample_images

from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.data.cache import CacheDir
from convoy.data.ingest import FetchConfig, ingest
from convoy.data.packed.packed_dataset import SPLITS
from convoy.data.preprocessing import PreprocessConfig, prepare
from convoy.data.sources.base import DatasetConfig, Sample, Source
from convoy.inference import predictor
from convoy.inference.predictor import Predictor
from convoy.inference.pyfunc_model import ImageClassifier
from convoy.registry import model_loader as served
from convoy.registry import verification, versions
from convoy.tracking.store import open_store
from factories import EMPTY_LOCK
from registry_fixtures import CLASSES, find_model_folder, register_model, write_trained_files
from small_project import ROOT

Files = dict[str, Path]


def load(files: Files) -> ImageClassifier:
    """As MLflow loads it."""
    hashes = next(iter(files.values())).parent / "hashes.json"
    hashes.write_text(json.dumps({file.name: sha256(file) for file in files.values()}))
    model = ImageClassifier()
    artifacts = {name: str(file) for name, file in {**files, "hashes": hashes}.items()}
    model.load_context(SimpleNamespace(artifacts=artifacts))
    return model


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "rgb"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageClassifier:
    """An untrained LeNet behind the model that MLflow loads."""
    return load(write_trained_files(tmp_path_factory.mktemp("served"), request.param))


def make_image(height: int = 40, width: int = 60, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def make_png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def predict(model: ImageClassifier, model_input: object) -> np.ndarray:
    return to_array(model.predict(None, model_input))


def to_array(answer: pd.DataFrame) -> np.ndarray:
    return np.array([list(row.values()) for row in answer["probabilities"]])


def test_prediction_is_the_likeliest_class_and_its_probability(model: ImageClassifier) -> None:
    answer = model.predict(None, [make_image(), make_image(32, 32)])
    assert list(answer.columns) == ["label", "probability", "probabilities"]
    for row in answer.itertuples():
        assert list(row.probabilities) == CLASSES
        assert sum(row.probabilities.values()) == pytest.approx(1)
        assert row.probability == max(row.probabilities.values()) == row.probabilities[row.label]


def test_same_image_gets_the_same_prediction_in_every_form(model: ImageClassifier) -> None:
    rgb = make_image()
    expected = predict(model, [rgb])
    text = base64.b64encode(make_png(rgb)).decode()
    lines = base64.encodebytes(make_png(rgb)).decode()
    forms = [
        rgb,
        rgb[None],
        [make_png(rgb)],
        make_png(rgb),
        text,
        [text],
        lines,
        pd.DataFrame({"image": [make_png(rgb)]}),
    ]
    forms += [pd.DataFrame({"image": [text]}), rgb.astype(np.int64), [rgb.tolist()]]
    for form in forms:
        np.testing.assert_array_equal(predict(model, form), expected)


def test_grey_images_come_with_or_without_a_channel_axis(model: ImageClassifier) -> None:
    grey = make_image(channels=1)
    expected = predict(model, [grey])
    for form in (grey[:, :, 0], grey, grey[None], grey[None, :, :, 0], np.repeat(grey, 3, axis=2)):
        np.testing.assert_allclose(predict(model, form), expected, atol=1e-6)


def test_pil_images_are_accepted_alone_and_in_lists(model: ImageClassifier) -> None:
    rgb, grey = Image.fromarray(make_image()), Image.fromarray(make_image(channels=1)[:, :, 0])
    expected = predict(model, [np.asarray(rgb), np.asarray(grey)])
    np.testing.assert_array_equal(predict(model, [rgb, grey]), expected)
    np.testing.assert_allclose(predict(model, rgb), expected[:1], atol=1e-5)
    for image in (grey.convert("1"), rgb.convert("CMYK"), rgb.convert("P")):
        assert predict(model, image).shape == (1, len(CLASSES))


def test_exif_orientation_of_a_pil_image_is_applied(model: ImageClassifier) -> None:
    image = Image.fromarray(make_image())
    expected = predict(model, image)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 8
    image.transpose(Image.Transpose.ROTATE_270).save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(predict(model, Image.open(file)), expected)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("library", [np.asarray, torch.tensor])
def test_channels_first_images_are_refused(library, channels: int, model: ImageClassifier) -> None:  # noqa: ANN001
    first = library(make_image(channels=channels).transpose(2, 0, 1).copy())
    with pytest.raises(MlflowException, match=rf"channels come last, \(H, W, {channels}\)") as raised:
        model.predict(None, first)
    assert raised.value.get_http_status_code() == 400
    with pytest.raises(MlflowException, match="channels last"):
        model.predict(None, [first])
    with pytest.raises(MlflowException, match="channels last"):
        model.predict(None, first[None])


def test_tensor_gets_the_same_prediction_as_its_array(model: ImageClassifier) -> None:
    for pixels in (make_image(), make_image(channels=1)[:, :, 0], np.stack([make_image(), make_image(seed=1)])):
        np.testing.assert_array_equal(predict(model, torch.tensor(pixels)), predict(model, pixels))


def test_transparent_pixels_count_as_white(model: ImageClassifier) -> None:
    hidden = make_image(channels=4)
    hidden[:, :, 3] = 0
    white = np.full((40, 60, 3), 255, np.uint8)
    np.testing.assert_array_equal(predict(model, hidden), predict(model, white))


def test_images_of_different_sizes_are_predicted_together(model: ImageClassifier) -> None:
    together = predict(model, [make_image(20, 30), make_image(32, 32), make_image(500, 100, 1)])
    alone = np.concatenate(
        [predict(model, [p]) for p in (make_image(20, 30), make_image(32, 32), make_image(500, 100, 1))]
    )
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_empty_input_gets_an_empty_result(model: ImageClassifier) -> None:
    assert len(model.predict(None, [])) == 0


@pytest.mark.parametrize(
    ("model_input", "said"),
    [
        (make_image() / 255, "whole numbers from 0 to 255"),
        ([make_image().astype(np.int32) + 200], "whole numbers from 0 to 255"),
        ([np.zeros((4, 5, 6, 7), np.uint8)], "it must be"),
        ([np.zeros((0, 5), np.uint8)], "has no pixels"),
        ([b"no image at all"], "is not an image"),
        ("no base64!", "not the base64 of an image file"),
        ("nö base64", "not the base64 of an image file"),
        ([None], "whole numbers"),
    ],
)
def test_input_that_is_no_image_gets_a_clear_message(model: ImageClassifier, model_input: object, said: str) -> None:
    with pytest.raises(MlflowException, match=said) as raised:
        model.predict(None, model_input)
    assert raised.value.get_http_status_code() == 400


# Calibration


def test_temperature_softens_probabilities_and_keeps_the_label(tmp_path: Path) -> None:
    files = write_trained_files(tmp_path)
    images = [make_image(seed=seed) for seed in range(20)]
    answers = {}
    for temperature in (1, 2.5):
        files["calibration"].write_text(json.dumps({"temperature": temperature}))
        answers[temperature] = load(files).predict(None, images)
    assert list(answers[1]["label"]) == list(answers[2.5]["label"])
    plain, softened = map(to_array, answers.values())
    expected = plain ** (1 / 2.5)
    np.testing.assert_allclose(softened, expected / expected.sum(axis=1, keepdims=True), atol=1e-12)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_serving_preprocesses_photographs_as_training_does(form: str, model: ImageClassifier, tmp_path: Path) -> None:
    photograph = Image.fromarray(load_sample_images().images[0])
    files = {}
    for number, (split, label) in enumerate(itertools.product(SPLITS, ("cat", "dog"))):
        file = io.BytesIO()
        photograph.crop((20 * number, 10 * number, 20 * number + 400, 10 * number + 300)).save(file, form)
        files[f"{split}/{label}"] = file.getvalue()
    members = [Sample(path, path.split("/")[1], path.split("/")[0], "", data) for path, data in files.items()]
    for folder in ("packed", "prepared"):
        (tmp_path / folder).mkdir()
    source, nothing = (
        Source(["cat", "dog"], len(members), iter(members)),
        CacheDir(tmp_path / "remembered/here", tmp_path / "nowhere"),
    )
    dataset = DatasetConfig(name="pets", longest_side=90, group=None)
    packed = ingest(
        source, dataset, FetchConfig(max_invalid_fraction=0), EMPTY_LOCK, tmp_path / "packed", nothing
    ).packed
    channels = model.predictor.info.channels
    params = PreprocessConfig(
        size=32, channels=channels, test_fraction=0.5, val_fraction=0.5, near_duplicate_threshold=1
    )
    info = prepare(packed, params, 1, tmp_path / "prepared", nothing).info

    served = dataclasses.replace(model.predictor, info=info)
    paths = pd.read_parquet(tmp_path / "prepared/images.parquet")["path"]
    seen = np.concatenate([np.load(tmp_path / f"prepared/{split}_pixels.npy") for split in SPLITS])
    assert len(seen) == 6
    for path, pixels in zip(paths, seen, strict=True):
        np.testing.assert_array_equal(served.preprocess(files[path]), pixels)


# In MLflow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project folder with a registered model, whose store MLflow uses."""
    folder = tmp_path_factory.mktemp("registered")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        register_model(folder)
        yield folder


@pytest.fixture(scope="module")
def restored(root: Path) -> Predictor:
    """The registered model, straight from its files."""
    return predictor.restore(root / "left")


def test_version_has_a_signature_and_an_input_example(root: Path) -> None:
    loaded = mlflow.pyfunc.load_model("models:/convoy@champion")
    signature = loaded.metadata.signature
    assert [column.type.name for column in signature.inputs] == ["string"]
    assert signature.outputs.input_names() == ["label", "probability", "probabilities"]
    answer = loaded.predict(loaded.input_example)
    assert answer["label"][0] in CLASSES


def test_signature_bars_no_form_of_images(root: Path, restored: Predictor) -> None:
    loaded, grey = mlflow.pyfunc.load_model("models:/convoy/1"), make_image(32, 32, channels=1)
    expected = restored.probabilities(grey[None])
    text = base64.b64encode(make_png(grey[:, :, 0])).decode()
    for form in (grey, grey[None], [grey], text, [text], [make_png(grey[:, :, 0])], pd.DataFrame({"image": [text]})):
        answered = to_array(loaded.predict(form))
        np.testing.assert_allclose(answered, expected, atol=1e-6)


def test_model_holds_only_safetensors_json_and_source(root: Path) -> None:
    folder = find_model_folder(root)
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix != ".pyc" and file.is_file()}
    assert {Path(file).suffix for file in files} == {"", ".json", ".py", ".safetensors", ".txt", ".yaml"}
    assert not any("pickle" in line for line in (folder / "MLmodel").read_text().splitlines() if "version" not in line)
    assert "code/convoy/training/module.py" not in files


def test_model_contains_only_the_code_that_it_needs() -> None:
    code = (
        "import sys, convoy.inference.pyfunc_model; print(*(name for name in sys.modules if name.startswith('convoy')))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    found = done.stdout.split()
    # MLflow keeps this one beside the rest
    found.remove("convoy.inference.pyfunc_model")
    brought = {re.sub(r"(/?__init__)?(\.py)?$", "", f"convoy/{part}").replace("/", ".") for part in versions.SERVED_BY}
    assert {name for name in found if not name.startswith("convoy.models.")} == brought


def test_pinned_requirements_are_what_the_model_imports(root: Path) -> None:
    folder, owners = find_model_folder(root), packages_distributions()
    imported = set()
    for file in [folder / "pyfunc_model.py", *(folder / "code").rglob("*.py")]:
        for node in ast.parse(file.read_text()).body:  # what a function imports, no answer needs
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"convoy"}
    packages = [{owner.lower() for owner in owners[name]} & set(versions.SERVED_WITH) for name in foreign]
    assert all(packages)
    assert set().union(*packages) == set(versions.SERVED_WITH)
    pinned = (folder / "requirements.txt").read_text().split()
    assert pinned == [f"{package}=={version(package)}" for package in versions.SERVED_WITH]


def test_version_with_other_than_recorded_predictions_is_refused(root: Path, restored: Predictor) -> None:
    pixels = make_image(32, 32, 1)[None]
    with open_store(root, "convoy") as store:
        version = served.find(store, "models:/convoy/1")
    recorded = restored.probabilities(pixels) + 2e-4
    with pytest.raises(
        ConvoyError, match=r"does not answer as it was evaluated: probabilities differ by up to 0\.0002"
    ):
        verification.verify(version, pixels, recorded)
    with pytest.raises(ConvoyError, match="does not answer as it was evaluated"):
        verification.verify(version, pixels, recorded[:, :2])
    with pytest.raises(ConvoyError, match="does not answer as it was evaluated"):
        verification.verify(version, pixels, recorded * np.nan)


@pytest.mark.parametrize("uri", ["models:/convoy/7", "models:/convoy@best", "models:/other@champion"])
def test_version_that_is_not_there_is_named(root: Path, uri: str) -> None:
    with open_store(root, "convoy") as store, pytest.raises(ConvoyError, match=f"MLflow has no {uri}"):
        served.find(store, uri)


@pytest.mark.parametrize(
    "uri", ["convoy", "runs:/1/model", "models:/m-123", "/tmp/model", "models:/convoy/1/artifacts"]
)
def test_uri_of_no_registered_model_is_refused(root: Path, uri: str) -> None:
    with open_store(root, "convoy") as store, pytest.raises(ConvoyError, match="no registered model"):
        served.find(store, uri)


@pytest.mark.slow
def test_mlflow_serves_the_champion_over_http(root: Path, restored: Predictor) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/convoy@champion"]
    with (root / "serve.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--env-manager", "local", "--port", port],
            cwd=root,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        grey = make_image(32, 32, channels=1)
        status, answer = post(port, {"inputs": [base64.b64encode(make_png(grey[:, :, 0])).decode()]})
        (row,) = answer["predictions"]
        assert status == 200
        expected = dict(zip(CLASSES, restored.probabilities(grey[None])[0].tolist(), strict=True))
        assert row["probabilities"] == pytest.approx(expected, abs=1e-6)
        assert row["label"] == max(expected, key=expected.__getitem__)

        good = f"data:image/png;base64,{base64.b64encode(make_png(grey[:, :, 0])).decode()}"
        status, answer = post(port, {"inputs": [good, base64.b64encode(b"no image" * 1000).decode()]})
        assert status == 400
        # Without the request, which MLflow repeats in its own errors.
        assert answer["message"].startswith("the image at position 1 is not an image in BMP")
        assert len(json.dumps(answer)) < 300
        assert "Traceback" not in json.dumps(answer)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def post(port: str, body: object) -> tuple[int, dict]:
    """The status and the JSON of an answer, once the server is there."""
    request = Request(f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    for _ in range(240):
        try:
            with urlopen(request) as reply:
                return reply.status, json.load(reply)
        except HTTPError as error:
            return error.code, json.load(error)
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server does not come up")


def test_unreachable_registry_is_not_a_missing_version(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: object) -> None:
        raise MlflowException("the server is down", error_code=TEMPORARILY_UNAVAILABLE)

    with open_store(root, "convoy") as store:
        monkeypatch.setattr(store.client, "get_model_version_by_alias", down)
        with pytest.raises(MlflowException, match="the server is down"):
            served.find(store, "models:/convoy@champion")
