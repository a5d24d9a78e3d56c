"""The web server's interface: its addresses, their arguments and their errors."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import importlib.metadata
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import APIKeyHeader
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, Field

from convoy.serving import payload
from convoy.serving.payload import Received, RequestError
from convoy.serving.service import Limits, Service

PAGE = Path(__file__).with_name("page.html")
# A body of more bytes is parsed in a thread, as base64 and JSON take 1 ms for each 300 KB.
THREAD_BYTES = 512 << 10
API_KEY_HEADER = "X-API-Key"
# The HTTP statuses of requests that are refused.
REFUSALS = (401, 408, 413, 415, 422, 503)


class Prediction(BaseModel):
    """The entry of an image that could be read."""

    label: str = Field(description="the most probable class")
    probability: float = Field(description="its probability, in [0, 1]")
    probabilities: dict[str, float] = Field(description="by class, the highest first")
    heatmap: dict[str, Any] | None = Field(None, description="where the network looked, if asked for")


class ImageError(BaseModel):
    """The entry of an image that could not be read."""

    error: str = Field(description="why")
    position: int = Field(description="position of the image in the request, from 0")


class Answer(BaseModel):
    """The answer to a request for predictions: one entry per image, in their order."""

    model: str
    version: str
    milliseconds: float = Field(description="time to decode and predict the images")
    predictions: list[Prediction | ImageError]


class Refusal(BaseModel):
    """The answer to a request that is refused."""

    error: str = Field(description="what is wrong and how to fix it")


class ByteBudget:
    """The bytes that all requests' bodies may have in memory; a request waits until there is room for its own."""

    def __init__(self, total: int) -> None:
        self._free = self._total = total
        self._waiting = 0
        self._condition = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def reserve(self, count: int) -> AsyncIterator[None]:
        """Reserve bytes within the context."""
        count = min(count, self._total)
        if self._free < count:
            self._waiting += 1
            try:
                async with self._condition:
                    await self._condition.wait_for(lambda: self._free >= count)
            finally:
                self._waiting -= 1
        self._free -= count
        try:
            yield
        finally:
            self._free += count
            if self._waiting:
                async with self._condition:
                    self._condition.notify_all()


def create_app(service: Service, api_key: str | None = None) -> FastAPI:
    """Create the web application.

    Args:
        service: The service that predicts.
        api_key: The key that requests must have; None if none is needed.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    scheme = APIKeyHeader(name=API_KEY_HEADER, auto_error=False, description="or Authorization: Bearer KEY")

    async def check_key(request: Request, key: Annotated[str | None, Security(scheme)]) -> None:
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not any(hmac.compare_digest(given.encode(), (api_key or "").encode()) for given in (key or "", bearer)):
            raise RequestError(401, f"the API key is missing or wrong: send it in the header {API_KEY_HEADER}")

    protected = [Depends(check_key)] if api_key else []
    # The page /docs of FastAPI itself loads its scripts from the web.
    app = FastAPIOffline(
        redoc_url=None,
        title="convoy",
        version=_version(),
        lifespan=lifespan,
        description="Predict classes of images.",
    )
    budget = ByteBudget(service.limits.max_bytes_in_memory)
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": Refusal} for status in (401, 408, 413, 415, 422, 503)
    }

    @app.exception_handler(RequestError)
    async def refuse(_request: Request, error: RequestError) -> JSONResponse:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(error.status)
        return JSONResponse({"error": error.reason}, error.status, headers)

    # FastAPI's own errors repeat the argument.
    @app.exception_handler(RequestValidationError)
    async def refuse_arguments(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse({"error": "an argument in the address is not valid: see /docs"}, 422)

    @app.post(
        "/predict",
        dependencies=protected,
        response_model=None,
        responses={200: {"model": Answer}, **refusals},
        openapi_extra=payload.describe_body(),
        summary="Predict the classes of images",
    )
    async def predict(
        request: Request,
        top_k: Annotated[int | None, Query(ge=1, description="number of classes in an answer; all by default")] = None,
        heatmap: Annotated[bool, Query(description="whether to say where the network looked")] = False,
    ) -> Response:
        """Predict the class of each image of a request. An empty list of images gives an empty list of predictions."""
        metrics, limits = service.metrics, service.limits
        began = time.perf_counter()
        status = 500
        try:
            service.active += 1
            if service.active > limits.max_requests:
                raise RequestError(503, "too many requests at the same time: try again")
            expected = _declared_length(request, limits)
            async with budget.reserve(expected):
                images = await _read_images(request, limits)
                answer = await service.predict(images, top_k, heatmap=heatmap)
            status = 200
            content = json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode()
            return Response(content, media_type="application/json")
        except RequestError as error:
            status = error.status
            raise
        finally:
            service.active -= 1
            metrics.requests.labels(status).inc()
            metrics.seconds.observe(time.perf_counter() - began)

    @app.get("/health", summary="Whether the server runs")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether a model is loaded", responses={503: {"description": "no model is loaded"}})
    async def ready() -> JSONResponse:
        current = service.deployment.current
        state = {"status": "ready" if current else "no model is loaded yet"}
        if current:
            state |= {"model": current.name, "version": current.version}
        return JSONResponse(state, 200 if current else 503)

    @app.get("/model", dependencies=protected, summary="The model that is served", responses=refusals)
    async def model() -> dict[str, Any]:
        about = service.loaded().describe()
        return about | {"asked_for": service.deployment.uri, "error": service.deployment.error or None}

    @app.get("/metrics", dependencies=protected, summary="Metrics for Prometheus", response_class=Response)
    async def metrics() -> Response:
        text = service.render_metrics()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    page, policy = _read_page()

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    return app


def _version() -> str:
    try:
        return importlib.metadata.version("convoy")
    # A package contains the code without its metadata.
    except importlib.metadata.PackageNotFoundError:
        return "packaged"


def _declared_length(request: Request, limits: Limits) -> int:
    """Return the number of bytes that a request says to have, or the most that it may have.

    Raises:
        RequestError: If it says to have too many.
    """
    declared = request.headers.get("Content-Length")
    if declared is None or not declared.isdigit():
        return limits.max_bytes
    if int(declared) > limits.max_bytes:
        raise _too_large(limits)
    return int(declared)


def _too_large(limits: Limits) -> RequestError:
    return RequestError(413, f"more than {limits.max_bytes >> 20} MiB: send the images in several requests")


async def _read_images(request: Request, limits: Limits) -> list[Received]:
    """Read the images of a request, whose body may be larger than it says."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > limits.max_bytes:
                    raise _too_large(limits)
    except TimeoutError:
        raise RequestError(408, f"the request was not sent within {limits.body_timeout_s:g} seconds") from None
    kind, body = request.headers.get("Content-Type", ""), b"".join(parts)
    parts.clear()
    if size > THREAD_BYTES:
        return await asyncio.to_thread(payload.parse_images, kind, body, limits.max_images)
    return payload.parse_images(kind, body, limits.max_images)


def _read_page() -> tuple[str, str]:
    """Return the page and its security policy, which allows only its own style and script, and this server."""
    page = PAGE.read_text(encoding="utf-8")
    hashes = {}
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    sources = " ".join(f"{tag}-src 'sha256-{digest}';" for tag, digest in hashes.items())
    policy = f"default-src 'none'; {sources} img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'"
    return page, f"{policy}; form-action 'none'; frame-ancestors 'none'"
