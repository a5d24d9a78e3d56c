"""Metrics of a server, for Prometheus."""

from functools import partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from convoy.serving.deployment import Deployment

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters and timings of a server."""

    def __init__(self) -> None:
        # Otherwise each counter has another one with the time of its creation.
        disable_created_metrics()
        self.registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry, buckets=SECONDS)
        ProcessCollector(registry=self.registry)
        self.requests = counter("convoy_requests", "Requests for predictions, by HTTP status", ["status"])
        self.images = counter("convoy_images", "Images, by outcome: predicted or invalid", ["outcome"])
        self.labels = counter("convoy_predictions", "Predicted images, by label", ["label"])
        self.seconds = histogram("convoy_request_seconds", "Time of a request")
        self.decode = histogram("convoy_decode_seconds", "Time to decode a request's images", buckets=SECONDS)
        self.predict = histogram("convoy_predict_seconds", "Time to predict them, with waiting", buckets=SECONDS)
        self.active = gauge("convoy_requests_active", "Requests that are being answered")
        self.crashes = gauge("convoy_decoder_crashes", "Decoders that an image crashed or blocked")
        self.model = gauge("convoy_model_info", "The model that is served", ["name", "version", "runtime"])
        self.switches = gauge("convoy_model_switches", "Changes to another version")
        self.failures = gauge("convoy_model_failures", "Failed looks at the alias or loads of a version")
        self.is_current = gauge("convoy_model_is_current", "1 if the served version is the one asked for")
        self.unlogged = counter("convoy_unlogged_images", "Images that could not be written to the log")

    def render(self, deployment: Deployment, crashes: int) -> bytes:
        """Return all metrics in Prometheus' text format."""
        self.crashes.set(crashes)
        self.model.clear()
        if loaded := deployment.current:
            self.model.labels(loaded.name, loaded.version, loaded.model.runtime).set(1)
        self.switches.set(deployment.switches)
        self.failures.set(deployment.failures)
        self.is_current.set(loaded is not None and not deployment.error)
        return generate_latest(self.registry)
