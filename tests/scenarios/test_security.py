"""Security: modified model files are neither executed nor used for predictions."""

import ast
import contextlib
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image

from convoy.core.errors import ConvoyError
from convoy.core.hashing import sha256
from convoy.inference import predictor
from convoy.registry import model_loader, verification, versions
from convoy.serving.loading import CACHE_FOLDER
from convoy.tracking import run_record, runs
from convoy.tracking.store import open_store
from convoy.training import init_weights
from convoy.training.record import DatasetVersion
from model_settings import load_model_settings
from pipeline import predict
from registry_fixtures import find_model_folder, register_model, write_trained_files
from small_project import ROOT, SMALL, make_project, run_stages

SECRET = "correct-horse-battery-staple"


class Poison:
    """When it is unpickled, a file appears."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


@pytest.fixture
def fired(tmp_path: Path) -> Path:
    """The file that appears when hostile code is run."""
    return tmp_path / "fired"


# Files that a training may be said to have left


def make_pickle(fired: Path) -> bytes:
    return pickle.dumps({"c1.weight": Poison(fired)})


def make_torch_archive(fired: Path) -> bytes:
    """As torch.save writes a checkpoint, and torch.export a program (.pt2): a zip with pickles inside."""
    file = fired.with_suffix(".pt2")
    torch.save({"c1.weight": Poison(fired)}, file)
    return file.read_bytes()


@pytest.mark.parametrize("poison", [make_pickle, make_torch_archive])
def test_pickle_in_place_of_the_weights_is_refused_and_not_run(
    poison: Callable[[Path], bytes], fired: Path, tmp_path: Path
) -> None:
    weights = write_trained_files(tmp_path / "left")["weights"]
    weights.write_bytes(poison(fired))
    with pytest.raises(ConvoyError, match=r"weights\.safetensors: not the weights of this lenet"):
        predictor.restore(weights.parent)
    assert not fired.exists()
    with contextlib.suppress(RuntimeError):
        torch.load(weights.rename(tmp_path / "weights.pt"), weights_only=False)  # what the refusal is for
    assert fired.exists()


@pytest.mark.parametrize("suffix", [".pt2", ".ckpt", ".pkl", ".onnx", ""])
def test_training_refuses_a_file_that_may_hold_code(suffix: str, fired: Path, tmp_path: Path) -> None:
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(make_torch_archive(fired))
    with pytest.raises(ConvoyError, match=r"model\.lenet\.init=.*it may be scratch"):
        init_weights.check_init("lenet", {"init": str(file)})
    assert not fired.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_target_": "os.system", "dataset_info": {"_target_": "os.system"}}, "dataset_info"),
        ({"settings": {"_target_": "pathlib.Path.touch", "_args_": ["fired"]}}, "_target_: unknown key"),
        ({"settings": "!!python/object/apply:os.system [ls]"}, "settings: input should be an object"),
        ({"settings": {**load_model_settings("lenet"), "module": "os"}}, "no such architecture"),
        ({"settings": {**load_model_settings("lenet"), "module": "../../../evil"}}, "no such architecture"),
        ({"architecture": "../../../evil"}, "architecture: "),
        ({"architecture": ["lenet"]}, "architecture: input should be a valid string"),
        ({"dataset_info": None}, "dataset_info: input should be an object"),
    ],
)
def test_record_with_an_invalid_architecture_is_refused(
    change: dict, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("open('fired', 'w')")
    write_trained_files(tmp_path / "left", more=change)
    with pytest.raises(ConvoyError, match=said):
        predictor.restore(tmp_path / "left")
    assert not (tmp_path / "fired").exists()


@pytest.mark.parametrize(
    "calibration", ["", "[]", "{}", '{"temperature": 0}', '{"temperature": NaN}', '{"temperature": "1"}', "[" * 100_000]
)
def test_calibration_that_is_no_temperature_is_refused(calibration: str, tmp_path: Path) -> None:
    files = write_trained_files(tmp_path)
    files["calibration"].write_text(calibration)
    with pytest.raises(ConvoyError, match=r"calibration\.json"):
        predictor.restore(tmp_path)


# A registered model that was changed where its files lie


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project folder with a champion, made with secrets in its surroundings."""
    folder = tmp_path_factory.mktemp("registered")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
            patch.setenv(name, SECRET)
        register_model(folder)
        yield folder


