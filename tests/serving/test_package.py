"""Packages: what they hold, and that their server runs with their own requirements."""

import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from command_line import run_command
from convoy.serving.package import PACKAGED, REQUIREMENTS
from servers import find_free_port, run_process, wait_until
from serving_fixtures import CLASSES, draw, write_onnx

HEAVY = ("torch", "mlflow", "dvc", "hydra-core", "pytorch-lightning", "pandas", "scikit-learn", "pyarrow")


@pytest.fixture
def package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    write_onnx(tmp_path / "pets" / "model.onnx")
    run_command("package", tmp_path / "server", "--model", tmp_path / "pets")
    said = capsys.readouterr().out
    assert "MB; its README.md says how to start it" in said
    return tmp_path / "server"


def test_package_describes_model_and_preprocessing(package: Path) -> None:
    card = json.loads((package / "model.json").read_text())
    assert (card["name"], card["classes"]) == ("pets", CLASSES)
    assert card["preprocessing"]["size"] == 8
    names = {"model.onnx", "model.json", "requirements.txt", "Dockerfile", ".dockerignore", "README.md", "convoy"}
    assert {file.name for file in package.iterdir()} == names


def test_existing_folder_is_not_overwritten(package: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="server exists: remove it, or name another folder"):
        run_command("package", package, "--model", tmp_path / "pets")


def test_requirements_are_light(package: Path) -> None:
    names = [line.partition("==")[0] for line in (package / "requirements.txt").read_text().splitlines()]
    assert names == list(REQUIREMENTS)
    assert not {*names} & {*HEAVY}


def test_package_holds_all_code_that_its_server_imports(package: Path) -> None:
    code = (
        "import sys, convoy.serving.server, convoy.serving.decode_worker\n"
        "print(*(module.__file__ for name, module in sys.modules.items() if name.startswith('convoy.')), sep='\\n')"
    )
    environment = os.environ | {"PYTHONPATH": str(package)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = {str(Path(file).relative_to(package / "convoy")) for file in done.stdout.split()}
    assert {file for file in imported if not file.startswith("serving/")} <= {*PACKAGED}


@pytest.mark.slow
def test_package_is_installed_and_started_from_scratch(package: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    uv = Path(sys.executable).with_name("uv")
    run = functools.partial(subprocess.run, check=True, env=environment, cwd=package)
    run([uv, "venv", "--quiet", "--python", sys.executable, ".venv"])
    run([uv, "pip", "install", "--quiet", "--python", ".venv", "--requirement", "requirements.txt"])
    port = find_free_port()
    command = [".venv/bin/python", "-m", "convoy.serving", ".", "--port", str(port)]
    address = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{address}/ready", timeout=5).status_code == 200
        return False

    with run_process(command, tmp_path / "log", cwd=package, env=environment):
        wait_until(is_ready)
        answer = requests.post(f"{address}/predict", files={"file": draw("fox")}, timeout=10).json()
        assert answer["predictions"][0]["label"] == "fox"
        assert requests.get(address, timeout=5).status_code == 200
    installed = subprocess.check_output([uv, "pip", "list", "--python", ".venv", "--format", "json"], cwd=package)
    assert not {each["name"] for each in json.loads(installed)} & {*HEAVY}
    size = sum(file.stat().st_size for file in package.rglob("*") if file.is_file() and not file.is_symlink())
    print(f"the package and its libraries: {size / 1e6:.0f} MB")
    assert size < 400e6
