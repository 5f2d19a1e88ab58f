"""Keep photos and counts of predictions in the background, and let people label the photos."""

import logging
import queue
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from fastapi.responses import Response
from prometheus_client import Counter, Gauge
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from flows.serve.predict import BODY, Reading
from flows.workspace import Workspace
from tasks.data.capture import ID, Capture, CaptureRules, Captures
from tasks.data.traffic import Traffic, read_drift
from tasks.errors import SettingsError

_log = logging.getLogger(__name__)

CAPTURED = Counter(
    "handsigns_capture", "Photos offered to be kept, by what became of them.", ("outcome",)
)
DRIFT = Gauge(
    "handsigns_drift",
    "Last result of the drift monitor: population stability index, or AUC.",
    ("comparison",),
)
QUEUE = 16  # uploads that may wait to be kept; any other one is dropped
REST = 39  # times as long as it worked a thread rests, so that it takes 2.5 % of a core at most
SAVE_SECONDS = 60.0  # between two writes of the counts for the drift monitor
OPT_OUT = "Handsigns-No-Capture"  # the header of a client whose photo must not be kept
NOTHING_KEPT = "This service keeps no photos. Set HANDSIGNS_CAPTURE to a folder or a bucket."

Name = Annotated[str, InPath(pattern=f"^{ID}$")]
Reviewer = Annotated[str, Field(min_length=1, max_length=80)]


class Recorder:
    """Keeps photos and counts in a thread, so that no prediction waits or fails because of it."""

    def __init__(self, captures: Captures | None, traffic: Traffic) -> None:
        self._captures, self._traffic = captures, traffic
        self._waiting: queue.Queue[tuple[bytes, Capture]] = queue.Queue(QUEUE)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        """Stop after the photo that is being kept; wait at most 5 s."""
        self._stopping.set()
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

    def record(self, upload: bytes, reading: Reading, keep: bool) -> None:
        """Count a reading; where photos may be kept, keep uncertain ones and a share of others."""
        confidence = max(reading.probabilities.values())
        if reading.model.release:
            self._traffic.add(reading.model.release, reading.label, confidence)
        if not keep:
            return
        rules = self.captures.rules
        uncertain = confidence < rules.below or not reading.certain
        if uncertain or random.random() < rules.share:
            reason = "uncertain" if uncertain else "sample"
            try:
                self._waiting.put_nowait((upload, _capture(reading, reason)))
            except queue.Full:
                CAPTURED.labels("dropped").inc()

    def flag(self, upload: bytes, reading: Reading, suggestion: str) -> str:
        """Keep what a user says was read wrong; returns what became of it."""
        outcome = self.captures.keep(upload, _capture(reading, "flagged", suggestion))
        CAPTURED.labels(outcome).inc()
        return outcome

    def _run(self) -> None:
        saved, problem, last = time.monotonic(), "", False
        while not last:
            last = self._stopping.is_set()
            began, outcome, waiting = time.thread_time(), "failed", None
            try:
                with suppress(queue.Empty):
                    waiting = self._waiting.get(timeout=0 if last else 1.0)
                if self._captures:
                    self._captures.tidy()
                    outcome = self._captures.keep(*waiting) if waiting else ""
                if last or time.monotonic() > saved + SAVE_SECONDS:
                    saved = time.monotonic()
                    self._traffic.save()
                    DRIFT.clear()
                    found = read_drift(self._traffic.store, self._traffic.release)
                    for comparison, (value, _) in found.items():
                        DRIFT.labels(comparison).set(value)
                problem = ""
            except Exception as error:  # a full disk, say: predictions must go on
                if problem != (problem := f"Photos and counts cannot be kept: {error}"):
                    _log.warning("%s", problem)
            if waiting:
                CAPTURED.labels(outcome).inc()
            self._stopping.wait(REST * (time.thread_time() - began))


def _capture(reading: Reading, reason: Any, suggestion: str | None = None) -> Capture:
    return Capture(
        time=datetime.now(UTC),
        reason=reason,
        label=reading.label,
        probabilities=reading.probabilities,
        version=reading.model.version,
        release=reading.model.release,
        suggestion=suggestion,
    )


def open_captures(workspace: Workspace) -> Captures | None:
    """Open the place of kept photos and the inbox; None where nothing is kept."""
    settings = workspace.settings
    if settings.capture is None:
        return None
    for place in (settings.capture, settings.inbox or ""):
        if place.startswith("s3://") and settings.s3_endpoint_url is None:
            raise SettingsError(
                f"{place} is in no S3 service. Set HANDSIGNS_S3_ENDPOINT_URL, or name a folder in "
                "HANDSIGNS_CAPTURE and HANDSIGNS_INBOX."
            )
    names = [field.name for field in fields(CaptureRules)]
    rules = CaptureRules(*(getattr(settings, f"capture_{name}") for name in names))
    inbox = workspace.place(settings.inbox) if settings.inbox else None
    return Captures(workspace.place(settings.capture), inbox, workspace.project, rules)


class Verdict(BaseModel, extra="forbid"):
    """A person's decision; no label discards the photo."""

    label: str | None
    by: Reviewer


def review_routes(
    recorder: Recorder,
    read: Callable[[Request], Awaitable[tuple[bytes, Reading]]],
    labels: Callable[[], Sequence[str]],
) -> APIRouter:
    """The routes for feedback and for the page `/review`; 404 where nothing is kept."""
    router = APIRouter(responses={404: {"description": NOTHING_KEPT}})

    def check_label(label: str | None) -> None:
        if label is not None and label not in labels():
            shown = ", ".join(labels()[:20])
            raise HTTPException(422, f"The label {label[:80]!r} is unknown. Send one of {shown}.")

    @router.post("/feedback", openapi_extra=BODY)
    async def feedback(request: Request, label: str) -> dict[str, str]:
        """Say what a photo shows that was read wrong: `kept`, `duplicate`, or `full`."""
        check_label(label)
        upload, reading = await read(request)
        return {"outcome": await run_in_threadpool(recorder.flag, upload, reading, label)}

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
        """Label or discard a photo; the problem says why it cannot reach the inbox yet."""
        check_label(verdict.label)
        return {"problem": recorder.captures.decide(name, verdict.label, verdict.by)}

    @router.delete("/review/photos/{name}", status_code=204)
    def undo(name: Name) -> None:
        """Take a decision back; 409 if a retrain imported the photo."""
        recorder.captures.undo(name)

    return router
