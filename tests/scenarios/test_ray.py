"""Training and search on a Ray cluster: two nodes of one CPU each, on this machine."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pandas as pd
import pytest

from ray_cluster import LENET, add_node, run_cluster, settings, start
from servers import BUCKET, run_s3
from small_project import make_project, make_repository, run_stages

pytest.importorskip("ray", reason="Ray is not installed: make install-cluster")
pytestmark = pytest.mark.slow
# So many that a node is gone before the training ends.
EPOCHS = "train.max_epochs=20"
RESULTS = ("history.csv", "weights.safetensors")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with run_cluster() as cluster:
        yield cluster


TWO = ["model=[lenet,alexnet]", *(f"model.{name}.recipe.batch_size=10" for name in ("lenet", "alexnet"))]
TWO += ["train.max_epochs=2", "register.gate.min_accuracy=0", "register.gate.min_test_images=1"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that was trained on this machine."""
    root = make_project(tmp_path_factory.mktemp("alone") / "project", [*LENET, "trainer=cpu", "trainer.threads=1"])
    run_stages(root, until="train")
    return root


def prepare(root: Path, *overrides: str) -> Path:
    make_project(root, overrides)
    run_stages(root, until="preprocess")
    return root


def train(root: Path) -> str:
    process = start(root, "pipeline.train", "lenet")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def train_and_lose_node(cluster: Any, root: Path, *, is_replaced: bool) -> tuple[int, str]:
    """The exit status and the output of a training on two nodes, one of which is killed meanwhile."""
    lines = []
    with start(root, "pipeline.train", "lenet") as process:
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            # The checkpoint of an epoch is stored soon after it.
            if "epoch 4/" in line:
                # Each of the two nodes holds a worker, and this one is not the head node.
                cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
                if is_replaced:
                    add_node(cluster)
                break
        lines += process.stdout
    return process.returncode, "".join(lines)


def hash_results(root: Path, name: str = "lenet") -> dict[str, str]:
    folder = root / "artifacts/train" / name
    return {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in RESULTS}


def read_record(root: Path) -> dict:
    return json.loads((root / "artifacts/train/lenet/record.json").read_text())


# The first test, as `auto` would find the cluster of the others.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trainer.address=127.0.0.1:9", "no Ray cluster answers there"),
        ("trainer.address=ray://127.0.0.1:10001", "give HOST:PORT of the head node"),
        ("trainer.address=auto", "there is no Ray cluster"),
    ],
)
def test_wrong_address_is_one_message(change: str, message: str, tmp_path: Path) -> None:
    root = prepare(tmp_path / "project", *LENET, "trainer=ray", change)
    process = start(root, "pipeline.train", "lenet", RAY_TMPDIR=str(tmp_path))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert message in said
    assert "Traceback" not in said


def test_one_worker_gives_the_bits_of_one_machine(cluster: Any, alone: Path, tmp_path: Path) -> None:
    root = prepare(tmp_path / "project", *settings(cluster, 1))
    train(root)
    assert hash_results(root) == hash_results(alone)
    found, expected = read_record(root), read_record(alone)
    for value in ("trainer", "environment", "best", "dataset_info", "settings"):
        assert found[value] == expected[value]
    # Nothing is left of the checkpoints.
    assert not list((root / "artifacts/.cache").rglob("*.ckpt"))


def test_jobs_side_by_side_give_the_bits_of_one_machine(cluster: Any, tmp_path: Path) -> None:
    alone = make_project(tmp_path / "alone", [*TWO, "trainer=cpu", "trainer.threads=1"])
    run_stages(alone, until="train")
    overrides = [*TWO, "trainer=ray", f"trainer.address={cluster.address}"]
    root = make_repository(tmp_path / "side by side", overrides)
    process = start(root, "pipeline.cli", "run", "--jobs", "2", *overrides)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    for name in ("lenet", "alexnet"):
        assert hash_results(root, name) == hash_results(alone, name)


