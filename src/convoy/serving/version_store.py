"""Registered versions, read from MLflow's database or server without importing MLflow, which takes seconds.

What can't be read in this way (another database, files in a bucket) is left to `mlflow_client`, which runs MLflow in
a process of its own.
"""

import base64
import contextlib
import dataclasses
import json
import os
import re
import shutil
import sqlite3
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from convoy.core.errors import ConvoyError, describe_error
from convoy.tracking.tags import CHECKSUMS_TAG, VERDICT

URI = re.compile(r"models:/(?P<name>[^/@]+)(/(?P<version>[0-9]{1,9})|@(?P<alias>[^/@]+))")
# Time limit of a request to MLflow's server, and of a locked database.
TIMEOUT_S = 10
# MLflow's error codes for a missing alias, version or model.
NOT_FOUND = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")
# With these settings a request needs more than the standard library gives.
MLFLOW_ONLY = ("MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_CLIENT_CERT_PATH",
               "MLFLOW_TRACKING_AWS_SIGV4", "MLFLOW_TRACKING_AUTH")  # fmt: skip


class StoreUnavailableError(ConvoyError):
    """MLflow's database or server can't be reached."""


class UnsupportedStoreError(Exception):
    """The store, or the place of the files, can only be read with MLflow."""


@dataclasses.dataclass(frozen=True)
class RegisteredVersion:
    """A registered version."""

    name: str
    version: str
    location: str  # the URI of the folder with its files
    checksums: dict[str, str]  # path in this folder -> sha256

    @property
    def uri(self) -> str:
        """Return the URI of the version."""
        return f"models:/{self.name}/{self.version}"


def tracking_uri(project: Path) -> str:
    """Return the URI of the tracking store of a project.

    Raises:
        ConvoyError: If there is none.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if not (project / "mlflow.db").exists():
        raise ConvoyError("mlflow.db does not exist: run `convoy run`, or set MLFLOW_TRACKING_URI")
    return f"sqlite:///{project / 'mlflow.db'}"


def find(store: str, uri: str) -> RegisteredVersion:
    """Find a registered version.

    Args:
        store: The URI of the tracking store.
        uri: models:/NAME/VERSION or models:/NAME@ALIAS.

    Raises:
        ConvoyError: If the URI is malformed or there is no such version; the message says why, where it is known.
        StoreUnavailableError: If the store can't be reached.
        UnsupportedStoreError: If MLflow is needed to read the store.
    """
    match = URI.fullmatch(uri)
    if not match:
        raise ConvoyError(f"{uri}: no registered model; name one as models:/NAME@ALIAS or models:/NAME/VERSION")
    if store.startswith("sqlite:///"):
        found = _find_in_database(Path(store.removeprefix("sqlite:///")), **match.groupdict())
    elif store.startswith(("http://", "https://")) and not any(map(os.environ.get, MLFLOW_ONLY)):
        found = _Server(store).find(**match.groupdict())
    else:
        raise UnsupportedStoreError
    if isinstance(found, RegisteredVersion):
        return found
    raise ConvoyError(explain_missing(uri, found, match["name"]))


def explain_missing(uri: str, verdicts: dict[int, str], name: str) -> str:
    """Explain that a version does not exist.

    Args:
        uri: The URI that was asked for.
        verdicts: The verdict of the gate on each version that there is, "" if there is none.
        name: The name of the model.
    """
    if not verdicts:
        return f"MLflow has no {uri}: `convoy run` registers a model"
    newest = max(verdicts)
    verdict = " ".join(verdicts[newest].split())
    reason = f"no version has passed the gate. Version {newest}: {verdict}" if verdict else f"version {newest} exists"
    if not uri.endswith("@champion"):
        reason = f"there is version {newest}" if len(verdicts) == 1 else f"there are {len(verdicts)} versions"
    return f"MLflow has no {uri}: {reason.rstrip('.')}. Name a version: --model models:/{name}/{newest}"


def download(store: str, version: RegisteredVersion, path: str, target: Path) -> None:
    """Download a file of a version, without verifying it.

    Args:
        store: The URI of the tracking store.
        version: The version.
        path: The path of the file in the version's folder.
        target: The file to write.

    Raises:
        StoreUnavailableError: If the file is missing, or can't be fetched.
        UnsupportedStoreError: If MLflow is needed to fetch it.
    """
    place = urllib.parse.urlsplit(version.location)
    try:
        if place.scheme in ("", "file"):
            shutil.copyfile(Path(urllib.parse.unquote(place.path), path), target)
        elif place.scheme == "mlflow-artifacts" and store.startswith("http"):
            _Server(store).download(f"{place.path.strip('/')}/{path}", target)
        else:
            raise UnsupportedStoreError
    except OSError as error:
        raise StoreUnavailableError(
            f"{version.uri}/{path} is missing or can't be fetched ({describe_error(error, 200)})"
        ) from error


def _find_in_database(
    file: Path, name: str, version: str | None, alias: str | None
) -> RegisteredVersion | dict[int, str]:
    """Find a version in a SQLite database of MLflow's; return the verdicts of all versions if there is no such one."""
    address = f"file:{urllib.parse.quote(str(file.absolute()))}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=TIMEOUT_S)) as database:
            if alias is not None:
                query = "SELECT version FROM registered_model_aliases WHERE name = ? AND alias = ?"
                row = database.execute(query, (name, alias)).fetchone()
                version = str(row[0]) if row else None
            query = "SELECT storage_location, source FROM model_versions WHERE name = ? AND version = ?"
            row = database.execute(query, (name, version)).fetchone() if version else None
            if row:
                query = "SELECT value FROM model_version_tags WHERE name = ? AND version = ? AND key = ?"
                tag = database.execute(query, (name, version, CHECKSUMS_TAG)).fetchone()
                return _make_version(name, str(version), row[0] or row[1], tag[0] if tag else None)
            query = (
                "SELECT versions.version, tags.value FROM model_versions AS versions LEFT JOIN model_version_tags "
                "AS tags ON tags.name = versions.name AND tags.version = versions.version AND tags.key = ? "
                "WHERE versions.name = ?"
            )
            return {int(number): verdict or "" for number, verdict in database.execute(query, (VERDICT, name))}
    except sqlite3.OperationalError as error:
        # Another version of MLflow may have other tables.
        if "no such" in str(error):
            raise UnsupportedStoreError from error
        raise StoreUnavailableError(f"{file} can't be read ({error})") from error
    except sqlite3.Error as error:
        raise StoreUnavailableError(f"{file} can't be read ({error})") from error


