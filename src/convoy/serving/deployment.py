"""Deployment: the model that a server predicts with, and its replacement when an alias names another version."""

import asyncio
import logging
import time
from pathlib import Path

from convoy.core.errors import ConvoyError, describe_error
from convoy.serving import loading
from convoy.serving.loading import LoadedModel
from convoy.serving.model_cache import ModelCache
from convoy.serving.version_store import RegisteredVersion, StoreUnavailableError

# A version that could not be loaded is tried again after this time.
RETRY_S = 60.0

log = logging.getLogger("convoy.serving")


class Deployment:
    """The model that answers requests.

    A request takes `current` once and keeps it until its answer, so that a new version can take its place at any time.

    Args:
        uri: A folder with an ONNX file, models:/NAME@ALIAS or models:/NAME/VERSION.
        project: The project folder.
        threads: The number of threads of a prediction.
        interval: Seconds between two looks at the alias.
    """

    def __init__(self, uri: str, project: Path, threads: int, interval: float) -> None:
        self.uri = uri
        self.project = project
        self.threads = threads
        self.interval = interval
        self.current: LoadedModel | None = None
        # Why `current` may not be what the URI names; "" if it is.
        self.error = ""
        self.switches = 0
        self.failures = 0
        self._failed_version: RegisteredVersion | None = None
        self._failed_at = 0.0

    def start(self) -> None:
        """Load the model for the first time.

        Without a model, a server that starts while MLflow can't be reached waits for it.

        Raises:
            ConvoyError: If there is no such model, or it can't be loaded.
        """
        try:
            self._refresh()
        except StoreUnavailableError as error:
            self._report(str(error))

    def refresh(self) -> None:
        """Load what the URI names now, unless it is loaded. An error leaves the loaded version in its place."""
        try:
            self._refresh()
        except ConvoyError as error:
            self._report(str(error))
        # A full disk or a bug in a library must not end the server.
        except Exception as error:
            self._report(f"{type(error).__name__}: {describe_error(error, 300)}")

    async def watch(self) -> None:
        """Look at the URI again and again, until this is cancelled."""
        while True:
            await asyncio.sleep(self.interval)
            if self.current is None or loading.has_alias(self.uri):
                await asyncio.to_thread(self.refresh)

    def _refresh(self) -> None:
        if not loading.is_registry_uri(self.uri):
            self._replace(loading.load_folder(Path(self.uri), self.threads))
            return
        cache = loading.open_cache(self.project)
        warning = ""
        try:
            version = cache.find(self.uri)
        except StoreUnavailableError as error:
            last = cache.find_last(self.uri)
            # What is loaded stays. At the start, what the alias named last may be in the cache.
            if self.current is not None or last is None:
                raise
            version, warning = last, f"{error}; the cache has version {last.version}"
        if self._is_loaded(version):
            self.error = ""
        elif not self._has_just_failed(version):
            self._load(cache, version)
            if warning:
                self._report(warning)

    def _load(self, cache: ModelCache, version: RegisteredVersion) -> None:
        try:
            self._replace(loading.load_version(cache, version, self.threads))
        except Exception:
            self._failed_version, self._failed_at = version, time.monotonic()
            raise

    def _replace(self, loaded: LoadedModel) -> None:
        self.switches += self.current is not None
        self.current = loaded
        self._failed_version = None
        self.error = ""
        log.info("serving %s, version %s, with %s", loaded.name, loaded.version, loaded.model.runtime)

    def _is_loaded(self, version: RegisteredVersion) -> bool:
        digest = version.checksums.get(f"artifacts/{loading.ONNX_FILE}", "")
        return self.current is not None and (self.current.source, self.current.sha256) == (version.uri, digest)

    def _has_just_failed(self, version: RegisteredVersion) -> bool:
        return version == self._failed_version and time.monotonic() - self._failed_at < RETRY_S

    def _report(self, error: str) -> None:
        """Keep an error for answers, and log it once."""
        self.failures += 1
        if error != self.error:
            stays = f"; version {self.current.version} stays" if self.current else ""
            log.warning("%s%s", error, stays)
        self.error = error
