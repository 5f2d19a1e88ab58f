"""The HTTP service that reads signs."""

import asyncio
import base64
import binascii
import datetime
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from pydantic import BaseModel, Field
from starlette.datastructures import MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.serve.follower import Served, Source
from flows.serve.limits import Admission, Desk
from tasks.data.images import look, shrink
from tasks.errors import ImageError
from tasks.model.inference import Classifier, Prediction
from tasks.params import LABELS

SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
LINGER_SECONDS = 2.0
"""How long an answer that comes before the end of the body waits for that end."""

Observe = Callable[[str, str, int, float], None]
"""Told method, path, status and seconds of each request."""


class Guard:
    """Outermost layer of the service.

    Bodies are refused by their declared length before a byte is read, and otherwise at
    the byte that is too much. An answer that comes earlier than the body's end is sent
    whole and lets the sender finish for a moment: cut off, many would never read it.

    Args:
        app: what answers.
        max_bytes: of a body.
        observe: told of every request.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, observe: Observe) -> None:
        self._app, self._max, self._observe = app, max_bytes, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        exchange = _Exchange(scope, receive, send, self._max)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        finally:
            spent = time.perf_counter() - began
            self._observe(scope["method"], scope["path"], exchange.status, spent)


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_bytes: int) -> None:
        headers = dict(scope["headers"])
        self._receive, self._send, self._max = receive, send, max_bytes
        self._declared = int(headers.get(b"content-length", b"0"))
        self._unread = self._declared > 0 or b"transfer-encoding" in headers
        self._received = 0
        self.status = 500

    async def receive(self) -> Message:
        self._refuse_above(self._declared)
        message = await self._receive()
        self._received += len(message.get("body", b""))
        self._unread = bool(message.get("more_body", False))
        self._refuse_above(self._received)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY.items():
                headers[name] = value
            headers.setdefault("Cache-Control", "no-store")
            if self._unread:
                headers["Connection"] = "close"
            await self._send(message)
        elif self._unread and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._linger()
            await self._send({"type": "http.response.body", "body": b""})
        else:
            await self._send(message)

    def _refuse_above(self, size: int) -> None:
        if size > self._max:
            raise HTTPException(
                413, f"The request is too large: more than {self._max // 2**20} MB. Send less."
            )

    async def _linger(self) -> None:
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while self._unread and self._received <= 2 * self._max:
                    message = await self._receive()
                    self._received += len(message.get("body", b""))
                    self._unread = bool(message.get("more_body", False))
        except TimeoutError:
            pass


BODY_SECONDS = 30.0
ACCEPTED = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["file"],
            "properties": {"file": {"type": "string", "format": "binary"}},
        }
    },
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["image"],
            "additionalProperties": False,
            "properties": {"image": {"type": "string", "contentEncoding": "base64"}},
        }
    },
}
"""The two forms of a question, as OpenAPI puts it."""


async def photo_of(request: Request) -> bytes:
    """Read the photo from a form or from JSON.

    Raises:
        HTTPException: 400, 408, 413, 415 or 422, with the reason.
    """
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    readers = {"multipart/form-data": _from_form, "application/json": _from_json}
    if kind not in readers:
        raise HTTPException(
            415,
            "A photo comes as multipart/form-data in the field 'file', or as application/json "
            f"with its bytes in base64 as 'image'. Received: {kind[:80]!r}.",
        )
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await readers[kind](request)
    except TimeoutError:
        raise HTTPException(408, f"The request took longer than {BODY_SECONDS:.0f} s.") from None


def refusal(error: ImageError) -> HTTPException:
    """Return the answer to a file that is not a usable photo."""
    kind = error.reason.partition(":")[0]
    status = {"not an image": 415, "too large": 413}.get(kind, 422)
    return HTTPException(status, f"This is not a usable photo: {error.reason}.")


async def _from_form(request: Request) -> bytes:
    async with request.form(max_files=1, max_fields=4) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise HTTPException(400, "The form has no photo. Put one into its field 'file'.")
        return await file.read()


async def _from_json(request: Request) -> bytes:
    try:
        content: Any = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise HTTPException(400, "The body is not JSON.") from None
    if not isinstance(content, dict) or set(content) != {"image"}:
        raise HTTPException(422, 'The JSON must be {"image": "…"} and nothing else.')
    try:
        return base64.b64decode(content["image"], validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise HTTPException(422, "The value of 'image' is not base64.") from None


BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
NAMED = ("/predict", "/health", "/metrics", "/openapi.json")
METHODS = ("GET", "HEAD", "POST")


class Metrics:
    """Counters of one service, in a registry of its own.

    Args:
        source: what is served.
    """

    def __init__(self, source: Source) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._registry.register(_OfTheModel(source))
        self._requests = Counter(
            "handsigns_requests",
            "Requests answered.",
            ("method", "path", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "handsigns_request_seconds",
            "From a request's headers to the end of its answer.",
            ("path",),
            buckets=BUCKETS,
            registry=self._registry,
        )
        self._predictions = Counter(
            "handsigns_predictions", "Photos read, by sign.", ("label",), registry=self._registry
        )

    def observe(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count one request; paths and methods that nobody planned share one name."""
        path = path if path in NAMED else "page"
        self._requests.labels(method if method in METHODS else "other", path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def predicted(self, label: str) -> None:
        """Count one prediction."""
        self._predictions.labels(label).inc()

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self._registry)