def test_killed_node_is_replaced_and_training_resumes(cluster: Any, tmp_path: Path) -> None:
    undisturbed = prepare(tmp_path / "undisturbed", *settings(cluster, 2, EPOCHS))
    said = train(undisturbed)
    assert "resuming after" not in said
    record = read_record(undisturbed)
    assert (record["trainer"]["num_nodes"], record["environment"]["processes"]) == (2, 2)

    root = prepare(tmp_path / "killed", *settings(cluster, 2, EPOCHS))
    status, said = train_and_lose_node(cluster, root, is_replaced=True)
    assert status == 0, said
    resumed = re.search(r"resuming after (\d+) epochs and (\d+) steps", said)
    assert resumed, said
    assert int(resumed[1]) >= 1
    assert int(resumed[2]) > 0
    assert hash_results(root) == hash_results(undisturbed)


def test_node_that_is_lost_for_good_ends_with_a_message(cluster: Any, tmp_path: Path) -> None:
    root = prepare(tmp_path / "project", *settings(cluster, 2, "trainer.wait_minutes=0.1", EPOCHS))
    status, said = train_and_lose_node(cluster, root, is_replaced=False)
    assert status == 1, said
    assert "convoy: train: the cluster has room for 1 of 2 workers of CPU=1, and no node was added" in said
    assert "the checkpoint is kept in" in said
    assert "Traceback" not in said.partition("convoy: train:")[2]
    add_node(cluster)
    assert re.search(r"resuming after [1-9]\d* epochs", train(root))


def test_ended_training_resumes_from_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in BUCKET.items():
        monkeypatch.setenv(name, value)
    with run_s3(tmp_path) as address, run_cluster(1) as cluster:
        place = f"s3://convoy/checkpoints?endpoint_override={address.removeprefix('http://')}&scheme=http"
        root = prepare(tmp_path / "project", *settings(cluster, 1, EPOCHS, f"trainer.storage='{place}'"))
        with start(root, "pipeline.train", "lenet") as process:
            assert process.stdout
            for line in process.stdout:
                # Checkpoints reach the bucket behind the lines of their epochs.
                if "epoch 12/" in line:
                    process.kill()
        assert re.search(r"resuming after [1-9]\d* epochs", train(root))
        stored = boto3.client("s3", endpoint_url=address).list_objects(Bucket="convoy")["Contents"]
        assert [each["Key"] for each in stored] == ["checkpoints/"]


def test_cluster_that_is_too_small_is_one_message(cluster: Any, tmp_path: Path) -> None:
    root = prepare(tmp_path / "project", *settings(cluster, 3, "trainer.wait_minutes=0", "trainer.resources={CPU: 2}"))
    process = start(root, "pipeline.train", "lenet")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the cluster has room for 0 of 3 workers of CPU=2" in said
    assert "Traceback" not in said


def test_large_images_are_read_from_the_shared_disk(cluster: Any, alone: Path, tmp_path: Path) -> None:
    root = prepare(tmp_path / "project", *settings(cluster, 1, "trainer.max_upload_gb=0"))
    train(root)
    assert hash_results(root) == hash_results(alone)


def test_search_on_the_cluster_has_the_same_records(cluster: Any, tmp_path: Path) -> None:
    root = prepare(tmp_path / "project", *settings(cluster, 1, "model.lenet.recipe.lr=0.0001"))
    command = ["pipeline.cli", "tune", "lenet", *settings(cluster, 1, "model.lenet.recipe.lr=0.0001")]
    process = start(root, *command, "--ray", "--trials", "4", "--param", "recipe.lr=log:0.00005:0.05")
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said
    result = json.loads((root / "artifacts/tune/lenet/result.json").read_text())
    assert result["trials"] == 4
    table = pd.read_csv(root / "artifacts/tune/lenet/trials.csv")
    trials = table[table["run"].str.startswith("trial")]
    assert sorted(trials["run"]) == [f"trial {number}" for number in range(4)]
    assert trials.set_index("run").loc["trial 0", "recipe.lr"] == 0.0001
    assert sorted(table[~table["run"].str.startswith("trial")]["seed"]) == [2, 2, 3, 3, 4, 4]
    assert len(re.findall(r"^trial \d  recipe.lr", said, re.MULTILINE)) == 4