@pytest.fixture
def stored(root: Path) -> Iterator[Path]:
    """The folder of the model's files, which is put right after the test."""
    folder, kept = find_model_folder(root), root / "kept"
    shutil.copytree(folder, kept)
    yield folder
    shutil.rmtree(folder)
    kept.rename(folder)


@contextlib.contextmanager
def open_version(root: Path) -> Iterator[versions.ModelVersion]:
    with open_store(root, "convoy") as store:
        yield model_loader.find(store, "models:/convoy@champion")


def fetch_all(root: Path, folder: Path) -> None:
    with open_version(root) as found:
        model_loader.fetch(found, folder)


def test_untouched_files_are_taken(root: Path, stored: Path, tmp_path: Path) -> None:
    fetch_all(root, tmp_path / "copy")
    with open_version(root) as found:
        assert model_loader.load(found).architecture == "lenet"
        hashes = json.loads(found.tags[versions.CHECKSUMS_TAG])
    for name, file in (("record", "record.json"), ("weights", "weights.safetensors")):
        assert hashes[f"artifacts/{file}"] == sha256(root / "left" / file), name  # as training left it
    assert sorted(hashes) == sorted(str(f.relative_to(stored)) for f in stored.rglob("*") if f.is_file())


@pytest.mark.parametrize("file", ["weights.safetensors", "record.json", "calibration.json"])
@pytest.mark.parametrize("change", ["one bit", "poison", "gone", "another"])
def test_only_the_registered_files_are_loaded(
    file: str, change: str, root: Path, stored: Path, fired: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = stored / "artifacts" / file
    content = bytearray(target.read_bytes())
    match change:
        case "one bit":
            content[-5] ^= 1
            target.write_bytes(content)
        case "poison":
            target.write_bytes(make_pickle(fired))
        case "another":
            target.write_bytes(content + b" ")
        case "gone":
            target.unlink()
    with open_version(root) as found, pytest.raises(ConvoyError, match=f"{file}.*nothing of the model was used"):
        model_loader.load(found)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    # Files that were verified before are not fetched again.
    shutil.rmtree(root / CACHE_FOLDER, ignore_errors=True)
    with pytest.raises(ConvoyError, match=rf"models:/convoy/1.*{file}"):
        predict.open_model(root, None)
    assert not fired.exists()


def add_code(stored: Path, fired: Path) -> None:
    file = stored / "pyfunc_model.py"
    file.write_text(f"open({str(fired)!r}, 'w').close()\n{file.read_text()}")


def add_loader_module(stored: Path, fired: Path) -> None:
    """A line in MLmodel names the module that loads the model, and code beside it is importable."""
    (stored / "code" / "evil.py").write_text(f"open({str(fired)!r}, 'w').close()\ndef _load_pyfunc(path): ...\n")
    lines = (stored / "MLmodel").read_text().splitlines()
    changed = ["    loader_module: evil" if "loader_module:" in line else line for line in lines]
    (stored / "MLmodel").write_text("\n".join(line for line in changed if "sha256" not in line))


def add_pickled_model(stored: Path, fired: Path) -> None:
    """MLmodel names a pickle in place of the model's source."""
    (stored / "python_model.pkl").write_bytes(make_pickle(fired))
    lines = (stored / "MLmodel").read_text().splitlines()
    changed = ["    python_model: python_model.pkl" if "model_code_path:" in line else line for line in lines]
    changed = ["    loader_module: mlflow.pyfunc.model" if "loader_module:" in line else line for line in changed]
    (stored / "MLmodel").write_text("\n".join(changed))


@pytest.mark.parametrize("attack", [add_code, add_loader_module, add_pickled_model])
def test_code_that_was_put_into_a_model_is_refused_and_never_run(
    attack: Callable[[Path, Path], None], root: Path, stored: Path, fired: Path, tmp_path: Path
) -> None:
    attack(stored, fired)
    with open_version(root) as found:
        model_loader.load(found)  # takes none of it: it has its own code
        with pytest.raises(ConvoyError, match="was changed since it was registered; nothing of the model was used"):
            verification.verify(found, np.zeros((1, 32, 32, 1), np.uint8), np.full((1, 3), 1 / 3))
    assert not fired.exists()
    before, path = set(sys.modules), list(sys.path)
    with contextlib.suppress(Exception):
        mlflow.pyfunc.load_model(str(stored))  # what the refusal is for
    assert fired.exists()
    sys.path[:] = path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_additional_file_is_not_even_downloaded(root: Path, stored: Path, fired: Path, tmp_path: Path) -> None:
    cache = stored / "code" / "convoy" / "__pycache__" / f"task.{sys.implementation.cache_tag}.pyc"
    cache.parent.mkdir(exist_ok=True)
    for file in (cache, stored / "artifacts" / "model.pt2", stored / "code" / "torch.py"):
        file.write_bytes(make_pickle(fired))
    fetch_all(root, tmp_path / "copy")
    names = {file.name for file in (tmp_path / "copy").rglob("*")}
    assert not names & {cache.name, "__pycache__", "model.pt2", "torch.py"}


@pytest.mark.parametrize("tag", [None, "", "{}", "[]", "no json"])
def test_version_without_hashes_is_refused(tag: str | None, root: Path) -> None:
    with open_version(root) as found:
        found._tags = {} if tag is None else {versions.CHECKSUMS_TAG: tag}
        with pytest.raises(ConvoyError, match=f"has no hashes of these files in its tag {versions.CHECKSUMS_TAG}"):
            model_loader.load(found)


def test_weights_changed_during_upload_are_not_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    download = mlflow.artifacts.download_artifacts

    def garbled(*arguments: str, **options: str) -> str:
        folder = Path(download(*arguments, **options))
        file = folder / "artifacts" / "weights.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
        return str(folder)

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", garbled)
    with pytest.raises(ConvoyError, match=r"weights\.safetensors of the model was changed since it was registered"):
        register_model(tmp_path)
    monkeypatch.undo()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with open_store(tmp_path, "convoy") as store:
        assert store.client.search_model_versions("name = 'convoy'") == []


# What a training starts from


@pytest.fixture
def run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """The id of a run with the files of a training, and the folder where these lie."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    data = DatasetVersion("pets", "0123", "data.dvc", {"images": 3}, split_seed=1)
    files = [root / "left" / name for name in ("record.json", "weights.safetensors")]
    tags = {run_record.FINGERPRINT_TAG: str(tmp_path)}
    ended = run_record.RunRecord("lenet", {}, tags, {}, data, files=files, status="FINISHED")
    with open_store(root, "convoy") as store:
        made = runs.sync_run(store, ended, "results", time_ms=0)
    yield made, root / "mlartifacts/convoy" / made / "artifacts"


def start_from(root: Path, init: str, folder: Path) -> str:
    folder.mkdir()
    with open_store(root, "convoy") as store:
        return model_loader.fetch_weights(store, "convoy", "lenet", init, folder)


def tamper(file: Path, change: str, fired: Path) -> None:
    content = bytearray(file.read_bytes())
    if change == "one bit":
        content[-5] ^= 1
    file.write_bytes(content if change == "one bit" else b"[" * 100_000 if change == "deep" else make_pickle(fired))


CHANGES = [("weights.safetensors", "one bit"), ("weights.safetensors", "poison"), ("record.json", "deep")]


@pytest.mark.parametrize(("file", "change"), CHANGES)
def test_training_refuses_a_champion_with_modified_files(
    file: str, change: str, root: Path, stored: Path, fired: Path, tmp_path: Path
) -> None:
    tamper(stored / "artifacts" / file, change, fired)
    said = rf"model\.lenet\.init: models:/convoy/1: \S*{file} of the model was changed since it was registered"
    with pytest.raises(ConvoyError, match=said):
        start_from(root, "champion", tmp_path / "start")
    assert list((tmp_path / "start").iterdir()) == []
    assert not fired.exists()


@pytest.mark.parametrize(("file", "change"), CHANGES)
def test_training_refuses_a_run_with_modified_files(
    file: str, change: str, root: Path, run: tuple[str, Path], fired: Path, tmp_path: Path
) -> None:
    made, folder = run
    tamper(folder / file, change, fired)
    with pytest.raises(ConvoyError, match=rf"model\.lenet\.init: {file} of run {made} is not what its training left"):
        start_from(root, made, tmp_path / "start")
    assert list((tmp_path / "start").iterdir()) == []
    assert not fired.exists()


@pytest.mark.parametrize("init", ["champion", "run"])
def test_training_accepts_unmodified_files(
    init: str, root: Path, stored: Path, run: tuple[str, Path], tmp_path: Path
) -> None:
    start_from(root, run[0] if init == "run" else init, tmp_path / "start")
    for file in ("record.json", "weights.safetensors"):
        assert (tmp_path / "start" / file).read_bytes() == (root / "left" / file).read_bytes()


@pytest.mark.parametrize("tag", [None, "", "{}", "[]", "no json", '{"history.csv": "0123"}'])
def test_training_refuses_a_run_without_hashes(
    tag: str | None, root: Path, run: tuple[str, Path], tmp_path: Path
) -> None:
    with open_store(root, "convoy") as store:
        store.client.delete_tag(run[0], runs.CHECKSUMS_TAG)
        if tag is not None:
            store.client.set_tag(run[0], runs.CHECKSUMS_TAG, tag)
    with pytest.raises(ConvoyError, match=rf"run {run[0]} has no hashes of its files in its tag {runs.CHECKSUMS_TAG}"):
        start_from(root, run[0], tmp_path / "start")


# The model as MLflow itself loads it


def test_served_model_refuses_other_weights(stored: Path) -> None:
    weights = stored / "artifacts" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ConvoyError, match=r"weights\.safetensors of the model was changed since it was registered"):
        mlflow.pyfunc.load_model(str(stored))


# Secrets


def test_no_secret_of_the_environment_is_registered(root: Path) -> None:
    files = [file for file in root.rglob("*") if file.is_file()]
    assert any(file.name == "mlflow.db" for file in files)
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []


# The law

RUNS_CODE = {
    "pickle", "cloudpickle", "dill", "shelve", "marshal", "runpy", "read_pickle", "instantiate",
    "load_state_dict_from_url", "unsafe_load", "full_load", "pyfunc.load_model", "pytorch.load_model",
}  # fmt: skip
SOURCES = sorted(file for folder in ("src", "pipeline") for file in (ROOT / folder).rglob("*.py"))


def find_calls(file: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """The dotted name of everything that is called or imported, and the keywords of the call."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            keywords = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
            yield ast.unparse(node.func), keywords
        elif isinstance(node, ast.Import):
            yield from ((alias.name, {}) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", {}) for alias in node.names)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_loader_that_executes_code_is_called(file: Path) -> None:
    # It runs the stages of this project, as `python -m` does; its socket is in a folder of this user alone.
    allowed = {"runpy"} if file.name == "fork_server.py" else set()
    for name, keywords in find_calls(file):
        assert not [word for word in RUNS_CODE - allowed if f".{word}." in f".{name}."], name
        assert name not in ("eval", "exec")  # a network has an eval() that is another
        if name in ("torch.load", "torch.jit.load", "torch.export.load"):
            assert name == "torch.load"
            assert keywords["weights_only"] is True
        if name.endswith("get_state_dict") and "published" in name:
            assert keywords["weights_only"] is keywords["check_hash"] is True
        if name in ("np.load", "numpy.load"):
            assert not keywords.get("allow_pickle")
        if name == "yaml.load":
            assert file.name == "yaml_parser.py", "yaml.safe_load is the one that builds plain values only"
        if name.endswith(("subprocess.run", "Popen")):
            assert not keywords.get("shell")


@pytest.mark.parametrize("until", ["preprocess", pytest.param("register", marks=pytest.mark.slow)])
def test_place_where_a_photograph_was_taken_stays_in_its_file(until: str, tmp_path: Path) -> None:
    root = make_project(tmp_path / "project", [*SMALL, "model=[lenet]", "train.max_epochs=1"])
    exif = Image.Exif()
    exif[0x010E] = "the home of Ada"  # ImageDescription
    exif.get_ifd(0x8825)[29] = "2026:11:30"  # GPSDateStamp
    for file in root.glob("data/*/*.png"):
        with Image.open(file) as image:
            image.save(file.with_suffix(".jpg"), exif=exif, quality=95)
        file.unlink()
    secrets = [b"the home of Ada", b"2026:11:30"]
    (photograph, *_) = root.glob("data/*/*.jpg")
    assert all(secret in photograph.read_bytes() for secret in secrets)

    run_stages(root, until=until, with_report=True)
    written = [file for file in root.rglob("*") if file.is_file() and "data" not in file.relative_to(root).parts[:1]]
    assert len(written) > 20
    assert [file for file in written for secret in secrets if secret in file.read_bytes()] == []
