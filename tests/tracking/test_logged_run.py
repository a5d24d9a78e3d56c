"""Logged runs: found by ID, first digits or architecture, and downloaded with verified files."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from convoy.core.errors import ConvoyError
from convoy.tracking import logged_run, run_record, runs
from convoy.tracking.store import TrackingStore
from record_factory import make_record
from tracking_fixtures import DIGITS, open_embedded_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingStore]:
    root = tmp_path_factory.mktemp("store")
    with open_embedded_store(root, "digits") as opened:
        for name in ("lenet", "resnet"):
            log_run(opened, root, name)
        yield opened


def log_run(store: TrackingStore, folder: Path, name: str) -> str:
    make_record(architecture=name).save(folder / "record.json")
    (folder / "history.csv").write_text("epoch,val_loss\n1,0.5\n")
    tags = {run_record.FINGERPRINT_TAG: f"of {name}"}
    files = [folder / "record.json", folder / "history.csv"]
    run = run_record.RunRecord(name, {}, tags, {"commit": "a27f84d"}, DIGITS, files=files, status="FINISHED")
    return runs.sync_run(store, run, "results", time_ms=2_000_000_000_000)


def test_run_is_found_by_architecture_and_digits(store: TrackingStore, tmp_path: Path) -> None:
    found = logged_run.find(store, "lenet")
    assert logged_run.find(store, found.info.run_id).info.run_id == found.info.run_id
    run = logged_run.download(store, logged_run.find(store, found.info.run_id[:12]), tmp_path)
    assert run.record.architecture == "lenet"
    assert run.commit == "a27f84d"
    assert run.weights is None
    assert run.stages == run.settings == {}


def test_newest_run_that_has_ended_is_taken(store: TrackingStore) -> None:
    before = logged_run.find(store, "lenet").info
    client, experiment = store.client, store.experiment.experiment_id
    running = client.create_run(experiment, before.start_time + 2000, run_name="lenet").info.run_id
    newer = client.create_run(experiment, before.start_time + 1000, run_name="lenet").info.run_id
    client.set_terminated(newer, "FINISHED")
    assert logged_run.find(store, "lenet").info.run_id == newer
    with pytest.raises(ConvoyError, match=f"run {running} has no result, its status is RUNNING: wait"):
        logged_run.find(store, running)
    with pytest.raises(ConvoyError, match=rf"run {newer} \(lenet\) has no record.json and history.csv"):
        logged_run.download(store, client.get_run(newer), store.scratch / "download")
    for run in (running, newer):
        client.delete_run(run)


def test_unknown_run_is_refused_with_those_there_are(store: TrackingStore) -> None:
    with pytest.raises(ConvoyError, match=r"MLflow has no run vgg: .* experiment digits has runs of lenet, resnet"):
        logged_run.find(store, "vgg")


def test_digits_of_several_runs_are_refused(store: TrackingStore) -> None:
    # One more than there are first digits.
    every = [store.client.create_run(store.experiment.experiment_id, run_name="more") for _ in range(17)]
    starts = [run.info.run_id[0] for run in every]
    several = next(start for start in starts if starts.count(start) > 1)
    with pytest.raises(ConvoyError, match=f"several runs begin with {several}, such as .*: give more digits"):
        logged_run.find(store, several)


def test_changed_file_of_a_run_is_refused(store: TrackingStore, tmp_path: Path) -> None:
    found = logged_run.find(store, "resnet")
    (tmp_path / "history.csv").write_text("epoch,val_loss\n1,0.4\n")
    store.client.log_artifact(found.info.run_id, str(tmp_path / "history.csv"))
    with pytest.raises(ConvoyError, match=r"history.csv of run \w+ is not what its training left"):
        logged_run.download(store, found, tmp_path / "download")