class _OfTheModel(Collector):
    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        served = self._source.served
        info = GaugeMetricFamily(
            "handsigns_model_info", "The model that answers.", labels=("version", "release")
        )
        if served:
            info.add_metric((str(served.version or ""), served.release or ""), 1)
        yield info
        yield GaugeMetricFamily(
            "handsigns_follow_problem",
            "1 while the served model is not the champion, or not known to be.",
            value=int(self._source.problem is not None),
        )
        yield GaugeMetricFamily(
            "handsigns_follow_timestamp_seconds",
            "When the champion was last looked at.",
            value=self._source.looked_at or 0,
        )
        failures = CounterMetricFamily(
            "handsigns_follow_failures", "Looks at the champion that failed.", labels=("kind",)
        )
        for kind, count in self._source.failures.items():
            failures.add_metric((kind,), count)
        yield failures


log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page")
EXAMPLES = 21
"""Seed of the rendered examples; another one than that of the sample data set."""


class Model(BaseModel):
    """What answers."""

    told: str = Field(description="What it is, in words.")
    version: int | None = Field(description="Of a champion: its number in the registry.")
    release: str | None = Field(description="Of a champion: its verified release.")
    promoted_at: str | None = Field(description="When it became champion, ISO 8601.")


class Reading(BaseModel):
    """What was read from a photo."""

    label: Literal["0", "1", "2", "3", "4", "5"]
    probabilities: dict[str, float] = Field(description="Of each sign; they add up to one.")
    model: Model


class Health(BaseModel):
    """Whether the service answers, and with what."""

    state: Literal["ready", "behind", "waiting"] = Field(
        description="behind: it answers, but not with the champion, or nobody knows; "
        "waiting: there is no model to answer with."
    )
    model: Model | None
    age_seconds: float | None = Field(description="Since the model became champion.")
    looked_at: str | None = Field(description="When the champion was last looked at.")
    problem: str | None


class Fault(BaseModel):
    """Why a request was refused."""

    error: str


@dataclass(frozen=True)
class Options:
    """How the service treats its clients.

    Args:
        rate: such as `600/minute`, for each client.
        max_bytes: of a request's body.
        token: asked of every client that wants a prediction; None for none.
    """

    rate: str = "600/minute"
    max_bytes: int = 10 * 2**20
    token: str | None = None


