"""Traffic: what the service answered, counted by the hour for the drift monitor."""

import json
import threading
import uuid
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from tasks.data.capture import Store
from tasks.scoring.drift import BINS
from tasks.services.s3 import MissingObjectError

FOLDER = "traffic"
RESULT = "monitor/drift.json"
"""The last result of the monitor."""
KEEP_DAYS = 30
_HOUR = "%Y-%m-%dT%H"


@dataclass
class Counts:
    """Answers by label, and by confidence in `BINS` equal bins."""

    labels: Counter[str] = field(default_factory=Counter)
    confidences: Counter[int] = field(default_factory=Counter)

    def add(self, label: str, confidence: float) -> None:
        """Count one answer."""
        self.labels[label] += 1
        self.confidences[min(int(confidence * BINS), BINS - 1)] += 1


class Traffic:
    """Counts of one service process; safe to use from several threads."""

    def __init__(self, store: Store) -> None:
        self._store, self._process = store, uuid.uuid4().hex[:12]
        self._lock = threading.Lock()
        self._counts: dict[str, Counts] = {}

    def add(self, release: str, label: str, confidence: float) -> None:
        """Count one answer of a release."""
        key = f"{FOLDER}/{datetime.now(UTC):{_HOUR}}/{release}-{self._process}.json"
        with self._lock:
            self._counts.setdefault(key, Counts()).add(label, confidence)

    def save(self) -> None:
        """Write all counts; those of hours that are over are forgotten."""
        with self._lock:
            content = {}
            for key, one in self._counts.items():
                bins = [one.confidences[number] for number in range(BINS)]
                content[key] = json.dumps({"labels": one.labels, "confidences": bins})
            now = f"{FOLDER}/{datetime.now(UTC):{_HOUR}}/"
            self._counts = {key: one for key, one in self._counts.items() if key.startswith(now)}
        for key, text in content.items():
            self._store.put(key, text.encode())

    def drift(self) -> dict[str, float]:
        """The values of the monitor's last result, by what was compared."""
        comparisons = read_result(self._store).get("comparisons", [])
        return {one["name"]: one["value"] for one in comparisons if one["value"] is not None}


def read_result(store: Store) -> dict[str, Any]:
    """What the monitor wrote last; empty before its first run."""
    try:
        return dict(json.loads(store.get(RESULT)))
    except MissingObjectError:
        return {}


def count_window(store: Store, release: str, hours: int) -> Counts:
    """Add up what all services counted of a release in the last hours; remove what is too old."""
    now, total = datetime.now(UTC), Counts()
    since, oldest = (f"{now - timedelta(hours=span):{_HOUR}}" for span in (hours, 24 * KEEP_DAYS))
    for key in store.list(FOLDER):
        _, hour, name = key.split("/")
        if hour < oldest:
            store.remove(key)
        elif hour > since and name.startswith(release):
            found = json.loads(store.get(key))
            total.labels.update(found["labels"])
            total.confidences.update(dict(enumerate(found["confidences"])))
    return total
