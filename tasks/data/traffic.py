"""Traffic: what the service answered, counted by the hour for the drift monitor."""

import json
import threading
import uuid
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from operator import add
from typing import Any

from tasks.data.capture import Store
from tasks.scoring.drift import BINS
from tasks.services.s3 import MissingObjectError

FOLDER = "traffic"
RESULTS = "monitor"  # folder with the last result of the monitor for each release
KEEP_DAYS = 30
_HOUR = "%Y-%m-%dT%H"


@dataclass
class Counts:
    """Answers by label, and by confidence in equal bins."""

    labels: Counter[str] = field(default_factory=Counter)
    confidences: list[int] = field(default_factory=lambda: [0] * BINS)

    def add(self, label: str, confidence: float) -> None:
        self.labels[label] += 1
        self.confidences[min(int(confidence * BINS), BINS - 1)] += 1


class Traffic:
    """Counts of one service process; safe to use from several threads."""

    def __init__(self, store: Store) -> None:
        self.store, self._process = store, uuid.uuid4().hex[:12]
        self.release: str | None = None  # that answered last
        self._lock = threading.Lock()
        self._counts: dict[str, Counts] = {}

    def add(self, release: str, label: str, confidence: float) -> None:
        key = f"{FOLDER}/{datetime.now(UTC):{_HOUR}}/{release}-{self._process}.json"
        self.release = release
        with self._lock:
            self._counts.setdefault(key, Counts()).add(label, confidence)

    def save(self) -> None:
        """Write all counts; those of hours that are over are forgotten."""
        now, content = f"{FOLDER}/{datetime.now(UTC):{_HOUR}}/", {}
        with self._lock:
            for key, one in self._counts.items():
                content[key] = json.dumps(vars(one))
            self._counts = {key: one for key, one in self._counts.items() if key.startswith(now)}
        for key, text in content.items():
            self.store.put(key, text.encode())


def read_drift(store: Store, release: str | None) -> dict[str, tuple[float, float]]:
    """Value and limit of all that the monitor compared last for a release."""
    found = read_result(store, release).get("comparisons", []) if release else []
    return {one["name"]: (one["value"], one["limit"]) for one in found if one["value"] is not None}


def read_result(store: Store, release: str) -> dict[str, Any]:
    """What the monitor wrote last about a release; empty before that."""
    try:
        return dict(json.loads(store.get(f"{RESULTS}/{release}.json")))
    except MissingObjectError:
        return {}


def count_window(store: Store, release: str, hours: int) -> Counts:
    """Add up what all services counted of a release in the last hours; remove what is too old."""
    now, total = datetime.now(UTC), Counts()
    since, oldest = (f"{now - timedelta(hours=span):{_HOUR}}" for span in (hours, 24 * KEEP_DAYS))
    for key in store.keys(f"{FOLDER}/"):
        _, hour, name = key.split("/")
        if hour < oldest:
            store.remove(key)
        elif hour > since and name.startswith(release):
            found = json.loads(store.get(key))
            total.labels.update(found["labels"])
            total.confidences = [*map(add, total.confidences, found["confidences"])]
    return total
