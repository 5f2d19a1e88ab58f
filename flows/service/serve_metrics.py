"""What Prometheus may ask the service."""

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

from flows.service.follower import Source

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
