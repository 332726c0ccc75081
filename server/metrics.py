"""What /metrics shows, by Prometheus' client. Labels are few and known in advance: services, models, statuses."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import generate_latest

if TYPE_CHECKING:
    from diffusionz.server.jobs import Job

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


_METHODS = {"GET", "POST", "HEAD", "DELETE", "PATCH", "PUT", "OPTIONS"}


@functools.cache
def _child(metric: Any, *labels: str) -> Any:
    """metric.labels(*labels), which takes a lock each time. Labels are few, so these are."""
    return metric.labels(*labels)


class Metrics:
    """Counters and gauges of one server."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"diffusionz_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"diffusionz_{name}", text, labels, registry=registry, buckets=buckets)

        self.requests = counter("http_requests_total", "Answers, by status.", "method", "status")
        self.request_seconds = histogram("http_request_seconds", "From a request's head to its answer's end.")
        self.jobs = counter("jobs_total", "Jobs that have ended.", "service", "status")
        self.refused = counter("jobs_refused_total", "Jobs that were not taken.", "service", "reason")
        self.stage_seconds = histogram("job_stage_seconds", "Time in each stage of a job.", "service", "stage")
        self.batch_series = histogram(
            "forecast_batch_series", "Series of one engine call.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
        )
        self.loads = histogram("model_load_seconds", "Time to load a model.", "model")
        self.evictions = counter("model_evictions_total", "Models that were let go.", "model", "reason")
        self.credit = counter("credits_total", "Base units of the token.", "service", "kind")

    def gauge(self, name: str, text: str, value: object) -> None:
        """A figure that is asked for when somebody looks: `value()`."""
        gauge = Gauge(f"diffusionz_{name}", text, registry=self.registry)
        gauge.set_function(value)  # type: ignore[arg-type]

    def answered(self, method: str, status: int, seconds: float) -> None:
        _child(self.requests, method if method in _METHODS else "other", str(status)).inc()
        self.request_seconds.observe(seconds)

    def ended(self, job: Job) -> None:
        if job.task is None and job.problem is not None:  # its price could not be held: it never was a job
            _child(self.refused, job.service, job.problem.kind).inc()
            return
        _child(self.jobs, job.service, job.status).inc()
        for stage, milliseconds in job.timings_ms.items():
            _child(self.stage_seconds, job.service, stage).observe(milliseconds / 1e3)
        if job.cost is not None and job.result is not None:
            _child(self.credit, job.service, "charged").inc(job.cost["tokens"])

    def text(self) -> bytes:
        return generate_latest(self.registry)
