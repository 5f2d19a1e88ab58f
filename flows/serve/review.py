"""Keep photos of predictions in the background, and let people label them."""

import logging
import queue
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from fastapi.responses import JSONResponse, Response
from prometheus_client import Counter
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from flows.local.clients import open_place
from flows.settings import Settings
from tasks.data.capture import (
    ID,
    Capture,
    CaptureRules,
    Captures,
    DecidedError,
)
from tasks.errors import BusyError, DataError
from tasks.project import Project
from tasks.services.s3 import MissingObjectError

if TYPE_CHECKING:
    from flows.serve.app import Reading

_log = logging.getLogger(__name__)

QUEUE = 16
"""Uploads that may wait to be kept; any other one is dropped."""
REST = 39
"""The background thread rests this many times as long as it worked: 2.5 % of a core at most."""
OPT_OUT = "Handsigns-No-Capture"
"""Request header with which a client asks that its photo is not kept."""
NOTHING_KEPT = "This service keeps no photos. Set HANDSIGNS_CAPTURE to a folder or a bucket."

Read = Callable[[Request], Awaitable["tuple[bytes, Reading]"]]
"""Reads the photo of a request."""
Labels = Callable[[], Sequence[str]]
Name = Annotated[str, InPath(pattern=f"^{ID}$")]
Reviewer = Annotated[str, Field(min_length=1, max_length=80)]


class Recorder:
    """Keeps photos in a thread, so that no prediction waits for it or fails because of it.

    Args:
        captures: where; None keeps nothing.
        outcomes: counts what became of a photo: kept, duplicate, full, dropped or failed.
    """

    def __init__(self, captures: Captures | None, outcomes: Counter) -> None:
        self._captures, self._outcomes = captures, outcomes
        self._waiting: queue.Queue[tuple[bytes, Capture]] = queue.Queue(QUEUE)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)

    def __enter__(self) -> None:
        if self._captures:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        """Stop after the photo that is being kept; wait at most 5 s."""
        self._stopping.set()
        if self._captures:
            self._thread.join(5.0)

    @property
    def captures(self) -> Captures:
        """The kept photos; 404 if this service keeps none."""
        if self._captures is None:
            raise HTTPException(404, NOTHING_KEPT)
        return self._captures

    def may_keep(self, request: Request) -> bool:
        """Whether photos are kept, and the client does not opt out."""
        return self._captures is not None and request.headers.get(OPT_OUT, "0") == "0"

    def offer(self, upload: bytes, reading: "Reading") -> None:
        """Keep an uncertain reading and a share of the others."""
        rules = self.captures.rules
        confidence = max(reading.probabilities.values())
        uncertain = confidence < rules.below or not reading.certain
        if not uncertain and random.random() >= rules.share:
            return
        try:
            reason = "uncertain" if uncertain else "sample"
            self._waiting.put_nowait((upload, _capture(reading, reason)))
        except queue.Full:
            self._outcomes.labels("dropped").inc()

    def flag(self, upload: bytes, reading: "Reading", suggestion: str) -> str:
        """Keep what a user says was read wrong; returns what became of it."""
        outcome = self.captures.keep(upload, _capture(reading, "flagged", suggestion))
        self._outcomes.labels(outcome).inc()
        return outcome

    def _run(self) -> None:
        problem = ""
        while not self._stopping.is_set():
            began, waiting = time.thread_time(), None
            try:
                with suppress(queue.Empty):
                    waiting = self._waiting.get(timeout=1.0)
                self.captures.tidy()
                outcome = self.captures.keep(*waiting) if waiting else "idle"
                problem = ""
            except Exception as error:  # a full disk, say: predictions must go on
                outcome = "failed"
                if problem != (problem := f"Photos cannot be kept: {error}"):
                    _log.warning("%s", problem)
            if waiting:
                self._outcomes.labels(outcome).inc()
            self._stopping.wait(REST * (time.thread_time() - began))


def _capture(reading: "Reading", reason: Any, suggestion: str | None = None) -> Capture:
    return Capture(
        time=datetime.now(UTC),
        reason=reason,
        label=reading.label,
        probabilities=reading.probabilities,
        version=reading.model.version,
        release=reading.model.release,
        suggestion=suggestion,
    )


def open_captures(settings: Settings, project: Project) -> Captures | None:
    """Open the place of kept photos and the inbox; None where nothing is kept.

    Raises:
        SettingsError: a bucket is named, but not the S3 service that has it.
        ServiceError: the bucket does not answer.
    """
    if settings.capture is None:
        return None
    rules = CaptureRules(
        settings.capture_below,
        settings.capture_share,
        settings.capture_per_day,
        settings.capture_total,
        settings.capture_days,
    )
    inbox = open_place(settings, settings.inbox) if settings.inbox else None
    return Captures(open_place(settings, settings.capture), inbox, project, rules)


class Verdict(BaseModel):
    """A person's decision; no label discards the photo."""

    model_config = ConfigDict(extra="forbid")

    label: str | None
    by: Reviewer


def review_routes(
    recorder: Recorder, read: Read, body: dict[str, Any], labels: Labels
) -> APIRouter:
    """The routes for feedback and for the page `/review`; 404 where nothing is kept.

    Args:
        body: what a request with a photo looks like, for OpenAPI.
    """
    router = APIRouter(responses={404: {"description": NOTHING_KEPT}})

    @router.post("/feedback", openapi_extra=body)
    async def feedback(request: Request, label: str) -> dict[str, str]:
        """Say what a photo shows that was read wrong; a person decides on it later.

        The outcome is `kept`, `duplicate`, or `full`.
        """
        check_label(label, labels())
        upload, reading = await read(request)
        flag = partial(recorder.flag, upload, reading, label)
        return {"outcome": await run_in_threadpool(flag)}

    @router.get("/review/photos")
    def batch(by: Reviewer, limit: Annotated[int, Query(ge=1, le=100)] = 24) -> dict[str, Any]:
        """Photos to label, those that users flagged first, then the least certain."""
        return {"labels": labels(), **recorder.captures.batch(by, limit)}

    @router.get("/review/photos/{name}.jpg", response_class=Response)
    def photo(name: Name) -> Response:
        """One photo."""
        return Response(recorder.captures.photo(name), media_type="image/jpeg")

    @router.post("/review/photos/{name}")
    def decide(name: Name, verdict: Verdict) -> dict[str, str | None]:
        """Label or discard a photo; 409 names who was first.

        The problem says why an accepted photo cannot reach the inbox yet.
        """
        check_label(verdict.label, labels())
        return {"problem": recorder.captures.decide(name, verdict.label, verdict.by)}

    @router.delete("/review/photos/{name}", status_code=204)
    def undo(name: Name) -> None:
        """Take a decision back; 409 if a retrain imported the photo."""
        recorder.captures.undo(name)

    return router


def check_label(label: str | None, labels: Sequence[str]) -> None:
    """Raise 422 unless the label is known, or none."""
    if label is not None and label not in labels:
        shown = ", ".join(labels[:20])
        raise HTTPException(422, f"The label {label[:80]!r} is unknown. Send one of {shown}.")


async def explain(_: Request, error: Any) -> Response:
    """Answer for an error of the kept photos."""
    status = 409 if isinstance(error, (DecidedError, DataError, BusyError)) else 503
    return JSONResponse(
        {"error": str(error)}, 404 if isinstance(error, MissingObjectError) else status
    )
