"""Initial weights from MLflow: of the champion, of a version or of a run."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow.entities.model_registry import ModelVersion

import convoy
from convoy.core.errors import ConvoyError
from convoy.models.base import Classifier
from convoy.registry import model_loader, verification, versions
from convoy.tracking import run_record, runs
from convoy.tracking.run_record import RunRecord
from convoy.tracking.store import TrackingStore
from convoy.training import init_weights
from convoy.training.record import DatasetVersion
from registry_fixtures import write_trained_files as leave_registered
from tracking_fixtures import open_embedded_store
from weights_fixtures import build, load_settings, make_info, save_trained

VERSIONS = ["lenet", "resnet", "lenet"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingStore]:
    """A store with three versions of a model: a lenet, a resnet and another lenet."""
    root = tmp_path_factory.mktemp("store")
    with open_embedded_store(root, "convoy") as store:
        package = Path(convoy.__file__).parent
        for number, name in enumerate(VERSIONS, start=1):
            folder = root / str(number)
            save_trained(folder, name, load_settings(name), make_info(), seed=number)
            versions.register(
                store,
                name="convoy",
                run_id=log_run(store, name, folder),
                identity=str(number),
                model=package / "inference/pyfunc_model.py",
                files={"record": folder / "record.json", "weights": folder / "weights.safetensors"},
                code=package,
                step=1,
            )
        yield store


def log_run(
    store: TrackingStore, name: str, folder: Path, files: tuple[str, ...] = ("record.json", "weights.safetensors")
) -> str:
    data = DatasetVersion("digits", "a99769f9303d", "data.dvc", {"images": 1797}, split_seed=1)
    run = RunRecord(
        name=name,
        params={"model": name},
        tags={run_record.FINGERPRINT_TAG: str(folder)},
        provenance={},
        data=data,
        history=[{"epoch": 1, "val_accuracy": 0.5}],
        files=[folder / file for file in files],
        status="FINISHED",
    )
    return runs.sync_run(store, run, "results", time_ms=0)


def init_from_store(store: TrackingStore, name: str, values: dict) -> tuple[Classifier, dict[str, str]]:
    classifier = build(name, values, make_info(["a", "b"]))
    record = init_weights.init_weights(
        classifier,
        name,
        values,
        lambda init, folder: model_loader.fetch_weights(store, "convoy", name, init, folder),
    )
    return classifier, record


@pytest.mark.parametrize(
    ("name", "champion", "version"), [("lenet", None, 3), ("lenet", 1, 1), ("lenet", 2, 3), ("resnet", 1, 2)]
)
def test_champion_or_newest_version_is_used(
    store: TrackingStore, name: str, champion: int | None, version: int
) -> None:
    store.client.delete_registered_model_alias("convoy", "champion")
    if champion:
        store.client.set_registered_model_alias("convoy", "champion", str(champion))
    classifier, record = init_from_store(store, name, load_settings(name, "champion"))
    left = build(name, load_settings(name), make_info(), seed=version).state_dict()
    body = {key: value for key, value in classifier.state_dict().items() if not classifier.is_in_head(key)}
    assert all(torch.equal(left[key], value) for key, value in body.items())
    assert (record.init, record.head, record.verified) == ("champion", "new", True)
    assert record.source.startswith(f"version {version} of model convoy, of run ")


def test_unregistered_architecture_is_refused(store: TrackingStore) -> None:
    message = r"model\.alexnet\.init: .* no version of model convoy of architecture alexnet \(there are lenet, resnet\)"
    with pytest.raises(ConvoyError, match=message):
        init_from_store(store, "alexnet", load_settings("alexnet", "champion"))


def test_before_any_model_is_registered_there_is_no_champion(store: TrackingStore, tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match=r"\(there is none at all\): set init: scratch"):
        model_loader.fetch_weights(store, "another", "lenet", "champion", tmp_path)


def test_run_gives_its_weights(store: TrackingStore, tmp_path: Path) -> None:
    left = save_trained(tmp_path, "lenet", load_settings("lenet"), make_info(["a", "b"]), seed=9)
    run = log_run(store, "lenet", tmp_path)
    classifier, record = init_from_store(store, "lenet", load_settings("lenet", run))
    assert (record.source, record.head) == (f"run {run}", "kept")
    found = classifier.state_dict()
    assert all(torch.equal(found[key], value) for key, value in left.state_dict().items())


def test_run_of_another_architecture_is_refused(store: TrackingStore, tmp_path: Path) -> None:
    save_trained(tmp_path, "lenet", load_settings("lenet"), make_info())
    with pytest.raises(ConvoyError, match="holds weights of lenet, not of resnet"):
        init_from_store(store, "resnet", load_settings("resnet", log_run(store, "lenet", tmp_path)))


def test_run_that_is_not_there_or_holds_no_weights_is_refused(store: TrackingStore, tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match=rf"model\.lenet\.init: MLflow has no run {'0' * 32}"):
        init_from_store(store, "lenet", load_settings("lenet", "0" * 32))
    save_trained(tmp_path, "lenet", load_settings("lenet"), make_info())
    run = log_run(store, "lenet", tmp_path, ("record.json",))
    with pytest.raises(ConvoyError, match=rf"run {run} holds no weights\.safetensors"):
        init_from_store(store, "lenet", load_settings("lenet", run))


# No message names a temporary folder, which is gone when it is read


@pytest.mark.parametrize("file", ["record.json", "weights.safetensors", "calibration.json"])
@pytest.mark.parametrize(
    "use", [model_loader.load, lambda version: verification.verify(version, np.empty(0), np.empty(0))]
)
def test_broken_registered_model_is_named_by_its_uri(
    use: Callable[[ModelVersion], object], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch_broken(version: ModelVersion, folder: Path, files: object = ()) -> None:
        leave_registered(folder / "artifacts")
        (folder / "artifacts" / file).write_text("[]")

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(model_loader, "fetch", fetch_broken)
    with pytest.raises(ConvoyError) as refusal:
        use(ModelVersion("convoy", "3", 0))
    assert str(refusal.value).startswith(f"models:/convoy/3/artifacts/{file}")
    assert "scratch" not in str(refusal.value)


@pytest.mark.parametrize("file", ["record.json", "weights.safetensors"])
@pytest.mark.parametrize("architecture", ["lenet", "resnet"])
def test_broken_weights_of_a_run_are_named_by_the_run(
    file: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bring_broken(init: str, folder: Path) -> str:
        save_trained(folder, "lenet", load_settings("lenet"), make_info())
        if architecture == "lenet":
            (folder / file).write_text("[]")
        return f"run {init}"

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    values = load_settings(architecture, "0" * 32)
    with pytest.raises(ConvoyError) as refusal:
        init_weights.init_weights(build(architecture, values, make_info()), architecture, values, bring_broken)
    assert f"of run {'0' * 32}" in str(refusal.value)
    assert "scratch/" not in str(refusal.value)
