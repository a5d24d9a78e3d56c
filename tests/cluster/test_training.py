"""Training on a cluster: what is checked before, and the message after an error of Ray."""

import platform
from importlib.metadata import version

import pytest

from convoy.cluster.training import PACKAGES, check_versions, explain
from convoy.core.errors import ConvoyError

VERSIONS = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


@pytest.mark.parametrize("package", VERSIONS)
def test_other_version_on_the_cluster_is_named(package: str) -> None:
    check_versions(VERSIONS | {"threads": 4})
    with pytest.raises(
        ConvoyError, match=rf"cluster \({package} .* here, 0.1 there\): install the same requirements.lock"
    ):
        check_versions(VERSIONS | {package: "0.1"})


def test_node_without_a_package_is_explained() -> None:
    error = RuntimeError("a task failed")
    error.cause = ImportError("No module named 'timm'")  # type: ignore[attr-defined]
    message = str(explain(error))
    assert message.startswith("a node of the cluster lacks a package (")
    assert "timm" in message


def test_error_of_the_user_is_passed_on_as_it_is() -> None:
    error = RuntimeError("the controller failed")
    error.controller_failure = ConvoyError("the loss diverged")  # type: ignore[attr-defined]
    assert str(explain(error)) == "the loss diverged"
    assert explain(unknown := RuntimeError("of Ray itself")) is unknown