def make_app(source: Source, options: Options) -> ASGIApp:
    """Build the service.

    Args:
        source: what answers.
        options: how clients are treated.

    Returns:
        The application; it starts and stops nothing.
    """
    desk, metrics = Desk(), Metrics(source)
    admission = Admission(options.rate, options.token)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        desk.close()

    app = FastAPI(
        title="handsigns",
        description="Reads a sign, 0 to 5, from a photo of a hand.",
        lifespan=lifespan,
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
    )
    _add_faults(app)

    @app.post(
        "/predict",
        response_model=Reading,
        responses={code: {"model": Fault} for code in (400, 401, 408, 413, 415, 422, 429, 503)},
        openapi_extra={"requestBody": {"required": True, "content": ACCEPTED}},
        dependencies=[Depends(admission.check)],
    )
    async def predict(request: Request) -> Reading:
        """Read the sign in one photo."""
        if source.served is None:
            raise HTTPException(503, _waiting(source), {"Retry-After": "10"})
        content = await photo_of(request)
        served = source.served
        found = await desk.run(partial(_score, served.classifier, content))
        metrics.predicted(str(found.label))
        return Reading(**found.to_json(), model=_model(served))

    @app.head("/health", include_in_schema=False)  # load balancers ask for no more
    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health(request: Request, response: Response) -> Health:
        """Tell what is served; 503 while there is no model to answer with."""
        told = _health(source, detailed=admission.knows(request))
        response.status_code = 503 if told.state == "waiting" else 200
        return told

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/examples/{label}.png", response_class=Response, include_in_schema=False)
    def example(label: str) -> Response:
        """A rendered hand, no photograph."""
        if label not in LABELS:
            raise HTTPException(404)
        return Response(
            _example(int(label)), media_type="image/png", headers={"Cache-Control": "max-age=3600"}
        )

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return Guard(app, options.max_bytes, metrics.observe)


def _score(classifier: Classifier, content: bytes) -> Prediction:
    try:
        photo = shrink(look(content), classifier.detail)
    except ImageError as error:
        raise refusal(error) from None
    (row,) = classifier.probabilities(photo[np.newaxis]).tolist()
    return Prediction(Path("photo"), tuple(row))


def _model(served: Served) -> Model:
    return Model(
        told=served.told,
        version=served.version,
        release=served.release,
        promoted_at=served.promoted_at,
    )


def _waiting(source: Source) -> str:
    return source.problem or "There is no champion yet. Once one is promoted, it answers here."


def _health(source: Source, detailed: bool) -> Health:
    served, problem = source.served, source.problem
    if problem and not detailed:
        problem = "The champion cannot be followed; the service's log says why."
    state: Literal["ready", "behind", "waiting"] = "behind" if problem else "ready"
    looked_at = source.looked_at and datetime.datetime.fromtimestamp(
        source.looked_at, datetime.UTC
    ).isoformat(timespec="seconds")
    return Health(
        state=state if served else "waiting",
        model=_model(served) if served else None,
        age_seconds=_age(served),
        looked_at=looked_at or None,
        problem=problem if served or problem else _waiting(source),
    )


def _age(served: Served | None) -> float | None:
    if served is None or not served.promoted_at:
        return None
    try:
        at = datetime.datetime.fromisoformat(served.promoted_at)
    except ValueError:
        return None
    return round((datetime.datetime.now(datetime.UTC) - at).total_seconds(), 1)


@lru_cache(maxsize=len(LABELS))
def _example(label: int) -> bytes:
    from tasks.rendering.sample import draw, encode

    return encode(draw((EXAMPLES, label, 0)))


def _add_faults(app: FastAPI) -> None:
    """Let every refusal be JSON with the reason as `error`."""

    async def refused(_: Request, error: Any) -> Response:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    async def gone(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": "The request ended before its body did."}, 400)

    async def broken(request: Request, error: Exception) -> Response:
        log.error("%s %s failed.", request.method, request.url.path, exc_info=error)
        return JSONResponse({"error": "The service failed; its log says why."}, 500)

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, broken)