def _make_version(name: str, version: str, location: str, checksums: str | None) -> RegisteredVersion:
    try:
        return RegisteredVersion(name, version, location, dict(json.loads(checksums or "")))
    except ValueError:
        uri = f"models:/{name}/{version}"
        raise ConvoyError(f"{uri} has no hashes of its files in its tag {CHECKSUMS_TAG}: register it again") from None


class _Server:
    """The REST interface of an MLflow server.

    Args:
        uri: The server's URI, which may contain a user name and a password.
    """

    def __init__(self, uri: str) -> None:
        parts = urllib.parse.urlsplit(uri)
        self.uri = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
        self.headers = {}
        user = parts.username or os.environ.get("MLFLOW_TRACKING_USERNAME")
        password = parts.password or os.environ.get("MLFLOW_TRACKING_PASSWORD")
        if user and password:
            pair = f"{urllib.parse.unquote(user)}:{urllib.parse.unquote(password)}"
            self.headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
            self.headers["Authorization"] = f"Bearer {token}"

    def find(self, name: str, version: str | None, alias: str | None) -> RegisteredVersion | dict[int, str]:
        """Find a version; return the verdicts of all versions if there is no such one."""
        try:
            if alias is not None:
                found = self._get("registered-models/alias", name=name, alias=alias)["model_version"]
            else:
                found = self._get("model-versions/get", name=name, version=str(version))["model_version"]
        except KeyError:
            try:
                found = self._get("model-versions/search", filter=f"name='{name}'")
            except KeyError:
                return {}
            return {int(each["version"]): _tags(each).get(VERDICT, "") for each in found.get("model_versions", [])}
        number = str(found["version"])
        place = self._get("model-versions/get-download-uri", name=name, version=number)["artifact_uri"]
        return _make_version(name, number, place, _tags(found).get(CHECKSUMS_TAG))

    def download(self, path: str, target: Path) -> None:
        """Download a file that the server hands out."""
        address = f"{self.uri}/api/2.0/mlflow-artifacts/artifacts/{urllib.parse.quote(path)}"
        request = urllib.request.Request(address, headers=self.headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response, target.open("wb") as file:
            shutil.copyfileobj(response, file, 1 << 20)

    def _get(self, method: str, **arguments: str) -> dict[str, Any]:
        """Call a method; raise `KeyError` if what it asks for does not exist."""
        address = f"{self.uri}/api/2.0/mlflow/{method}?{urllib.parse.urlencode(arguments)}"
        request = urllib.request.Request(address, headers=self.headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            with contextlib.suppress(ValueError, OSError, AttributeError):
                if json.load(error).get("error_code") in NOT_FOUND:
                    raise KeyError(method) from None
            raise StoreUnavailableError(f"MLflow at {self.uri} fails: HTTP status {error.code}") from error
        # A proxy may answer with something else than JSON.
        except (OSError, ValueError) as error:
            reason = describe_error(error, 200)
            raise StoreUnavailableError(f"MLflow at {self.uri} can't be reached ({reason})") from error


def _tags(version: dict[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in version.get("tags", [])}
