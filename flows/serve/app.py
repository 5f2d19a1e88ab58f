"""The HTTP service that classifies photos: its routes, its pages and its metrics."""

import html
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Histogram, Info, generate_latest
from pydantic import BaseModel, Field
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.serve.follower import LoadedModel, ModelSource
from flows.serve.limits import HEADERS, Credentials, Limits
from flows.serve.predict import BODY, Fault, Model, Predictor, Reading, Readings, unusable
from flows.serve.review import Recorder, review_routes
from tasks.data.capture import Captures, DecidedError
from tasks.data.traffic import Traffic
from tasks.errors import BusyError, DataError, HandsignsError, ImageError
from tasks.releases.quality import draw_quality, read_quality
from tasks.services.s3 import MissingObjectError, Storage

_log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page")
PAGES = {"index.html": "/", "review.html": "/review", "docs.html": "/docs"}
MODEL_PAGE = PAGE / "model.html"  # a template
DRAW_SECONDS = 300  # the picture of quality is drawn again after so long, for the drift
SWAGGER = ("swagger-ui-bundle.js", "swagger-ui.css")
PATHS = ("/predict", "/feedback", "/health", "/metrics", "/openapi.json")
METHODS = ("GET", "HEAD", "POST", "DELETE")
REQUESTS = Counter("handsigns_requests", "Requests answered.", ("method", "path", "status"))
SECONDS = Histogram(
    "handsigns_request_seconds", "From a request's headers to the end of its answer.", ("path",)
)
MODEL = Info("handsigns_model", "The model that answers.")


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


def make_app(
    source: ModelSource, limits: Limits, captures: Captures | None, traffic: Traffic
) -> FastAPI:
    """Build the service; without `captures` it keeps no photo."""
    recorder = Recorder(captures, traffic)
    predictor = Predictor(source, recorder)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with recorder:
            yield
        source.stop()

    app = FastAPI(
        title="handsigns",
        description="Classifies photos; by default the sign, 0 to 5, that a hand shows.",
        lifespan=lifespan,
        dependencies=[Depends(limits.check_site)],
        docs_url=None,  # its page loads scripts from other hosts; page/docs.html does not
        redoc_url=None,
    )
    kinds = (AnyHTTPException, RequestValidationError, HandsignsError, ClientDisconnect, Exception)
    for kind in kinds:
        app.add_exception_handler(kind, partial(_answer_fault, limits))
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=limits.max_bytes)
    app.add_middleware(Observer, limits=limits)

    @app.post(
        "/predict",
        responses={code: {"model": Fault} for code in (400, 401, 408, 413, 415, 422, 429, 503)},
        openapi_extra=BODY,
        dependencies=[Depends(limits.check)],
    )
    async def predict(request: Request) -> Reading | Readings:
        """Classify a photo, or each of several."""
        return await predictor.answer(request)

    routes = review_routes(recorder, predictor.read_one, lambda: source.labels)
    app.include_router(routes, dependencies=[Depends(limits.check)])

    @app.head("/health", include_in_schema=False)  # load balancers ask for no more
    @app.get("/health", responses={503: {"model": Health}})
    async def health(credentials: Credentials, response: Response) -> Health:
        """Report which model answers; 503 while there is none."""
        model, problem, age, checked = source.model, source.problem, None, None
        response.status_code = 200 if model else 503
        if problem and not limits.accepts(credentials):
            problem = "The champion cannot be followed; the service's log says why."
        if model and model.promoted_at:
            age = time.time() - datetime.fromisoformat(model.promoted_at).timestamp()
        if source.checked_at:
            checked = datetime.fromtimestamp(source.checked_at, UTC).isoformat(timespec="seconds")
        return Health(
            state="waiting" if model is None else "behind" if problem else "ready",
            model=model and Model.model_validate(model),
            age_seconds=age,
            looked_at=checked,
            problem=problem if model or problem else source.waiting,
            labels=source.labels,
            capture=captures is not None,
        )

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """Metrics for Prometheus."""
        if model := source.model:
            MODEL.info({"version": str(model.version or ""), "release": model.release or ""})
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    _add_pages(app, source, traffic)
    return app


