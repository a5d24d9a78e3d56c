"""The web server: what it accepts, what it answers, and what it refuses."""

import base64
import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from convoy.core.errors import ConvoyError
from convoy.serving import server
from convoy.serving.app import create_app
from convoy.serving.deployment import Deployment
from convoy.serving.server import ServerConfig
from convoy.serving.service import Limits, Service
from serving_fixtures import CLASSES, SIZE, draw, write_onnx

LIMITS = Limits(max_bytes=1 << 20, max_images=20)


@contextlib.contextmanager
def run_app(folder: Path, *, key: str | None = None, limits: Limits = LIMITS) -> Iterator[TestClient]:
    deployment = Deployment(str(folder), folder, threads=1, interval=60)
    deployment.start()
    with TestClient(create_app(Service(deployment, 2, limits), key)) as client:
        yield client


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("model")
    write_onnx(folder / "model.onnx")
    with run_app(folder) as client:
        yield client


def post_json(client: TestClient, content: Any, **params: Any) -> dict[str, Any]:
    response = client.post("/predict", json=content, params=params)
    assert response.status_code == 200, response.text
    return response.json()


def encode(image: bytes) -> str:
    return base64.b64encode(image).decode()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_raw_image_gets_label_and_probabilities(kind: str, client: TestClient) -> None:
    response = client.post("/predict", content=draw("dog", kind), headers={"Content-Type": f"image/{kind.lower()}"})
    answer = response.json()
    (found,) = answer["predictions"]
    assert answer["version"]
    assert found["label"] == "dog"
    assert found["probability"] == found["probabilities"]["dog"] > 0.9
    assert sorted(found["probabilities"]) == CLASSES
    assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_form_of_files_is_answered_in_its_order(client: TestClient) -> None:
    labels = ["fox", "cat", "dog", "cat"]
    files = [("file", (f"{number}.png", draw(label))) for number, label in enumerate(labels)]
    answer = client.post("/predict", files=files).json()
    assert [each["label"] for each in answer["predictions"]] == labels


def test_json_takes_base64_data_uris_and_lists(client: TestClient) -> None:
    cat, dog = draw("cat"), draw("dog", "JPEG")
    texts = [encode(cat), f"data:image/jpeg;base64,{encode(dog)}", encode(cat)[:40] + "\n" + encode(cat)[40:]]
    for content in (texts, {"images": texts}):
        assert [each["label"] for each in post_json(client, content)["predictions"]] == ["cat", "dog", "cat"]
    assert post_json(client, texts[1])["predictions"][0]["label"] == "dog"
    # A browser may escape what base64 has besides letters and digits.
    escaped = "data:image/png;base64," + urllib.parse.quote(encode(cat), safe="")
    assert "%" in escaped
    assert post_json(client, escaped)["predictions"][0]["label"] == "cat"


