"""Photos that the service keeps for people to label, in a folder or a bucket.

    photos/<date>/<id>.jpg    a photo; the comment in the JPEG is its prediction
    decisions/<id>.json       what a person decided; created only once
    unfinished/<id>.txt       a decision that still has to reach the inbox, or to leave it

A decision is finished by whoever lists the photos next if its maker was killed or the inbox
failed.
"""

import io
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from tasks.data.directory import data_lock, stored_photos
from tasks.data.images import decode, normalize, perceptual_hash
from tasks.data.sources import REVIEWED
from tasks.errors import DataError, HandsignsError
from tasks.io import atomic_write
from tasks.project import Project
from tasks.services.s3 import ChangedError, MissingObjectError, Storage

SIDE = 512  # longest side of a kept photo, in pixels
QUALITY = 90
NEAR_BITS = 6  # perceptual hashes that differ in as many of their 64 bits belong to near-duplicates
TIDY_SECONDS = 3600.0
LENT_SECONDS = 300.0  # for so long nobody else is given the photos of one person's batch
ID = r"\d{4}-\d\d-\d\dT\d{6}-(flagged|uncertain|sample)-\d{4}-[0-9a-f]{16}"
"""Time, reason, confidence in thousandths, perceptual hash: a listing alone sorts photos."""
SUFFIXES = {"photos": "jpg", "decisions": "json", "unfinished": "txt"}
_STAMP = "%Y-%m-%dT%H%M%S"


@dataclass(frozen=True)
class FolderStore:
    """Small files by key, below a folder; every write is atomic."""

    root: Path

    def keys(self, folder: str) -> Sequence[str]:
        # Hidden files and folders are being written.
        found = (path.relative_to(self.root) for path in (self.root / folder).rglob("*.*"))
        return [str(p) for p in found if not any(name.startswith(".") for name in p.parts)]

    def get(self, key: str) -> bytes:
        """The content, or `MissingObjectError`."""
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError:
            raise MissingObjectError(f"'{self.root / key}' does not exist.") from None

    def put(self, key: str, content: bytes) -> None:
        with atomic_write(self.root / key) as temporary:
            temporary.write_bytes(content)

    def put_if_absent(self, key: str, content: bytes) -> None:
        """Write, or raise `ChangedError` if the key exists."""
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".") as file:
            file.write(content)
            file.flush()
            try:
                os.link(file.name, path)
            except FileExistsError:
                raise ChangedError(f"'{path}' exists.") from None

    def remove(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)


Store = FolderStore | Storage


@dataclass(frozen=True)
class CaptureRules:
    """What is kept: below a confidence, a share of the rest; how much, and for how many days."""

    below: float
    share: float
    per_day: int
    total: int
    days: int


class Capture(BaseModel):
    """The prediction of a kept photo, and why it was kept."""

    model_config = ConfigDict(frozen=True)

    time: datetime
    reason: Literal["flagged", "uncertain", "sample"]
    label: str
    probabilities: dict[str, float]
    version: int | None
    release: str | None
    suggestion: str | None = None

    def id(self, perceptual: int) -> str:
        confidence = round(1000 * max(self.probabilities.values()))
        return f"{self.time:{_STAMP}}-{self.reason}-{confidence:04d}-{perceptual:016x}"


class Decision(BaseModel):
    """What a person decided of a photo; no label discards it."""

    label: str | None
    by: str
    at: datetime
    undone: bool = False


class DecidedError(HandsignsError):
    """Somebody decided before."""