def _add_pages(app: FastAPI, source: ModelSource, traffic: Traffic) -> None:
    """Add what a browser asks for; the quality of all champions shows the drift that was found."""
    drawn: dict[tuple[int, int], bytes] = {}

    @app.get("/model", response_class=HTMLResponse, include_in_schema=False)
    def page() -> str:
        from markdown_it import MarkdownIt

        model, folder, _ = _champion(source)
        card = folder / "model_card.md"
        text = card.read_text("utf-8") if card.is_file() else ""
        shown = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
        template = MODEL_PAGE.read_text("utf-8")
        return template.format(description=html.escape(model.description), card=shown)

    @app.get("/model/quality.png", response_class=Response, include_in_schema=False)
    def picture() -> Response:
        model, _, storage = _champion(source)
        key = len(model.moves), int(time.time() / DRAW_SECONDS)
        if key not in drawn:
            with TemporaryDirectory() as folder:
                file = Path(folder) / "quality.png"
                draw_quality(*read_quality(storage, model.moves, traffic.store), file)
                drawn.clear()
                drawn[key] = file.read_bytes()
        return Response(drawn[key], media_type="image/png")

    async def send(file: Path, _: Request) -> Response:
        return FileResponse(file)

    # A route each: a mounted folder would answer GET /predict with 404 instead of 405.
    resources = Path(str(files("fastapi_swagger"))) / "resources"
    pages = {path.relative_to(PAGE).as_posix(): path for path in PAGE.rglob("*.*")}
    pages |= {name: resources / name for name in SWAGGER}
    for name in pages.keys() - {MODEL_PAGE.name}:
        app.add_route(PAGES.get(name, f"/{name}"), partial(send, pages[name]))


def _champion(source: ModelSource) -> tuple[LoadedModel, Path, Storage]:
    model, storage = source.model, source.storage
    if model is None or model.folder is None or storage is None:
        other = model.description if model else source.waiting
        raise HTTPException(404, f"No champion answers: {other}")
    return model, model.folder, storage


class Observer:
    """Middleware that counts and times requests, and adds `HEADERS` to the answers.

    Plain ASGI: `@app.middleware` costs a task and two queues for each request.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; startup and shutdown pass through."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request, began, status = Request(scope), time.perf_counter(), 500
        # Unknown paths and methods share one label each.
        path = request.url.path if request.url.path in PATHS else "page"
        method = request.method if request.method in METHODS else "other"

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status, headers = message["status"], MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        # Starlette's limit would answer a body that announces its size in plain text.
        answer: ASGIApp = self.app
        if int(request.headers.get("Content-Length", "0")) > self.limits.max_bytes:
            answer = await _answer_fault(self.limits, request, AnyHTTPException(413))
        try:
            await answer(scope, receive, send_with_headers)
        finally:
            REQUESTS.labels(method, path, status).inc()
            SECONDS.labels(path).observe(time.perf_counter() - began)


async def _answer_fault(limits: Limits, request: Request, error: Exception) -> Response:
    """Answer with the reason in JSON, whatever failed."""
    status, reason = 500, "The service failed; its log says why."
    match error:
        case AnyHTTPException(status_code=413):
            status, reason = 413, f"The request is larger than {limits.max_bytes // 2**20} MB."
        case AnyHTTPException():
            status, reason = error.status_code, str(error.detail)
        case RequestValidationError():
            first = error.errors()[0]
            status, reason = 422, f"{first['loc'][-1]}: {first['msg']}."
        case ClientDisconnect():
            status, reason = 400, "The request ended before its body did."
        case ImageError():
            kinds = {"not an image": 415, "too large": 413}
            status, reason = kinds.get(error.reason.partition(":")[0], 422), unusable(error)
        case MissingObjectError():
            status, reason = 404, str(error)
        case HandsignsError():
            refused = isinstance(error, (DecidedError, DataError, BusyError))
            status, reason = 409 if refused else 503, str(error)
        case _:
            _log.error("%s %s failed.", request.method, request.url.path, exc_info=error)
    headers = {**HEADERS, **(getattr(error, "headers", None) or {})}
    return JSONResponse({"error": reason}, status, headers)
