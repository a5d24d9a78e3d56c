"""Local servers for tests: PostgreSQL, an S3 bucket, MLflow, and an HTTP server that fails on purpose."""

import contextlib
import http.server
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import boto3
import psycopg2
import pytest
import requests

BUCKET = {  # what a client needs to know of the bucket, with its MLFLOW_S3_ENDPOINT_URL
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "anything",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    for _ in range(int(seconds * 10)):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} seconds")


def find_free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


@contextlib.contextmanager
def run_process(command: list[str], log: Path, **options: object) -> Iterator[subprocess.Popen]:
    """A process and all that it starts, for as long as this lasts; what they say goes into a file."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def run_postgres() -> Iterator[str]:
    """The URI of an empty database, as SQLAlchemy reads it. Skips the test where PostgreSQL is not installed."""
    places = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr/local/pgsql").glob("bin")]
    initdb = shutil.which("initdb", path=os.pathsep.join([os.environ["PATH"], *map(str, places)]))
    if not initdb:
        pytest.skip("PostgreSQL is not installed: no initdb in PATH or /usr/lib/postgresql/*/bin")
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as folder:  # a socket's path is short
        options: dict[str, object] = {"cwd": folder}
        if os.geteuid() == 0:  # it refuses to run as root
            user = next(name for name in ("postgres", "nobody") if name in {one.pw_name for one in pwd.getpwall()})
            shutil.chown(folder, user)
            options |= {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
        data = f"{folder}/data"
        made = [initdb, "--auth=trust", "--username=convoy", "--encoding=UTF8", "--no-sync", "--pgdata", data]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
        command = [str(Path(initdb).with_name("postgres")), "-F", "-D", data, "-k", folder, "-c", "listen_addresses="]

        def answers() -> bool:
            with contextlib.suppress(psycopg2.OperationalError):
                psycopg2.connect(host=folder, user="convoy", dbname="postgres").close()
                return True
            return False

        with run_process(command, Path(folder, "said"), **options):
            wait_until(answers)
            yield f"postgresql+psycopg2://convoy@/postgres?host={folder}"


@contextlib.contextmanager
def run_s3(folder: Path) -> Iterator[str]:
    """The address of an S3 with a bucket called "convoy"."""
    address = f"http://127.0.0.1:{(port := find_free_port())}"
    with run_process([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], folder / "s3.log"):
        wait_until(lambda: _is_up(address))
        keys = {"aws_access_key_id": BUCKET["AWS_ACCESS_KEY_ID"], "region_name": BUCKET["AWS_DEFAULT_REGION"]}
        keys["aws_secret_access_key"] = BUCKET["AWS_SECRET_ACCESS_KEY"]
        boto3.client("s3", endpoint_url=address, **keys).create_bucket(Bucket="convoy")
        yield address


@contextlib.contextmanager
def run_mlflow(folder: Path, port: int, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[int]:
    """MLflow's server at http://127.0.0.1:port with these options; the number of its process, which leads its group."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    given = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")} | (environment or {})
    given["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # which nobody here needs, and which takes seconds
    with run_process([*command, *options], folder / "mlflow.log", cwd=folder, env=given) as process:
        wait_until(lambda: process.poll() is not None or _is_up(f"http://127.0.0.1:{port}/health"))
        assert process.poll() is None, (folder / "mlflow.log").read_text()[-3000:]
        yield process.pid


def _is_up(address: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(address, timeout=5).status_code < 500
    return False


class FaultyServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    answer = "500"


class FaultyHandler(http.server.BaseHTTPRequestHandler):
    server: FaultyServer

    def do_GET(self) -> None:
        match self.server.answer:
            case "nothing":
                time.sleep(60)
            case "rubbish":
                self.say(200, b"<html>Welcome to the hotel's network</html>")
            case "later":
                self.send_response(503)
                self.send_header("Retry-After", "3600")
                self.end_headers()
            case status:
                self.say(int(status), b'{"error_code": "INTERNAL_ERROR", "message": "no"}')

    do_POST = do_GET

    def say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
