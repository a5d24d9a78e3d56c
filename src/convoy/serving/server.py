"""The server process: its settings, and the loop that answers requests."""

import dataclasses
import ipaddress
import logging
import os
import socket
from pathlib import Path

import uvicorn

from convoy.core.errors import ConvoyError
from convoy.serving.app import create_app
from convoy.serving.decode_pool import count_processors
from convoy.serving.deployment import Deployment
from convoy.serving.request_log import RequestLog
from convoy.serving.service import Limits, Service

# The environment variable with the API key, which on a command line every user of the machine could read.
API_KEY_VARIABLE = "CONVOY_API_KEY"
# Time for requests to end after SIGTERM.
SHUTDOWN_S = 30


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Settings of a server."""

    model: str  # a folder with an ONNX file, models:/NAME@ALIAS or models:/NAME/VERSION
    project: Path  # the folder with mlflow.db and the cache
    host: str = "127.0.0.1"
    port: int = 8000
    check_seconds: float = 10.0  # between two looks at the alias
    log_folder: Path | None = None
    log_days: int = 30
    log_images: bool = False
    limits: Limits = dataclasses.field(default_factory=Limits)


def serve(config: ServerConfig) -> None:
    """Serve a model until the process is asked to end.

    Raises:
        ConvoyError: If there is no such model, or the settings are not safe.
    """
    api_key = os.environ.get(API_KEY_VARIABLE) or None
    if not is_loopback(config.host) and not api_key:
        raise ConvoyError(
            f"--host {config.host} lets other machines use this server: set the environment variable "
            f"{API_KEY_VARIABLE} to a key that they must send, for example by "
            f"`export {API_KEY_VARIABLE}=$(openssl rand -hex 16)`"
        )
    logging.basicConfig(format="convoy: %(message)s", level=logging.WARNING)
    logging.getLogger("convoy.serving").setLevel(logging.INFO)
    workers = count_processors()
    deployment = Deployment(config.model, config.project, threads=workers, interval=config.check_seconds)
    deployment.start()
    folder = config.log_folder
    request_log = RequestLog(folder, config.log_days, keep_images=config.log_images) if folder else None
    app = create_app(Service(deployment, workers, config.limits, request_log), api_key)
    options = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    try:
        _Server(options).run()
    # uvicorn has printed why.
    except SystemExit:
        reason = "another server may be running there; see --port"
        raise ConvoyError(f"can't listen at {config.host}, port {config.port}: {reason}") from None


class _Server(uvicorn.Server):
    """A server that prints its address once it answers."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        if self.started:
            host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
            print(f"http://{host}:{self.config.port}  (its API: /docs; end it with Ctrl-C)", flush=True)


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is reached only from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
