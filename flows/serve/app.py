"""The HTTP service that reads signs."""

import asyncio
import base64
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from pydantic import BaseModel, ConfigDict, Field, computed_field
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import ClientDisconnect

from flows.serve.follower import LoadedModel, ModelSource
from flows.serve.limits import Admission, Credentials, Limits, ScoringPool
from tasks.data.images import decode, is_large, resize
from tasks.errors import ImageError
from tasks.model.inference import Classifier, Prediction
from tasks.params import LABELS

_log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page")
BODY_SECONDS = 30.0
EXAMPLE_SEED = 21
"""Seed of the rendered examples; not the seed of the sample data set."""
BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
PATHS = ("/predict", "/health", "/metrics", "/openapi.json")
METHODS = ("GET", "HEAD", "POST")


class Model(BaseModel):
    """The model that answers."""

    model_config = ConfigDict(from_attributes=True)

    description: str = Field(description="What it is, in words.")
    version: int | None = Field(description="Of a champion: its number in the registry.")
    release: str | None = Field(description="Of a champion: its verified release.")
    promoted_at: str | None = Field(description="When it became champion, ISO 8601.")

    @computed_field(deprecated=True)  # type: ignore[prop-decorator]
    @property
    def told(self) -> str:
        """The description under its old name."""
        return self.description


class Reading(BaseModel):
    """What was read from a photo."""

    label: Literal["0", "1", "2", "3", "4", "5"]
    probabilities: dict[str, float] = Field(description="Of each sign; they add up to one.")
    model: Model


class Health(BaseModel):
    """Whether the service answers, and with which model."""

    state: Literal["ready", "behind", "waiting"] = Field(
        description="behind: it answers, but not with the champion, or that is unknown; "
        "waiting: there is no model yet."
    )
    model: Model | None
    age_seconds: float | None = Field(description="Since the model became champion.")
    looked_at: str | None = Field(description="When the champion was last checked.")
    problem: str | None


class Fault(BaseModel):
    """Why a request was refused."""

    error: str


class JsonPhoto(BaseModel):
    """A photo in base64, alone or as a data URL."""

    model_config = ConfigDict(extra="forbid")

    image: str


_PHOTO = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "required": ["file"], "properties": {"file": _PHOTO}}
ACCEPTED: dict[str, Any] = {
    "multipart/form-data": {"schema": _FORM},
    "application/json": {"schema": JsonPhoto.model_json_schema()},
    "image/*": {"schema": _PHOTO},
}
"""The forms of a request, as OpenAPI puts them."""


