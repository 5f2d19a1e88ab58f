"""The service that reads signs from photos: one page, and an interface for programs."""

import datetime
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from flows.service.follower import Served, Source
from flows.service.serve_admission import Admission, Desk
from flows.service.serve_http import Guard
from flows.service.serve_metrics import Metrics
from flows.service.serve_photo import ACCEPTED, photo_of, refusal
from tasks.errors import ImageError
from tasks.labels import LABELS
from tasks.network.classifier import Classifier, Prediction
from tasks.pictures.images import look
from tasks.pictures.shrink import shrink

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
