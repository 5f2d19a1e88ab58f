"""What Prometheus learns about the service."""

from collections.abc import Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from flows.serve.follower import ModelSource

BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
PATHS = ("/predict", "/feedback", "/health", "/metrics", "/openapi.json")
METHODS = ("GET", "HEAD", "POST", "DELETE")


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
        about = "Photos read, by label."
        self.predictions = Counter("handsigns_predictions", about, ("label",), **known)
        about = "Last result of the drift monitor: population stability index, or AUC."
        self._drift = Gauge("handsigns_drift", about, ("comparison",), **known)
        about = "Photos offered to be kept, by what became of them."
        self.captured = Counter("handsigns_capture", about, ("outcome",), **known)
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

    def show_drift(self, results: Mapping[str, float]) -> None:
        """Show what the monitor found last."""
        self._drift.clear()
        for comparison, value in results.items():
            self._drift.labels(comparison).set(value)

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        if model := self._source.model:
            self._model.info({"version": str(model.version or ""), "release": model.release or ""})
        return generate_latest(self._registry)