class Captures:
    """Kept photos and the decisions on them, which wait without an inbox; thread-safe."""

    def __init__(
        self, store: Store, inbox: Store | None, project: Project, rules: CaptureRules
    ) -> None:
        self.rules = rules
        self._store, self._inbox, self._project = store, inbox, project
        self._lock = threading.RLock()
        self._hashes: dict[str, int] = {}
        self._tidied = -TIDY_SECONDS
        self._lent: dict[str, tuple[str, float]] = {}

    def keep(self, upload: bytes, capture: Capture) -> str:
        """Keep a photo: `kept`, or `full` or `duplicate` if it is not."""
        with self._lock:
            self.tidy()
            today = sum(name.startswith(f"{capture.time:%Y-%m-%d}") for name in self._hashes)
            if today >= self.rules.per_day or len(self._hashes) >= self.rules.total:
                return "full"
            image = Image.fromarray(decode(upload, min_side=SIDE))
            image.thumbnail((SIDE, SIDE))
            new = perceptual_hash(np.asarray(image))
            near = [name for name, h in self._hashes.items() if (h ^ new).bit_count() <= NEAR_BITS]
            # What a user flags takes the place of the same photo kept for another reason.
            flagged = capture.reason == "flagged"
            if any(not flagged or "-flagged-" in name or self._decision(name) for name in near):
                return "duplicate"
            name = capture.id(new)
            content = _encode(image, capture.model_dump(mode="json"), quality=QUALITY)
            self._store.put(_key("photos", name), content)
            self._hashes[name] = new
            for name in near:
                self._store.remove(_key("photos", name))
                del self._hashes[name]
            return "kept"

    def tidy(self) -> None:
        """Remove what is too old, and learn what is kept; once an hour."""
        with self._lock:
            if time.monotonic() - self._tidied < TIDY_SECONDS:
                return
            self.remove_expired()
            self._hashes = {name: int(name[-16:], 16) for name in self._names("photos")}
            self._tidied = time.monotonic()

    def remove_expired(self, dry_run: bool = False) -> int:
        """Remove photos and decisions that are older than the rules keep them; count them."""
        oldest = f"{datetime.now(UTC) - timedelta(days=self.rules.days):{_STAMP}}"
        unfinished, removed = self._names("unfinished"), 0
        for folder in ("photos", "decisions"):
            for name in self._names(folder) - unfinished:
                if name < oldest:
                    removed += folder == "photos"
                    if not dry_run:
                        self._store.remove(_key(folder, name))
        return removed

    def batch(self, by: str, limit: int) -> dict[str, Any]:
        """Photos for one person, flagged ones first, then uncertain; and how far all have come."""
        problem = self._finish_all()
        decided, now = self._names("decisions"), time.monotonic()
        waiting = sorted(self._names("photos") - decided, key=_urgency)
        lent = {name for name, (to, until) in self._lent.items() if to != by and until > now}
        photos = []
        # Two people get different photos, as long as there are enough.
        for name in ([one for one in waiting if one not in lent] or waiting)[:limit]:
            try:
                photos.append({"id": name, **_comment(self.photo(name))})
            except MissingObjectError:
                continue  # it was flagged or grew too old meanwhile
            self._lent[name] = (by, now + LENT_SECONDS)
        counts = {"pending": len(waiting), "decided": len(decided)}
        return {**counts, "photos": photos, "problem": problem}

    def photo(self, name: str) -> bytes:
        return self._store.get(_key("photos", name))

    def decide(self, name: str, label: str | None, by: str) -> str | None:
        """Accept a photo under a label, or discard it; says why it cannot reach the inbox yet."""
        self.photo(name)
        content = Decision(label=label, by=by, at=datetime.now(UTC)).model_dump_json().encode()
        with self._lock:
            self._store.put(_key("unfinished", name), b"")
            try:
                self._store.put_if_absent(_key("decisions", name), content)
            except ChangedError:
                first = self._decision(name)
                if first and (first.label, first.by) != (label, by):
                    done = f"labelled it {first.label}" if first.label else "discarded it"
                    raise DecidedError(f"{first.by} {done} before.") from None
            finally:
                problem = self._finish_all()
        return problem

    def undo(self, name: str) -> None:
        """Take a decision back, and the photo out of the inbox, unless it was imported."""
        with self._lock, data_lock(self._project, wait=0):
            decision = self._decision(name)
            if decision is None:
                raise MissingObjectError("Nobody has decided on this photo.")
            accepted, _ = normalize(self._accepted(name, decision), name)
            if decision.label and accepted in stored_photos(self._project):
                raise DataError(
                    f"It was imported as data/train/{decision.label}/{accepted}. Remove it there."
                )
            self._store.put(_key("unfinished", name), b"")
            undone = decision.model_copy(update={"undone": True})
            self._store.put(_key("decisions", name), undone.model_dump_json().encode())
            self._finish(name)

    def _finish_all(self) -> str | None:
        """Finish all decisions; says why one cannot be finished yet."""
        with self._lock:
            for name in self._names("unfinished"):
                try:
                    self._finish(name)
                except (HandsignsError, OSError) as error:
                    return f"Accepted photos wait for the inbox: {error}"
        return None

    def _finish(self, name: str) -> None:
        """Bring a decision's photo to the inbox, or out of it again; repeating it is harmless."""
        decision = self._decision(name)
        if decision and decision.label:
            if self._inbox is None:
                raise DataError("HANDSIGNS_INBOX is not set.")
            place = f"{REVIEWED}{decision.at:%Y-%m-%d}/{decision.label}/{name}.jpg"
            if decision.undone:
                self._inbox.remove(place)
            else:
                self._inbox.put(place, self._accepted(name, decision))
        if decision and decision.undone:
            self._store.remove(_key("decisions", name))
        self._store.remove(_key("unfinished", name))

    def _accepted(self, name: str, decision: Decision) -> bytes:
        """The photo as the inbox gets it: its comment also says who labelled it, and when."""
        photo = self.photo(name)
        review = decision.model_dump(mode="json", exclude={"undone"})
        with Image.open(io.BytesIO(photo)) as image:
            return _encode(image, {**_comment(photo), "review": review}, quality="keep")

    def _decision(self, name: str) -> Decision | None:
        try:
            return Decision.model_validate_json(self._store.get(_key("decisions", name)))
        except MissingObjectError:
            return None

    def _names(self, folder: str) -> set[str]:
        keys = self._store.keys(f"{folder}/")
        names = {key.rpartition("/")[2].rpartition(".")[0] for key in keys}
        return {name for name in names if re.fullmatch(ID, name)}


def _key(folder: str, name: str) -> str:
    return f"{folder}/{name[:10] + '/' if folder == 'photos' else ''}{name}.{SUFFIXES[folder]}"


def _urgency(name: str) -> tuple[bool, str, str]:
    time_, reason, confidence, _ = name.rsplit("-", 3)
    return reason != "flagged", confidence, time_


def _encode(image: Image.Image, content: dict[str, Any], quality: int | str) -> bytes:
    """Encode a JPEG without metadata but a comment in JSON."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, comment=json.dumps(content).encode())
    return file.getvalue()


def _comment(jpeg: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(jpeg)) as image:
        return dict(json.loads(image.info["comment"]))
