"""Registered versions by way of MLflow's client, in a process of its own: `python -m convoy.serving.mlflow_client`.

For stores and buckets that `version_store` can't read. The process that serves never imports MLflow.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from convoy.core.errors import ConvoyError
from convoy.serving.version_store import (
    URI,
    RegisteredVersion,
    StoreUnavailableError,
    explain_missing,
)

# Time limit of the process, which may download a large model.
TIMEOUT_S = 900


def find(store: str, uri: str) -> RegisteredVersion:
    """Find a registered version, as `version_store.find` does."""
    return RegisteredVersion(**_run(store, "find", uri))


def download(store: str, version: RegisteredVersion, path: str, target: Path) -> None:
    """Download a file of a version, as `version_store.download` does."""
    _run(store, "download", f"{version.uri}/{path}", str(target))


def _run(store: str, *arguments: str) -> dict:
    command = [sys.executable, "-m", __name__, *arguments]
    environment = os.environ | {"MLFLOW_TRACKING_URI": store, "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}
    environment = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"} | environment
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        answer = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        raise StoreUnavailableError("MLflow gives no answer: check MLFLOW_TRACKING_URI") from error
    if "missing" in answer:
        raise ConvoyError(answer["missing"])
    if "error" in answer:
        raise StoreUnavailableError(answer["error"])
    return answer


def main() -> None:
    """Find a version or download a file, and print the result as a line of JSON."""
    from mlflow.exceptions import MlflowException

    from convoy.core.errors import describe_error

    try:
        answer = _find(sys.argv[2]) if sys.argv[1] == "find" else _download(*sys.argv[2:4])
    except MlflowException as error:
        answer = {"error": f"MLflow fails ({describe_error(error, 300)})"}
    # Drivers of databases and buckets raise errors of many types.
    except Exception as error:
        answer = {"error": f"MLflow fails: {type(error).__name__} ({describe_error(error, 300)})"}
    print(json.dumps(answer))


def _find(uri: str) -> dict:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    from convoy.tracking.store import NOT_FOUND_CODES
    from convoy.tracking.tags import CHECKSUMS_TAG, VERDICT

    client = MlflowClient()
    match = URI.fullmatch(uri)
    assert match
    name = match["name"]
    try:
        if match["alias"]:
            found = client.get_model_version_by_alias(name, match["alias"])
        else:
            found = client.get_model_version(name, match["version"])
    except MlflowException as error:
        if error.error_code not in NOT_FOUND_CODES:
            raise
        versions = client.search_model_versions(f"name = '{name}'")
        verdicts = {int(each.version): each.tags.get(VERDICT, "") for each in versions}
        return {"missing": explain_missing(uri, verdicts, name)}
    location = client.get_model_version_download_uri(name, str(found.version))
    checksums = json.loads(found.tags.get(CHECKSUMS_TAG, "{}"))
    return {"name": name, "version": str(found.version), "location": location, "checksums": checksums}


def _download(uri: str, target: str) -> dict:
    import shutil
    import tempfile

    import mlflow

    with tempfile.TemporaryDirectory(dir=Path(target).parent) as folder:
        shutil.move(mlflow.artifacts.download_artifacts(uri, dst_path=folder), target)
    return {}


if __name__ == "__main__":
    main()
