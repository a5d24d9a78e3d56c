"""The deployment: a new version takes the old one's place, and a broken one does not."""

from pathlib import Path

import pytest

from convoy.core.errors import ConvoyError
from convoy.serving import deployment
from convoy.serving.deployment import Deployment
from convoy.serving.loading import CACHE_FOLDER
from serving_fixtures import FakeRegistry, make_registry, write_onnx


@pytest.fixture
def registry(tmp_path: Path, embedded_store: None) -> FakeRegistry:
    return make_registry(tmp_path)


def deploy(registry: FakeRegistry, uri: str = "models:/pets@champion") -> Deployment:
    return Deployment(uri, registry.project, threads=1, interval=60)


def version_of(deployed: Deployment) -> str | None:
    return deployed.current.version if deployed.current else None


def test_moved_alias_brings_the_new_version(registry: FakeRegistry) -> None:
    deployed = deploy(registry)
    deployed.start()
    old = deployed.current
    registry.add(2)
    registry.move_alias(2)
    deployed.refresh()
    assert version_of(deployed) == "2"
    assert old and old.version == "1"  # for requests that still use it
    deployed.refresh()
    assert deployed.switches == 1


@pytest.mark.parametrize("is_changed", [False, True])
def test_broken_version_leaves_the_old_one(registry: FakeRegistry, is_changed: bool) -> None:
    deployed = deploy(registry)
    deployed.start()
    file = registry.add(2, is_broken=True)
    if is_changed:
        file.write_bytes(file.read_bytes() + b"!")
    registry.move_alias(2)
    deployed.refresh()
    assert version_of(deployed) == "1"
    assert deployed.error.startswith("models:/pets/2: ")
    assert ("was changed since it was registered" in deployed.error) == is_changed
    registry.move_alias(1)
    deployed.refresh()
    assert deployed.error == ""


def test_broken_version_is_tried_again_after_a_while(registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    deployed = deploy(registry)
    deployed.start()
    file = registry.add(2)
    hidden = file.rename(file.with_suffix(".away"))
    registry.move_alias(2)
    deployed.refresh()
    assert "is missing or can't be fetched" in deployed.error
    hidden.rename(file)
    deployed.refresh()
    assert version_of(deployed) == "1"
    monkeypatch.setattr(deployment, "RETRY_S", 0)
    deployed.refresh()
    assert (version_of(deployed), deployed.error) == ("2", "")


def test_registry_that_is_down_changes_nothing(registry: FakeRegistry) -> None:
    deployed = deploy(registry)
    deployed.start()
    registry.file.write_bytes(b"this is no database")
    deployed.refresh()
    assert version_of(deployed) == "1"
    assert "mlflow.db can't be read" in deployed.error


def test_registry_down_at_start_is_replaced_by_the_cache(registry: FakeRegistry) -> None:
    deploy(registry).start()
    content = registry.file.read_bytes()
    registry.file.write_bytes(b"this is no database")
    deployed = deploy(registry)
    deployed.start()
    assert version_of(deployed) == "1"
    assert deployed.error.endswith("the cache has version 1")
    registry.file.write_bytes(content)
    deployed.refresh()
    assert deployed.error == ""


def test_server_without_cache_waits_for_the_registry(registry: FakeRegistry) -> None:
    content = registry.file.read_bytes()
    registry.file.write_bytes(b"this is no database")
    deployed = deploy(registry)
    deployed.start()
    assert deployed.current is None
    registry.file.write_bytes(content)
    deployed.refresh()
    assert version_of(deployed) == "1"


def test_damaged_cache_is_fetched_again(registry: FakeRegistry) -> None:
    deploy(registry).start()
    (cached,) = registry.project.glob(f"{CACHE_FOLDER}/*/*/model.onnx")
    content = cached.read_bytes()
    cached.write_bytes(content[::-1])
    deployed = deploy(registry)
    deployed.start()
    assert cached.read_bytes() == content


def test_cache_keeps_few_versions(registry: FakeRegistry) -> None:
    for version in range(2, 7):
        registry.add(version)
        registry.move_alias(version)
        deploy(registry).start()
    kept = sorted(folder.name.partition("-")[0] for folder in registry.project.glob(f"{CACHE_FOLDER}/pets/*"))
    assert kept == ["4", "5", "6"]


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("models:/pets/7", "MLflow has no models:/pets/7: there is version 1. Name a version: --model models:/pets/1"),
        ("models:/cats@champion", "MLflow has no models:/cats@champion: `convoy run` registers a model"),
        ("models:/pets", "models:/pets: no registered model; name one as models:/NAME@ALIAS or models:/NAME/VERSION"),
    ],
)
def test_missing_version_is_one_clear_line(uri: str, reason: str, registry: FakeRegistry) -> None:
    with pytest.raises(ConvoyError) as refusal:
        deploy(registry, uri).start()
    assert str(refusal.value) == reason


def test_held_first_version_is_explained(tmp_path: Path, embedded_store: None) -> None:
    registry = FakeRegistry(tmp_path)
    registry.add(1, verdict="HOLD: resnet reached 0.412, below register.gate.min_accuracy=0.8")
    with pytest.raises(ConvoyError) as refusal:
        deploy(registry).start()
    assert str(refusal.value) == (
        "MLflow has no models:/pets@champion: no version has passed the gate. Version 1: HOLD: resnet reached 0.412, "
        "below register.gate.min_accuracy=0.8. Name a version: --model models:/pets/1"
    )


def test_folder_with_another_checksum_is_refused(tmp_path: Path) -> None:
    write_onnx(tmp_path / "model.onnx")
    (tmp_path / "model.json").write_text('{"name": "pets", "version": "3", "sha256": "0"}')
    with pytest.raises(ConvoyError, match=r"differs from its checksum in model\.json"):
        Deployment(str(tmp_path), tmp_path, threads=1, interval=60).start()
