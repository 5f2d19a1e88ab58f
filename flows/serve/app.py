"""The HTTP service that classifies photos."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field, computed_field
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import ClientDisconnect

from flows.serve.follower import LoadedModel, ModelSource
from flows.serve.limits import Admission, Credentials, Limits, ScoringPool
from flows.serve.metrics import Metrics
from flows.serve.review import Recorder, explain, review_routes
from flows.serve.uploads import BODY, read_upload
from tasks.data.capture import Captures
from tasks.data.images import decode, is_large, resize
from tasks.data.traffic import Traffic
from tasks.errors import HandsignsError, ImageError
from tasks.model.inference import Classifier, Prediction

_log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page")
PAGES = {"index.html": "/", "review.html": "/review"}
EXAMPLE_SEED = 21
"""Seed of the rendered examples; not the seed of the sample data set."""
SAVE_SECONDS = 60.0
"""Between two writes of the counts for the drift monitor."""


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


class Fault(BaseModel):
    """Why a request, or one of several photos, was refused."""

    error: str


class Reading(BaseModel):
    """What was read from a photo."""

    label: str = Field(description="The most probable one.")
    certain: bool = Field(description="False where the photo may show none of them clearly.")
    probabilities: dict[str, float] = Field(description="Of each label; they add up to one.")
    model: Model


class Readings(BaseModel):
    """What was read from several photos, in their order."""

    readings: list[Reading | Fault]


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
    labels: tuple[str, ...] = Field(description="What photos may be classified as, in order.")
    capture: bool = Field(description="Whether photos may be kept to learn from them.")


@dataclass(frozen=True)
class Reader:
    """Reads the photos of a request with the model that answers at the time."""

    source: ModelSource
    pool: ScoringPool
    metrics: Metrics
    recorder: Recorder
    traffic: Traffic | None

    async def answer(self, request: Request) -> Reading | Readings:
        """Read one photo or several, and keep those that may be learned from."""
        async with self._model() as model:
            photos, keep = await read_upload(request), self.recorder.may_keep(request)
            if isinstance(photos, bytes):
                return await self._read(photos, model, keep)
            readings = (self._read_or_refuse(photo, model, keep) for photo in photos)
            return Readings(readings=await asyncio.gather(*readings))

    async def read_one(self, request: Request) -> tuple[bytes, Reading]:
        """Read one photo; the photo as it came, and what was read."""
        async with self._model() as model:
            photo = await read_upload(request)
            if not isinstance(photo, bytes):
                raise HTTPException(400, "Send one photo at a time.")
            return photo, await self._read(photo, model, keep=False)

    @asynccontextmanager
    async def _model(self) -> AsyncIterator[LoadedModel]:
        if self.source.model is None:
            raise HTTPException(503, _waiting(self.source), {"Retry-After": "10"})
        async with self.pool.place():
            yield self.source.model

    async def _read(self, photo: bytes, model: LoadedModel, keep: bool) -> Reading:
        large = await self.pool.run(partial(is_large, photo))
        found = await self.pool.run(partial(_score, model.classifier, photo), large)
        self.metrics.predictions.labels(str(found.label)).inc()
        reading = Reading(**found.to_json(), model=Model.model_validate(model))
        if self.traffic and model.release:
            self.traffic.add(model.release, reading.label, max(reading.probabilities.values()))
        if keep:
            self.recorder.offer(photo, reading)
        return reading

    async def _read_or_refuse(
        self, photo: bytes, model: LoadedModel, keep: bool
    ) -> Reading | Fault:
        try:
            return await self._read(photo, model, keep)
        except ImageError as error:
            return Fault(error=_unusable(error))


def make_app(
    source: ModelSource,
    limits: Limits,
    captures: Captures | None = None,
    traffic: Traffic | None = None,
) -> FastAPI:
    """Build the service; it starts and stops nothing.

    Without `captures` it keeps no photo, and without `traffic` no counts for the monitor.
    """
    pool, metrics, admission = ScoringPool(), Metrics(source), Admission(limits)
    recorder = Recorder(captures, metrics.captured)
    reader = Reader(source, pool, metrics, recorder, traffic)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with recorder:
            saving = asyncio.create_task(_save_traffic(traffic, metrics)) if traffic else None
            yield
        if traffic and saving:
            saving.cancel()
            await asyncio.to_thread(_save, traffic)
        pool.close()

    app = FastAPI(
        title="handsigns",
        description="Classifies photos; by default the sign, 0 to 5, that a hand shows.",
        lifespan=lifespan,
        dependencies=[Depends(admission.check_site)],
        docs_url=None,  # its pages load scripts from other hosts
        redoc_url=None,
    )
    _answer_faults_as_json(app, limits)
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=limits.max_bytes)
    app.middleware("http")(partial(_observe, metrics, limits))

    @app.post(
        "/predict",
        responses={code: {"model": Fault} for code in (400, 401, 408, 413, 415, 422, 429, 503)},
        openapi_extra=BODY,
        dependencies=[Depends(admission.check)],
    )
    async def predict(request: Request) -> Reading | Readings:
        """Classify a photo, or each of several."""
        return await reader.answer(request)

    routes = review_routes(recorder, reader.read_one, BODY, lambda: _labels(source))
    app.include_router(routes, dependencies=[Depends(admission.check)])

    @app.head("/health", include_in_schema=False)  # load balancers ask for no more
    @app.get("/health", responses={503: {"model": Health}})
    async def health(credentials: Credentials, response: Response) -> Health:
        """Report which model answers; 503 while there is none."""
        report = _health(source, admission.accepts(credentials), captures is not None)
        response.status_code = 503 if report.state == "waiting" else 200
        return report

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/examples/{label}.png", response_class=Response, include_in_schema=False)
    def example(label: str) -> Response:
        """A rendered hand, not a photograph."""
        from tasks.synthetic import SIGNS

        if label not in SIGNS:
            raise HTTPException(404)
        return Response(_example(int(label)), media_type="image/png")

    _serve_page(app)
    return app


async def _save_traffic(traffic: Traffic, metrics: Metrics) -> None:
    """Save the counts every minute, and show what the monitor found."""
    while True:
        await asyncio.sleep(SAVE_SECONDS)
        metrics.show_drift(await asyncio.to_thread(_save, traffic))


def _save(traffic: Traffic) -> dict[str, float]:
    try:
        traffic.save()
        return traffic.drift()
    except (HandsignsError, OSError, ValueError) as error:  # predictions must go on
        _log.warning("The counts for the drift monitor are not saved: %s", error)
        return {}


async def _observe(
    metrics: Metrics,
    limits: Limits,
    request: Request,
    answer: Callable[[Request], Awaitable[Response]],
) -> Response:
    began, status = time.perf_counter(), 500
    try:
        # Starlette's limit would answer a body that announces its size in plain text.
        if int(request.headers.get("Content-Length", "0")) > limits.max_bytes:
            response = _too_large(limits)
        else:
            response = await answer(request)
        status = response.status_code
    finally:
        seconds = time.perf_counter() - began
        metrics.observe(request.method, request.url.path, status, seconds)
    return response


def _serve_page(app: FastAPI) -> None:
    async def send(file: Path, _: Request) -> Response:
        return FileResponse(file)

    # A route each: a mounted folder would answer GET /predict with 404 instead of 405.
    for file in PAGE.iterdir():
        path = PAGES.get(file.name, f"/{file.name}")
        app.add_route(path, partial(send, file))


def _score(classifier: Classifier, content: bytes) -> Prediction:
    params = classifier.preprocess
    photo = resize(decode(content, min_side=4 * params.image_size), params)
    (row,) = classifier.probabilities(photo[np.newaxis]).tolist()
    return classifier.prediction(Path("photo"), row)


def _waiting(source: ModelSource) -> str:
    return source.problem or "There is no champion yet. Once one is promoted, it answers here."


def _health(source: ModelSource, detailed: bool, capture: bool) -> Health:
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
        labels=_labels(source),
        capture=capture,
    )


def _labels(source: ModelSource) -> tuple[str, ...]:
    return source.model.classifier.labels if source.model else ()


def _age(model: LoadedModel | None) -> float | None:
    try:
        promoted = datetime.fromisoformat(model.promoted_at or "") if model else None
    except ValueError:
        promoted = None
    return round((datetime.now(UTC) - promoted).total_seconds(), 1) if promoted else None


@lru_cache(maxsize=16)
def _example(label: int) -> bytes:
    from tasks.rendering.scene import draw
    from tasks.synthetic import encode

    return encode(draw((EXAMPLE_SEED, label, 0)))


def _too_large(limits: Limits) -> Response:
    reason = f"The request is larger than {limits.max_bytes // 2**20} MB. Send less."
    return JSONResponse({"error": reason}, 413)


def _unusable(error: ImageError) -> str:
    return f"This is not a usable photo: {error.reason.partition(' (')[0]}."


def _answer_faults_as_json(app: FastAPI, limits: Limits) -> None:
    async def refused(_: Request, error: Any) -> Response:
        if error.status_code == 413:
            return _too_large(limits)
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    async def unusable(_: Request, error: Any) -> Response:
        status = {"not an image": 415, "too large": 413}.get(error.reason.partition(":")[0], 422)
        return JSONResponse({"error": _unusable(error)}, status)

    async def invalid(_: Request, error: Any) -> Response:
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]}: {first['msg']}."}, 422)

    async def gone(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": "The request ended before its body did."}, 400)

    async def broken(request: Request, error: Exception) -> Response:
        _log.error("%s %s failed.", request.method, request.url.path, exc_info=error)
        return JSONResponse({"error": "The service failed; its log says why."}, 500)

    app.add_exception_handler(AnyHTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ImageError, unusable)
    app.add_exception_handler(HandsignsError, explain)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, broken)
