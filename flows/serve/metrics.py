"""Prometheus metrics of the HTTP service."""

from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from flows.serve.follower import ModelSource

BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
PATHS = ("/predict", "/health", "/metrics", "/openapi.json")
METHODS = ("GET", "HEAD", "POST")


class Metrics:
    """Metrics of one service, in a registry of its own."""

    def __init__(self, source: ModelSource) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        registry.register(_ModelCollector(source))
        self._requests = Counter(
            "handsigns_requests",
            "Requests answered.",
            ("method", "path", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "handsigns_request_seconds",
            "From a request's headers to the end of its answer.",
            ("path",),
            buckets=BUCKETS,
            registry=registry,
        )
        self._predictions = Counter(
            "handsigns_predictions", "Photos read, by sign.", ("label",), registry=registry
        )

    def observe(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count one request; unknown paths and methods share one label each."""
        path = path if path in PATHS else "page"
        self._requests.labels(method if method in METHODS else "other", path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def count_prediction(self, label: str) -> None:
        """Count one prediction."""
        self._predictions.labels(label).inc()

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _ModelCollector(Collector):
    def __init__(self, source: ModelSource) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        model = self._source.model
        info = GaugeMetricFamily(
            "handsigns_model_info", "The model that answers.", labels=("version", "release")
        )
        if model:
            info.add_metric((str(model.version or ""), model.release or ""), 1)
        yield info
        yield GaugeMetricFamily(
            "handsigns_follow_problem",
            "1 while the loaded model is not the champion, or that is unknown.",
            value=int(self._source.problem is not None),
        )
        yield GaugeMetricFamily(
            "handsigns_follow_timestamp_seconds",
            "When the champion pointer was last read.",
            value=self._source.checked_at or 0,
        )
        failures = CounterMetricFamily(
            "handsigns_follow_failures", "Failed checks of the champion.", labels=("kind",)
        )
        for kind, count in self._source.failures.items():
            failures.add_metric((kind,), count)
        yield failures
