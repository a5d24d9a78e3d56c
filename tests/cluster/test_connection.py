"""The connection to a cluster: each mistake is one message, and nodes that are missing are waited for."""

import dataclasses
import sys
import types
from typing import Any

import pytest

from convoy.cluster import connection
from convoy.cluster.config import ClusterConfig
from convoy.cluster.connection import Patience, check_address, connect, count_places, reserve
from convoy.core.config import validate
from convoy.core.errors import ConvoyError
from convoy.core.yaml_parser import parse_yaml
from small_project import ROOT

CONFIG = validate(ClusterConfig, parse_yaml((ROOT / "conf/trainer/ray.yaml").read_text()), "trainer")


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A module in Ray's place, with one node of two CPUs and a dead one."""
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 8.0}}]
    fake = types.SimpleNamespace(nodes=lambda: nodes, init=lambda *_, **__: None, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", fake)  # type: ignore[arg-type]
    return fake


def test_missing_ray_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # type: ignore[arg-type]
    with pytest.raises(ConvoyError, match="make install-cluster"), connect(CONFIG):
        pass


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:port", ":6379", "http://head:6379"])
def test_address_that_is_no_head_node_is_refused(address: str) -> None:
    with pytest.raises(ConvoyError, match=f"trainer.address={address}: give HOST:PORT of the head node"):
        check_address(address)


def test_address_where_nothing_answers_is_refused() -> None:
    with pytest.raises(ConvoyError, match=r"trainer\.address=127\.0\.0\.1:9: no Ray cluster answers there"):
        check_address("127.0.0.1:9")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Could not find any running Ray instance"), "there is no Ray cluster"),
        (RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9.0"), "with: Ray: 2.9.0"),
    ],
)
def test_error_of_ray_is_one_message(error: Exception, message: str, fake_ray: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    fake_ray.init = fail
    with pytest.raises(ConvoyError, match=message), connect(CONFIG):
        pass


def test_only_living_nodes_with_all_resources_count(fake_ray: Any) -> None:
    assert count_places({"CPU": 1}) == 2
    assert count_places({"CPU": 0.1}) == 20
    assert count_places({"CPU": 1, "GPU": 1}) == 0


def test_too_small_cluster_is_reported_once_and_then_fatal(
    fake_ray: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(connection.time, "monotonic", lambda: now[0])
    patience = Patience(dataclasses.replace(CONFIG, workers=3, wait_minutes=1.0))
    patience.check()
    now[0] = 30.0
    patience.check()
    assert capsys.readouterr().out == (
        "the cluster has room for 2 of 3 workers of CPU=1: waiting 1 minutes for more nodes\n"
    )
    now[0] = 61.0
    with pytest.raises(ConvoyError, match="2 of 3 workers of CPU=1, and no node was added in 1 minutes"):
        patience.check()
    fake_ray.nodes()[0]["Resources"]["CPU"] = 3.0
    patience.check()
    assert patience.too_small_since is None


def test_resources_are_those_of_a_ray_task() -> None:
    request = dataclasses.replace(CONFIG, use_gpu=True, resources={"CPU": 4, "memory": 1e9, "a100": 1}).request
    assert reserve(request) == {"num_cpus": 4, "num_gpus": 1, "memory": 1e9, "resources": {"a100": 1}}
