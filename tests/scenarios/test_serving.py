"""A running server: under load, while its model changes, when its processes are killed, and with hostile images."""

import base64
import contextlib
import io
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from PIL import Image

from servers import find_free_port, run_process, wait_until
from serving_fixtures import CLASSES, FakeRegistry, draw, make_registry
from small_project import ROOT

pytestmark = pytest.mark.slow

LOAD_S = 30
CLIENTS = 8


@pytest.fixture
def registry(tmp_path: Path, embedded_store: None) -> FakeRegistry:
    return make_registry(tmp_path)


@contextlib.contextmanager
def run_server(registry: FakeRegistry, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """The address of `convoy serve` and its process."""
    port = find_free_port()
    environment = {name: value for name, value in os.environ.items() if name not in ("CONVOY_API_KEY", "DVC_ROOT")}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'src'}"
    command = [sys.executable, "-m", "pipeline.cli", "serve", "--port", str(port), *options]
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{address}/health", timeout=5).ok
        return False

    with run_process(command, registry.project / "log", cwd=registry.project, env=environment) as process:
        wait_until(answers)
        yield address, psutil.Process(process.pid)


@contextlib.contextmanager
def load(address: str, clients: int = CLIENTS) -> Iterator[list[Mapping[str, Any]]]:
    """Clients that send an image after the other while the context is active; the list of their answers."""
    answers: list[Mapping[str, Any]] = []
    is_over = threading.Event()

    def send(first: int) -> None:
        with requests.Session() as session:
            for number in itertools.count(first):
                if is_over.is_set():
                    return
                label = CLASSES[number % 3]
                response = session.post(f"{address}/predict", files={"file": draw(label)}, timeout=60)
                assert response.status_code == 200, response.text
                answer = response.json()
                assert answer["predictions"][0]["label"] == label
                answers.append(answer)

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(send, number) for number in range(clients)]
        try:
            yield answers
        finally:
            is_over.set()
        for each in running:
            each.result()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_steady_load_fails_nothing_and_leaks_nothing(registry: FakeRegistry) -> None:
    with run_server(registry) as (address, process):
        with load(address) as answers:
            time.sleep(LOAD_S / 4)
            before = process.memory_info().rss
            time.sleep(LOAD_S * 3 / 4)
            after = process.memory_info().rss
        assert len(answers) > 1000
        assert after < 1.2 * before + 10e6
        text = requests.get(f"{address}/metrics", timeout=5).text
        assert f'convoy_requests_total{{status="200"}} {float(len(answers))}' in text


def test_ten_alias_moves_under_load_lose_no_request(registry: FakeRegistry) -> None:
    with run_server(registry, "--check-seconds", "0.1") as (address, _), load(address) as answers:
        for version in range(2, 12):
            registry.add(version)
            registry.move_alias(version)
            wait_for(lambda version=version: bool(answers) and answers[-1]["version"] == str(version))
        registry.add(12, is_broken=True)
        registry.move_alias(12)
        wait_for(lambda: "models:/pets/12" in (requests.get(f"{address}/model", timeout=5).json()["error"] or ""))
        before = len(answers)
        wait_for(lambda: len(answers) > before + 50)
        registry.file.rename(registry.file.with_suffix(".away"))
        wait_for(lambda: "mlflow.db" in (requests.get(f"{address}/model", timeout=5).json()["error"] or ""))
        assert requests.get(f"{address}/ready", timeout=5).ok
    assert {answer["version"] for answer in answers} == {str(version) for version in range(1, 12)}
    assert answers[-1]["version"] == "11"


def test_killed_decoders_are_replaced_and_nothing_is_lost(registry: FakeRegistry) -> None:
    with run_server(registry) as (address, process), load(address) as answers:
        for _ in range(5):
            before = len(answers)
            wait_for(lambda before=before: len(answers) > before + 20)
            for worker in process.children():
                worker.kill()
        before = len(answers)
        wait_for(lambda: len(answers) > before + 50)


def test_decoders_end_with_a_killed_server(registry: FakeRegistry) -> None:
    with run_server(registry) as (_, process):
        workers = process.children()
        assert workers
        process.kill()
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive


def test_request_in_flight_is_answered_after_sigterm(registry: FakeRegistry) -> None:
    many = [base64.b64encode(draw("dog", "JPEG", (1500, 1500))).decode()] * 300
    with run_server(registry) as (address, process), ThreadPoolExecutor(1) as pool:
        running = pool.submit(requests.post, f"{address}/predict", json=many, timeout=60)
        wait_for(lambda: "convoy_requests_active 1.0" in requests.get(f"{address}/metrics", timeout=5).text)
        process.send_signal(signal.SIGTERM)
        assert len(running.result().json()["predictions"]) == 300
        with pytest.raises(requests.ConnectionError):
            wait_for(lambda: not requests.get(f"{address}/health", timeout=5).ok)


def test_hundred_hostile_requests_at_once_are_answered(registry: FakeRegistry) -> None:
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    huge = draw("dog", "JPEG", (8000, 6250))
    kinds = [
        draw("cat"),
        draw("cat")[:-30],
        bomb.getvalue(),
        huge,
        b"\x89PNG\r\n\x1a\n" + os.urandom(5000),
        b"",
        b"GIF89a",
    ]
    expected = ["cat", None, None, "dog", None, None, None]
    with run_server(registry) as (address, process), ThreadPoolExecutor(100) as pool:

        def send(number: int) -> requests.Response:
            return requests.post(
                f"{address}/predict",
                data=kinds[number % 7],
                headers={"Content-Type": "application/octet-stream"},
                timeout=300,
            )

        found = list(pool.map(send, range(105)))
        assert {each.status_code for each in found} == {200}
        assert [each.json()["predictions"][0].get("label") for each in found] == expected * 15
        many = requests.post(
            f"{address}/predict", json=[base64.b64encode(kinds[n % 2]).decode() for n in range(500)], timeout=300
        )
        entries = many.json()["predictions"]
        assert [entry.get("label") for entry in entries] == ["cat", None] * 250
        assert [entry["position"] for entry in entries if "error" in entry] == list(range(1, 500, 2))
        assert process.memory_info().rss < 1e9
