"""The service behind the web server: from the contents of image files to answers."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np

from convoy.data.image_io import InvalidImageError
from convoy.serving import onnx_model
from convoy.serving.batching import Batcher
from convoy.serving.decode_pool import DecodePool
from convoy.serving.deployment import Deployment
from convoy.serving.loading import LoadedModel
from convoy.serving.metrics import Metrics
from convoy.serving.payload import Received, RequestError
from convoy.serving.request_log import LogEntry, RequestLog

# The most images of a request that asks for heat maps.
MAX_HEATMAPS = 32
# Decimal places of a value of a heat map.
HEATMAP_DECIMALS = 3


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a server."""

    max_bytes: int = 64 << 20  # of a request
    max_images: int = 1000  # of a request
    max_requests: int = 512  # at the same time
    max_bytes_in_memory: int = 512 << 20  # of all requests' bodies
    body_timeout_s: float = 60.0  # for a client to send its request


class Service:
    """Predicts images with the deployed model.

    Args:
        deployment: The deployed model.
        workers: The number of processes that decode images.
        limits: The limits of requests.
        request_log: The log of predictions, if there is one.
    """

    def __init__(
        self, deployment: Deployment, workers: int, limits: Limits, request_log: RequestLog | None = None
    ) -> None:
        self.deployment = deployment
        self.limits = limits
        self.metrics = Metrics()
        self.pool = DecodePool(workers)
        self.request_log = request_log
        # The number of requests that are being answered.
        self.active = 0
        self._batcher = Batcher()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start what runs beside the requests, and end it afterwards."""
        async with self.pool:
            tasks = [asyncio.create_task(self.deployment.watch())]
            if self.request_log:
                tasks.append(asyncio.create_task(self.request_log.write_regularly()))
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self._batcher.close()
                if self.request_log:
                    await asyncio.to_thread(self.request_log.close)

    def loaded(self) -> LoadedModel:
        """Return the model.

        Raises:
            RequestError: If no model is loaded yet.
        """
        if self.deployment.current is None:
            raise RequestError(503, "no model is loaded yet: see /ready")
        return self.deployment.current

    async def predict(
        self, images: Sequence[Received], top_k: int | None = None, *, heatmap: bool = False
    ) -> dict[str, Any]:
        """Predict images.

        Args:
            images: The contents of image files, or why they can't be used.
            top_k: The number of classes in an answer; None for all.
            heatmap: Whether to say where the network looked.

        Returns:
            The answer, with one entry per image in their order.

        Raises:
            RequestError: If no model is loaded, or heat maps of too many images are asked for.
        """
        loaded = self.loaded()
        if heatmap and len(images) > MAX_HEATMAPS:
            raise RequestError(422, f"heat maps are for at most {MAX_HEATMAPS} images of a request")
        began = time.perf_counter()
        decoded = await self._decode(loaded, images)
        valid = [image for image in decoded if not isinstance(image, InvalidImageError)]
        decoded_at = time.perf_counter()
        probabilities = await self._batcher.predict(loaded.model, valid)
        ranked = onnx_model.rank(loaded.model, probabilities, top_k)
        maps = await self._explain(loaded, valid) if heatmap and valid else [None] * len(valid)
        ended = time.perf_counter()
        self.metrics.decode.observe(decoded_at - began)
        self.metrics.predict.observe(ended - decoded_at)

        entries: list[dict[str, Any]] = []
        answers = zip(ranked, maps, strict=True)
        for position, image in enumerate(decoded):
            if isinstance(image, InvalidImageError):
                entries.append({"error": str(image), "position": position})
            else:
                names, values = next(answers)
                label, probability = next(iter(names.items()))
                entries.append({"label": label, "probability": probability, "probabilities": names})
                if values:
                    entries[-1]["heatmap"] = values
        self._count(entries)
        if self.request_log:
            self._log(self.request_log, loaded, images, entries)
        milliseconds = round((ended - began) * 1000, 3)
        return {
            "model": loaded.name,
            "version": loaded.version,
            "milliseconds": milliseconds,
            "predictions": entries,
        }

    def render_metrics(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        self.metrics.active.set(self.active)
        return self.metrics.render(self.deployment, self.pool.crashes)

    async def _decode(self, loaded: LoadedModel, images: Sequence[Received]) -> list[np.ndarray | InvalidImageError]:
        files = [image for image in images if isinstance(image, bytes)]
        found = iter(await self.pool.decode(loaded.model.spec, files))
        return [next(found) if isinstance(image, bytes) else image for image in images]

    async def _explain(self, loaded: LoadedModel, images: Sequence[np.ndarray]) -> list[dict[str, Any] | None]:
        found = await asyncio.to_thread(loaded.model.explain, np.stack(images))
        if found is None:
            return [None] * len(images)
        rounded = found.values.astype(float).round(HEATMAP_DECIMALS).tolist()
        return [{"kind": found.kind, "values": values} for values in rounded]

    def _count(self, entries: Sequence[dict[str, Any]]) -> None:
        invalid = sum("error" in entry for entry in entries)
        self.metrics.images.labels("invalid").inc(invalid)
        self.metrics.images.labels("predicted").inc(len(entries) - invalid)
        for entry in entries:
            if "label" in entry:
                self.metrics.labels.labels(entry["label"]).inc()

    def _log(
        self, log: RequestLog, loaded: LoadedModel, images: Sequence[Received], entries: Sequence[dict[str, Any]]
    ) -> None:
        logged = [
            LogEntry(image, entry["label"], entry["probability"], loaded.version)
            for image, entry in zip(images, entries, strict=True)
            if isinstance(image, bytes) and "label" in entry
        ]
        self.metrics.unlogged.inc(log.add(logged))