class Metrics:
    """Prometheus metrics of one service, in a registry of its own."""

    def __init__(self, source: ModelSource) -> None:
        self._source, self._registry = source, CollectorRegistry()
        known: Any = {"registry": self._registry}
        ProcessCollector(**known)
        PlatformCollector(**known)
        labels = ("method", "path", "status")
        self._requests = Counter("handsigns_requests", "Requests answered.", labels, **known)
        about = "From a request's headers to the start of its answer."
        self._seconds = Histogram(
            "handsigns_request_seconds", about, ("path",), buckets=BUCKETS, **known
        )
        about = "Photos read, by sign."
        self.predictions = Counter("handsigns_predictions", about, ("label",), **known)
        self._model = Info("handsigns_model", "The model that answers.", **known)
        about = "1 while the loaded model is not the champion, or that is unknown."
        behind = Gauge("handsigns_follow_problem", about, **known)
        behind.set_function(lambda: bool(source.problem))
        about = "When the champion pointer was last read."
        checked = Gauge("handsigns_follow_timestamp_seconds", about, **known)
        checked.set_function(lambda: source.checked_at or 0)
        self._registry.register(source.failures)

    def observe(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count one request; unknown paths and methods share one label each."""
        path = path if path in PATHS else "page"
        self._requests.labels(method if method in METHODS else "other", path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        if model := self._source.model:
            self._model.info({"version": str(model.version or ""), "release": model.release or ""})
        return generate_latest(self._registry)


def make_app(source: ModelSource, limits: Limits) -> FastAPI:
    """Build the service; it starts and stops nothing."""
    pool, metrics, admission = ScoringPool(), Metrics(source), Admission(limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        pool.close()

    app = FastAPI(
        title="handsigns",
        description="Reads a sign, 0 to 5, from a photo of a hand.",
        lifespan=lifespan,
        dependencies=[Depends(admission.check_site)],
        docs_url=None,  # its pages load scripts from other hosts
        redoc_url=None,
    )
    _answer_faults_as_json(app, limits)
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=limits.max_bytes)

    @app.middleware("http")
    async def observe(request: Request, ask: Callable[[Request], Awaitable[Response]]) -> Response:
        began, status = time.perf_counter(), 500
        try:
            # Starlette's limit answers a body that says its size in plain text.
            if int(request.headers.get("Content-Length", "0")) > limits.max_bytes:
                response: Response = _too_large(limits)
            else:
                response = await ask(request)
            status = response.status_code
        finally:
            seconds = time.perf_counter() - began
            metrics.observe(request.method, request.url.path, status, seconds)
        return response

    @app.post(
        "/predict",
        responses={code: {"model": Fault} for code in (400, 401, 408, 413, 415, 422, 429, 503)},
        openapi_extra={"requestBody": {"required": True, "content": ACCEPTED}},
        dependencies=[Depends(admission.check)],
    )
    async def predict(request: Request) -> Reading:
        """Read the sign in one photo."""
        if source.model is None:
            raise HTTPException(503, _waiting(source), {"Retry-After": "10"})
        async with pool.place():
            content = await read_upload(request)
            model = source.model
            large = await pool.run(partial(is_large, content))
            found = await pool.run(partial(_score, model.classifier, content), large)
        metrics.predictions.labels(str(found.label)).inc()
        return Reading(**found.to_json(), model=Model.model_validate(model))

    @app.head("/health", include_in_schema=False)  # load balancers ask for no more
    @app.get("/health", responses={503: {"model": Health}})
    async def health(credentials: Credentials, response: Response) -> Health:
        """Report which model answers; 503 while there is none."""
        report = _health(source, detailed=admission.accepts(credentials))
        response.status_code = 503 if report.state == "waiting" else 200
        return report

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/examples/{label}.png", response_class=Response, include_in_schema=False)
    def example(label: str) -> Response:
        """A rendered hand, not a photograph."""
        if label not in LABELS:
            raise HTTPException(404)
        return Response(_example(int(label)), media_type="image/png")

    _serve_page(app)
    return app


def _serve_page(app: FastAPI) -> None:
    async def send(file: Path, _: Request) -> Response:
        return FileResponse(file)

    # A route each: a mounted folder would answer GET /predict with 404 instead of 405.
    for file in PAGE.iterdir():
        path = "/" if file.name == "index.html" else f"/{file.name}"
        app.add_route(path, partial(send, file))


async def read_upload(request: Request) -> bytes:
    """Read the photo from a form, from JSON or from the bare body.

    Raises:
        HTTPException: 400, 408, 413, 415 or 422, with the reason.
    """
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            if kind == "multipart/form-data":
                return await _from_form(request)
            if kind == "application/json":
                return _from_json(await request.body())
            if kind.startswith("image/"):
                return await request.body()
    except TimeoutError:
        raise HTTPException(408, f"The request took longer than {BODY_SECONDS:.0f} s.") from None
    raise HTTPException(
        415,
        f"A photo cannot be sent as {kind[:80]!r}. Send multipart/form-data with the field "
        "'file', application/json with base64 as 'image', or the bytes as image/….",
    )


async def _from_form(request: Request) -> bytes:
    async with request.form(max_files=1, max_fields=4) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise HTTPException(400, "The form has no photo. Put one into its field 'file'.")
        return await file.read()


def _from_json(body: bytes) -> bytes:
    try:
        # Refused before parsing: a million elements would be a million validation errors.
        if body.count(b",") > 1:
            raise ValueError
        encoded = JsonPhoto.model_validate_json(body).image
        return base64.b64decode(encoded.rpartition(";base64,")[2], validate=True)
    except ValueError:
        reason = 'The JSON must be {"image": "…"} with base64, and nothing else.'
        raise HTTPException(422, reason) from None


def _score(classifier: Classifier, content: bytes) -> Prediction:
    params = classifier.preprocess
    photo = resize(decode(content, min_side=4 * params.image_size), params)
    (row,) = classifier.probabilities(photo[np.newaxis]).tolist()
    return Prediction(Path("photo"), tuple(row))


def _waiting(source: ModelSource) -> str:
    return source.problem or "There is no champion yet. Once one is promoted, it answers here."


def _health(source: ModelSource, detailed: bool) -> Health:
    model, problem = source.model, source.problem
    if problem and not detailed:
        problem = "The champion cannot be followed; the service's log says why."
    state: Literal["ready", "behind", "waiting"] = "behind" if problem else "ready"
    checked = source.checked_at and datetime.fromtimestamp(source.checked_at, UTC)
    return Health(
        state=state if model else "waiting",
        model=model and Model.model_validate(model),
        age_seconds=_age(model),
        looked_at=checked.isoformat(timespec="seconds") if checked else None,
        problem=problem if model or problem else _waiting(source),
    )


def _age(model: LoadedModel | None) -> float | None:
    try:
        promoted = datetime.fromisoformat(model.promoted_at or "") if model else None
    except ValueError:
        promoted = None
    return round((datetime.now(UTC) - promoted).total_seconds(), 1) if promoted else None


@lru_cache(maxsize=len(LABELS))
def _example(label: int) -> bytes:
    from tasks.rendering.sample import draw, encode

    return encode(draw((EXAMPLE_SEED, label, 0)))


def _too_large(limits: Limits) -> Response:
    reason = f"The request is larger than {limits.max_bytes // 2**20} MB. Send less."
    return JSONResponse({"error": reason}, 413)


def _answer_faults_as_json(app: FastAPI, limits: Limits) -> None:
    async def refused(_: Request, error: Any) -> Response:
        if error.status_code == 413:
            return _too_large(limits)
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    async def unusable(_: Request, error: Any) -> Response:
        kind, reason = error.reason.partition(":")[0], error.reason.partition(" (")[0]
        status = {"not an image": 415, "too large": 413}.get(kind, 422)
        return JSONResponse({"error": f"This is not a usable photo: {reason}."}, status)

    async def gone(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": "The request ended before its body did."}, 400)

    async def broken(request: Request, error: Exception) -> Response:
        _log.error("%s %s failed.", request.method, request.url.path, exc_info=error)
        return JSONResponse({"error": "The service failed; its log says why."}, 500)

    app.add_exception_handler(AnyHTTPException, refused)
    app.add_exception_handler(ImageError, unusable)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, broken)
