"""What deploy/ describes, with the programs of PyPI and Debian in place of containers, and moto in place of the S3."""

import configparser
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import requests
import yaml

import servers
from repositories import init_git
from small_project import ROOT

COMPOSE = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())
BUCKETS = ("mlflow", "dvc")
PASSWORD = "secret-for-the-test"
USER = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
LOG_A_RUN = """
import mlflow
mlflow.set_experiment("pets")
with mlflow.start_run():
    mlflow.log_metric("accuracy", 0.9)
    mlflow.log_text("what was learned", "notes.txt")
"""
READ_IT = """
import mlflow
(run,) = mlflow.search_runs(experiment_names=["pets"], output_format="list")
print(run.data.metrics["accuracy"], mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/notes.txt"))
"""


def run(command: list[str], environment: Mapping[str, str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextlib.contextmanager
def run_services(folder: Path) -> Iterator[dict[str, str]]:
    """An empty PostgreSQL and an empty S3, as the environment of the scripts."""
    folder.mkdir()
    with servers.run_postgres() as uri, servers.run_s3(folder) as address:
        yield servers.BUCKET | {
            "PGHOST": uri.partition("host=")[2],
            "PGUSER": "convoy",
            "MLFLOW_S3_ENDPOINT_URL": address,
            "RCLONE_CONFIG_STORE_TYPE": "s3",
            "RCLONE_CONFIG_STORE_PROVIDER": "Other",
            "RCLONE_CONFIG_STORE_ENDPOINT": address,
            "RCLONE_CONFIG_STORE_ACCESS_KEY_ID": servers.BUCKET["AWS_ACCESS_KEY_ID"],
            "RCLONE_CONFIG_STORE_SECRET_ACCESS_KEY": servers.BUCKET["AWS_SECRET_ACCESS_KEY"],
            "DATABASES": COMPOSE["services"]["backup"]["environment"]["DATABASES"],
            "BUCKETS": COMPOSE["services"]["backup"]["environment"]["BUCKETS"],
        }


@contextlib.contextmanager
def run_mlflow(folder: Path, services: Mapping[str, str]) -> Iterator[str]:
    """MLflow with the options and the settings of users in compose.yaml."""
    uri, port = f"postgresql+psycopg2://convoy@/{{}}?host={services['PGHOST']}", servers.find_free_port()
    settings = configparser.RawConfigParser()
    settings.read_string(COMPOSE["configs"]["auth"]["content"])
    settings["mlflow"].update({"database_uri": uri.format("users"), "admin_password": PASSWORD})
    with (folder / "auth.ini").open("w") as file:
        settings.write(file)
    environment = {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "secret"}
    options = ["--app-name", "basic-auth", "--backend-store-uri", uri.format("mlflow")]
    options += ["--artifacts-destination", "s3://mlflow/artifacts"]
    assert set(options[::2]) <= set(COMPOSE["services"]["mlflow"]["command"].split())
    with servers.run_mlflow(folder, port, *options, environment={**services, **environment}):
        yield f"http://127.0.0.1:{port}"


def make_dvc_project(folder: Path, endpoint: str) -> Path:
    folder.mkdir()
    init_git(folder)
    for command in (
        ["init"],
        ["remote", "add", "--default", "store", "s3://dvc"],
        ["remote", "modify", "store", "endpointurl", endpoint],
    ):
        run([sys.executable, "-m", "dvc", *command], {}, folder)
    return folder


@pytest.mark.slow
def test_runs_files_users_and_data_are_restored_from_a_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # rclone can't connect where this is set.
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    pytest.importorskip("flask_wtf", reason="MLflow's users need Flask-WTF")
    if not shutil.which("rclone"):
        pytest.skip("rclone is not installed: apt install rclone")
    backup = {"BACKUP": str(tmp_path / "backup")}
    with run_services(tmp_path / "before") as services:
        for database in services["DATABASES"].split():
            run(["createdb", database], services, tmp_path)
        for bucket in BUCKETS:
            run(["rclone", "mkdir", f"store:{bucket}"], services, tmp_path)
        with run_mlflow(tmp_path / "before", services) as address:
            assert requests.get(f"{address}/api/2.0/mlflow/experiments/get?experiment_id=0").status_code == 401
            # clients have no key of the store: files pass through MLflow
            run([sys.executable, "-c", LOG_A_RUN], USER | {"MLFLOW_TRACKING_URI": address}, tmp_path)
            new = {"username": "ada", "password": PASSWORD}
            made = requests.post(f"{address}/api/2.0/mlflow/users/create", json=new, auth=("admin", PASSWORD))
            assert made.status_code == 200, made.text
        project = make_dvc_project(tmp_path / "project", services["MLFLOW_S3_ENDPOINT_URL"])
        (project / "images.bin").write_bytes(os.urandom(1000))
        for command in (["add", "images.bin"], ["push"]):
            run([sys.executable, "-m", "dvc", *command], services, project)
        made_in = run([str(ROOT / "deploy/backup.sh")], services | backup, tmp_path).strip()
        assert sorted(each.name for each in Path(made_in, "databases").iterdir()) == ["mlflow.dump", "users.dump"]

    with run_services(tmp_path / "after") as services:
        said = run([str(ROOT / "deploy/restore.sh")], services | backup, tmp_path)
        assert f"restored {made_in}" in said
        with run_mlflow(tmp_path / "after", services) as address:
            ada = {"MLFLOW_TRACKING_USERNAME": "ada", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
            found = run([sys.executable, "-c", READ_IT], ada | {"MLFLOW_TRACKING_URI": address}, tmp_path)
            assert found.split("\n")[-2] == "0.9 what was learned"
        content = (project / "images.bin").read_bytes()
        (project / "images.bin").unlink()
        shutil.rmtree(project / ".dvc/cache")
        endpoint = ["remote", "modify", "store", "endpointurl", services["MLFLOW_S3_ENDPOINT_URL"]]
        for command in (endpoint, ["pull"]):
            run([sys.executable, "-m", "dvc", *command], services, project)
        assert (project / "images.bin").read_bytes() == content

        # what is there is not overwritten
        again = subprocess.run(
            [str(ROOT / "deploy/restore.sh")], env=os.environ | services | backup, capture_output=True, text=True
        )
        assert again.returncode == 1
        assert "the database mlflow is not empty" in again.stderr


def test_compose_names_only_what_it_defines() -> None:
    services, volumes = COMPOSE["services"], COMPOSE["volumes"]
    for service in services.values():
        assert set(service.get("depends_on", [])) <= set(services)
        used = {volume.partition(":")[0] for volume in service.get("volumes", [])}
        assert {name for name in used if name.isalpha()} <= set(volumes)
        assert {each["source"] for each in service.get("configs", [])} <= set(COMPOSE["configs"])
    asked = set(json.dumps(COMPOSE).split("${")[1:])
    named = {text.split("}")[0].split(":")[0] for text in asked}
    example = (ROOT / "deploy/.env.example").read_text()
    assert named == {line.partition("=")[0] for line in example.splitlines() if "=" in line}
