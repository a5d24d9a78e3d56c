"""What an answer costs: `python benchmarks/serving.py`, in a project with a champion.

`convoy serve`, `mlflow models serve` and a minimal server of FastAPI, Pillow and ONNX runtime answer the same images,
one or 64 in a request, of one or eight clients that send a request after the other. The servers take turns.
Times are those of the clients; "processor" is the time that the server's processes used for an image.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from PIL import Image

from convoy.serving import loading
from convoy.serving.onnx_model import ONNX_FILE

ROOT = Path(__file__).parents[1]
MINIMAL = """
import io, sys
import numpy as np, onnxruntime, uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image, ImageOps
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
size, channels = session.get_inputs()[0].shape[2:]
app = FastAPI()
@app.post("/predict")
async def predict(file: list[UploadFile]):
    pixels = []
    for each in file:
        image = Image.open(io.BytesIO(await each.read())).convert("L" if channels == 1 else "RGB")
        pixels.append(np.asarray(ImageOps.fit(image, (size, size))).reshape(size, size, channels))
    found = session.run(["probabilities"], {"pixels": np.stack(pixels)})[0]
    return [{"label": int(row.argmax()), "probabilities": row.tolist()} for row in found]
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), access_log=False, log_level="warning")
"""
SCENARIOS = ((1, 1), (1, 8), (64, 1), (64, 8))  # images in a request, clients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", type=Path, default=Path.cwd())
    parser.add_argument("--model", help="models:/NAME@ALIAS; by default the champion")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    os.chdir(given.project)
    uri = given.model or f"models:/{read_name()}@champion"
    cache = loading.open_cache(Path.cwd())
    folder = cache.fetch(cache.find(uri))
    loaded = loading.load_folder(folder, threads=1)
    files = [make_jpeg(number, loaded.model.spec.channels) for number in range(64)]
    rows = []
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as name:
        minimal = Path(name, "minimal.py")
        minimal.write_text(MINIMAL)
        commands = {
            "convoy serve": ["-m", "pipeline.cli", "serve", "--model", str(folder), "--port"],
            "minimal": [str(minimal), str(folder / ONNX_FILE)],
            "mlflow models serve": ["-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "--port"],
        }
        servers = {each: stack.enter_context(start(command)) for each, command in commands.items()}
        for round_ in range(given.rounds + 1):
            for images, clients in SCENARIOS:
                for each, (process, port) in servers.items():
                    request = make_request(each, files[:images])
                    before = processor_time(process)
                    times = asyncio.run(load(port, request, clients, given.seconds))
                    cost = (processor_time(process) - before) / (len(times) * images)
                    # The first round warms up.
                    if round_:
                        rows.append((each, images, clients, *summarize(times, images, given.seconds), cost * 1000))
    show(pd.DataFrame(rows, columns=["server", "images", "clients", "p50", "p95", "p99", "images/s", "processor"]))


def read_name() -> str:
    from convoy.core import config

    return config.load(Path("params.yaml"))["register"]["name"]


def make_jpeg(seed: int, channels: int) -> bytes:
    """A smooth image of 224x224 pixels, as a JPEG of about 10 KB."""
    noise = np.random.default_rng(seed).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((224, 224), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.convert("L" if channels == 1 else "RGB").save(file, "JPEG", quality=90)
    return file.getvalue()


@contextlib.contextmanager
def start(command: list[str]) -> Iterator[tuple[psutil.Process, int]]:
    """Start a server, and wait until it listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    changes = {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "MLFLOW_TRACKING_URI": f"sqlite:///{Path.cwd() / 'mlflow.db'}"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, *command, str(port)],
            env=os.environ | changes,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            for _ in range(600):
                with socket.socket() as connection:
                    if connection.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield psutil.Process(process.pid), port
        finally:
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.terminate()
            process.wait()


def make_request(server: str, files: list[bytes]) -> bytes:
    """A request in the form that the server documents."""
    if server.startswith("mlflow"):
        path, kind = "/invocations", "application/json"
        body = json.dumps({"inputs": [base64.b64encode(file).decode() for file in files]}).encode()
    else:
        path, kind = "/predict", "multipart/form-data; boundary=frontier"
        head = b'--frontier\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
        body = b"".join(head + file + b"\r\n" for file in files) + b"--frontier--\r\n"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def load(port: int, request: bytes, clients: int, seconds: float) -> list[float]:
    """Let clients send requests for a while; returns the time of each."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def run() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < end:
            began = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            times.append(time.perf_counter() - began)
        writer.close()

    await asyncio.gather(*(run() for _ in range(clients)))
    return times


def processor_time(process: psutil.Process) -> float:
    """Seconds of processors that a process and those below it have used."""
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def summarize(times: list[float], images: int, seconds: float) -> tuple[float, ...]:
    """The 50th, 95th and 99th percentile in milliseconds, and the images a second."""
    return (*(np.percentile(times, [50, 95, 99]) * 1000), len(times) * images / seconds)


def show(measured: pd.DataFrame) -> None:
    """Medians of the rounds."""
    print("| images | clients | server | p50 ms | p95 ms | p99 ms | images/s | processor ms an image |")
    print("|---|---|---|---|---|---|---|---|")
    for (images, clients), part in measured.groupby(["images", "clients"]):
        for server, mine in part.groupby("server", sort=False):
            cells = mine[["p50", "p95", "p99", "images/s", "processor"]].median()
            times = " | ".join(f"{cells[name]:.2f}" for name in ("p50", "p95", "p99"))
            print(f"| {images} | {clients} | {server} | {times} | {cells['images/s']:.0f} | {cells['processor']:.2f} |")


if __name__ == "__main__":
    main()