def test_empty_list_gives_an_empty_answer(client: TestClient) -> None:
    assert post_json(client, [])["predictions"] == []
    assert post_json(client, {"images": []})["predictions"] == []
    empty_form = {"content": b"--x--\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
    assert client.post("/predict", **empty_form).json()["predictions"] == []


def test_top_k_limits_the_classes_highest_first(client: TestClient) -> None:
    (found,) = post_json(client, [encode(draw("fox"))], top_k=2)["predictions"]
    assert next(iter(found["probabilities"])) == "fox"
    assert len(found["probabilities"]) == 2


def test_unreadable_image_does_not_harm_the_others(client: TestClient) -> None:
    torn = draw("cat")[:-20]
    found = post_json(client, [encode(draw("cat")), encode(torn), "not base64!", "", encode(draw("dog"))])
    entries = found["predictions"]
    assert [entry.get("label") for entry in entries] == ["cat", None, None, None, "dog"]
    assert [entry.get("position") for entry in entries] == [None, 1, 2, 3, None]
    assert entries[1]["error"].startswith("can't be decoded: ")
    assert entries[2]["error"] == "is text, but not the base64 of an image file"
    assert entries[3]["error"] == "is empty"


@pytest.mark.parametrize(
    ("content", "kind", "status", "reason"),
    [
        (b"SECRET", "text/plain", 415, "content type"),
        (b"SECRET", "", 415, "content type"),
        (b"{SECRET", "application/json", 422, "not valid JSON"),
        (b"[" * 100_000, "application/json", 422, "not valid JSON"),
        (b'{"SECRET": []}', "application/json", 422, 'one key, "images"'),
        (b'[["SECRET"]]', "application/json", 422, "list of texts"),
        (b'"\\ud800"', "application/json", 200, "is text"),
        (b"SECRET", "multipart/form-data", 422, "no boundary"),
        (b"SECRET", "multipart/form-data; boundary=x", 422, "malformed"),
        (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nSECRET\r\n--x--', "multipart/form-data; boundary=x",
         422, "no file"),
        (b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\nSECRET',
         "multipart/form-data; boundary=x", 422, "incomplete"),
        (b"SECRET" * 200_000, "image/png", 413, "more than 1 MiB"),
        (json.dumps(["SECRET"] * 21).encode(), "application/json", 413, "more than 20 images"),
    ],
)  # fmt: skip
def test_bad_request_is_refused_in_one_short_line(
    content: bytes, kind: str, status: int, reason: str, client: TestClient
) -> None:
    response = client.post("/predict", content=content, headers={"Content-Type": kind})
    assert response.status_code == status
    assert reason in response.text.replace('\\"', '"')
    assert len(response.text) < 250
    assert "SECRET" not in response.text


def test_body_that_does_not_say_its_size_is_bounded(client: TestClient) -> None:
    def stream() -> Iterator[bytes]:
        for _ in range(50):
            yield bytes(50_000)

    response = client.post("/predict", content=stream(), headers={"Content-Type": "image/png"})
    assert response.status_code == 413


def test_invalid_argument_is_not_repeated(client: TestClient) -> None:
    response = client.post("/predict?top_k=SECRET", content=b"", headers={"Content-Type": "image/png"})
    assert response.status_code == 422
    assert "SECRET" not in response.text
    assert "error" in response.json()


def test_bombs_and_huge_images_are_bounded(client: TestClient) -> None:
    file = io.BytesIO()
    Image.new("L", (20_000, 20_000)).save(file, "PNG")
    (found,) = post_json(client, [encode(file.getvalue())])["predictions"]
    assert found["error"] == "has more than the limit of 100000000 pixels"
    (found,) = post_json(client, [encode(draw("dog", "JPEG", (8000, 6250)))])["predictions"]
    assert found["label"] == "dog"


def test_heatmap_shows_where_the_class_is(client: TestClient) -> None:
    pixels = np.full((SIZE, SIZE, 3), 10, np.uint8)
    pixels[:4, 4:, 1] = 250  # green at the top right
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    (found,) = post_json(client, [encode(file.getvalue())], heatmap=True)["predictions"]
    assert found["label"] == "dog"
    values = np.array(found["heatmap"]["values"])
    assert found["heatmap"]["kind"] == "class activation map"
    assert values[:4, 4:].min() == 1
    assert values[4:, :4].max() == 0


def test_model_health_and_readiness_are_reported(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json()["status"] == "ready"
    model = client.get("/model").json()
    assert model["classes"] == CLASSES
    assert (model["runtime"], model["error"]) == ("onnxruntime", None)


def test_metrics_count_requests_images_and_labels(client: TestClient) -> None:
    def read() -> dict[str, float]:
        lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("convoy_")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    before = read()
    post_json(client, [encode(draw("fox")), "?", encode(draw("fox"))])
    after = read()
    grown = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    assert grown['convoy_requests_total{status="200"}'] == 1
    assert grown['convoy_images_total{outcome="invalid"}'] == 1
    assert grown['convoy_predictions_total{label="fox"}'] == 2
    assert after["convoy_requests_active"] == 0


def test_api_is_described_for_tools(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {"/predict", "/health", "/ready", "/model", "/metrics"}
    accepted = described["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert {"multipart/form-data", "application/json", "image/*"} <= set(accepted)


def test_documentation_page_needs_no_internet(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "SwaggerUIBundle" in page
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(loaded) == 3
    assert [client.get(address).status_code for address in loaded if address.startswith("/")] == [200] * 3


def test_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    response = client.get("/")
    assert response.headers["Content-Type"].startswith("text/html")
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "//" not in re.sub(r"^ *//.*", "", response.text, flags=re.MULTILINE)


def test_key_protects_all_but_health_and_page(tmp_path: Path) -> None:
    write_onnx(tmp_path / "model.onnx")
    with run_app(tmp_path, key="open sesame") as client:
        png = {"content": draw("cat"), "headers": {"Content-Type": "image/png"}}
        assert client.post("/predict", **png).status_code == 401
        assert client.get("/model").status_code == client.get("/metrics").status_code == 401
        assert client.get("/model", headers={"X-API-Key": "wrong"}).status_code == 401
        assert client.get("/model", headers={"X-API-Key": "Gänsefüßchen".encode()}).status_code == 401
        for path in ("/", "/health", "/ready"):
            assert client.get(path).status_code == 200
        for header in ({"X-API-Key": "open sesame"}, {"Authorization": "Bearer open sesame"}):
            assert client.get("/model", headers=header).status_code == 200
            assert client.post("/predict", content=png["content"], headers=header | png["headers"]).status_code == 200


def test_other_machines_are_not_served_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONVOY_API_KEY", raising=False)
    config = ServerConfig(model=str(tmp_path), project=tmp_path)
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(ConvoyError, match="CONVOY_API_KEY"):
            server.serve(dataclasses.replace(config, host=host))
    assert all(map(server.is_loopback, ["127.0.0.1", "::1", "localhost", "127.3.4.5"]))


def test_server_imports_neither_torch_nor_mlflow() -> None:
    heavy = "{'torch', 'mlflow', 'pytorch_lightning', 'dvc', 'hydra', 'pandas', 'sklearn'}"
    code = f"import sys, pipeline.cli, pipeline.serve; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True) == "[]\n"
