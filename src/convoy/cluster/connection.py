"""The connection to a Ray cluster, and what is wrong if there is none."""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import convoy
from convoy.cluster.config import ClusterConfig
from convoy.core.errors import ConvoyError, describe_error

# Ray tries an address for more than five minutes, and then ends the process.
CONNECT_TIMEOUT_S = 5
MISSING = "trainer=ray needs Ray: install it by `make install-cluster`, or choose another trainer"


@contextlib.contextmanager
def connect(config: ClusterConfig) -> Iterator[None]:
    """Connect to the cluster, whose workers import this version of the library, and disconnect at the end.

    Raises:
        ConvoyError: If Ray is not installed, the address is wrong, or the cluster has other versions.
    """
    # Ray would report the use of its parts to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ConvoyError(MISSING) from error
    address = os.environ.get("RAY_ADDRESS", config.address) if config.address == "auto" else config.address
    check_address(address)
    source = str(Path(convoy.__file__).parent)
    try:
        # What workers print for people comes by a queue, without what Ray prints for its developers.
        ray.init(address, runtime_env={"py_modules": [source]}, logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError as error:
        raise ConvoyError(
            f"trainer.address={address}: there is no Ray cluster ({describe_error(error, 200)}): start one by "
            "`ray start --head`, and join this machine to one by `ray start --address=HOST:PORT`"
        ) from error
    # Ray raises this if its version or Python's differ, and for other reasons.
    except RuntimeError as error:
        raise ConvoyError(f"trainer.address={address}: {describe_error(error, 500)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Check that something answers at the address of a head node.

    Raises:
        ConvoyError: If nothing does, or it is the address of a Ray client.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise ConvoyError(
            f"trainer.address={address}: give HOST:PORT of the head node, auto or local. A machine outside the cluster "
            "joins it by `ray start --address=HOST:PORT --num-cpus=0`"
        )
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConvoyError(
            f"trainer.address={address}: no Ray cluster answers there ({describe_error(error)}): `ray status` on the "
            "head node shows its address"
        ) from error


def count_places(request: Mapping[str, float]) -> int:
    """Return how many workers the nodes of the cluster have room for, if nothing else ran there.

    Args:
        request: Resources that a worker reserves.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(name, 0) / amount + 1e-6) for name, amount in request.items()) for node in nodes)


class Patience:
    """The time for which a training run waits for nodes, since the cluster has been too small for it.

    Args:
        config: Settings of the cluster.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self.too_small_since: float | None = None

    def check(self, kept: str = "") -> None:
        """Report a cluster that is too small, once, and raise ConvoyError if it has been so for too long.

        Args:
            kept: What is not lost, for the message.
        """
        places, workers = count_places(self.config.request), self.config.workers
        if places >= workers:
            self.too_small_since = None
            return
        wanted = " ".join(f"{name}={amount:g}" for name, amount in self.config.request.items())
        problem = f"the cluster has room for {places} of {workers} workers of {wanted}"
        if self.too_small_since is None:
            self.too_small_since = time.monotonic()
            print(f"{problem}: waiting {self.config.wait_minutes:g} minutes for more nodes", flush=True)
        if time.monotonic() > self.too_small_since + 60 * self.config.wait_minutes:
            raise ConvoyError(
                f"{problem}, and no node was added in {self.config.wait_minutes:g} minutes: start nodes (`ray status` "
                f"lists them), or lower trainer.workers or trainer.resources{kept}"
            )


def reserve(request: Mapping[str, float]) -> dict[str, Any]:
    """Return the options of a Ray task that reserves resources."""
    named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    others = {name: amount for name, amount in request.items() if name not in named}
    return {named[name]: amount for name, amount in request.items() if name in named} | {"resources": others}
