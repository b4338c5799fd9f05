"""Metrics for Prometheus, at /metrics. Each application has its own registry; no label holds a prompt or a path."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from .engine import Engine
from .jobs import ENDS

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.02, 0.1, 0.3, 1, 3, 10, 30, 100, 300)  # bounds of the buckets of a request's duration


def route_of(scope: Scope) -> str:
    """The template of the path of a request, such as /api/jobs/{id}; "unknown" if it has no route."""
    route = scope.get("route")
    return str(getattr(route, "path", "unknown"))


class Metrics:
    """What is measured of an application.

    requests        seconds of each request, by method, template of the path, and status; 0 as status is no answer
    open_requests   requests that are being answered
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        names = ("method", "path", "status")
        self.requests = Histogram(
            "sd_request_seconds", "Duration of requests.", names, buckets=SECONDS, registry=self.registry
        )
        self.open_requests = Gauge("sd_requests_open", "Requests being answered.", registry=self.registry)
        self.registry.register(_OfEngine(engine))
        ProcessCollector(registry=self.registry)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _OfEngine(Collector):
    """Reads what an engine counts, whenever it is asked."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """The metrics."""
        engine, totals = self.engine, self.engine.totals
        jobs = engine.jobs()
        running = sum(job.state == "running" for job in jobs)
        yield CounterMetricFamily("sd_jobs_accepted", "Jobs put into the queue.", totals.accepted)
        yield CounterMetricFamily("sd_jobs_refused", "Jobs refused, as the queue was full.", totals.refused)
        ended = CounterMetricFamily("sd_jobs_ended", "Jobs that have ended, by state.", labels=["state"])
        for state in ENDS:
            ended.add_metric([state], totals.ended[state])
        yield ended
        present = GaugeMetricFamily("sd_jobs", "Jobs, by state.", labels=["state"])
        present.add_metric(["running"], running)
        present.add_metric(["waiting"], len(jobs) - running)
        yield present
        yield CounterMetricFamily("sd_images", "Images generated.", totals.images)
        yield CounterMetricFamily("sd_steps", "Steps taken, of all jobs.", totals.steps)
        yield CounterMetricFamily("sd_busy_seconds", "Seconds in which workers computed.", totals.seconds)
        models = sum(len(worker.models) for worker in engine.workers)
        yield GaugeMetricFamily("sd_models_resident", "Models in memory.", models)
        yield GaugeMetricFamily("sd_ready", "1 if a model is loaded and jobs are accepted.", int(engine.is_ready))
