"""The log: one JSON object a line, for requests and for jobs, without prompts unless they are asked for.

{"time": "2026-05-01T12:00:00.123Z", "level": "info", "event": "request", "method": "POST",
 "path": "/sdapi/v1/txt2img", "status": 200, "ms": 812.4, "client": "127.0.0.1", "jobs": ["8f3a..."], "images": 1}
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable, Mapping

from starlette.types import Message, Receive, Scope, Send

from ..messages import one_line
from .bodies import App
from .jobs import Job
from .metrics import Metrics, route_of

log = logging.getLogger("sd.server")
MOST_PROMPT = 2_000  # characters of a prompt in a line


class JsonLines(logging.Formatter):
    """Formats a record as JSON: its message is the event, and `extra={"fields": {...}}` are added.

    Of errors, the type and the lines of code are shown. The message may hold parts of a prompt: it is left out unless
    `log_prompts`.
    """

    def __init__(self, log_prompts: bool = False) -> None:
        super().__init__()
        self.log_prompts = log_prompts

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{at}.{int(record.created % 1 * 1000):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and (error := record.exc_info[1]) is not None:
            frames = traceback.extract_tb(error.__traceback__)
            line["error"] = type(error).__name__
            line["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-20:]]
            if self.log_prompts:
                line["message"] = one_line(error, MOST_PROMPT)
        return json.dumps(line, ensure_ascii=True, default=str)


def job_logger(log_prompts: bool) -> Callable[[Job], None]:
    """Writes a line for each job that has ended."""

    def write(job: Job) -> None:
        fields: dict[str, object] = {
            "job": job.id,
            "client": job.client,
            "state": job.state,
            "kind": type(job.work.request).__name__,
            "steps": job.step,
            "images": len(job.finished.images) if job.finished else 0,
            "waited_ms": round(1000 * ((job.started or job.ended) - job.created), 1),
            "ms": round(1000 * (job.ended - job.started), 1) if job.started else 0.0,
        }
        if job.finished is not None:
            fields["model"] = job.finished.model
        if job.state == "failed":
            fields["fault"] = job.fault
        if log_prompts:
            fields["prompt"] = str(job.work.request.prompt[0])[:MOST_PROMPT]
            fields["negative"] = str(job.work.request.negative)[:MOST_PROMPT]
        log.info("job", extra={"fields": fields})

    return write


class Observer:
    """The outermost middleware: measures each request, and writes a line about it."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.open_requests.inc()
        try:
            await self.app(scope, receive, noted)
        finally:
            seconds = time.perf_counter() - begun
            self.metrics.open_requests.dec()
            self.metrics.requests.labels(_method(scope), route_of(scope), str(status)).observe(seconds)
            if route_of(scope) not in ("/healthz", "/metrics") or status >= 500:
                log.log(_level(status), "request", extra={"fields": _fields(scope, status, seconds)})


def _method(scope: Scope) -> str:
    known = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
    return scope["method"] if scope["method"] in known else "other"


def _level(status: int) -> int:
    return logging.ERROR if status == 500 else logging.WARNING if status in (401, 403, 408, 413, 421) else logging.INFO


def _fields(scope: Scope, status: int, seconds: float) -> Mapping[str, object]:
    state = scope.get("state", {})
    jobs: list[Job] = state.get("jobs", [])
    address = scope.get("client")
    return {
        "method": _method(scope),
        "path": route_of(scope),
        "status": status,
        "ms": round(1000 * seconds, 1),
        "client": address[0] if address else "unknown",
        **({"key": state["key"]} if "key" in state else {}),
        **({"jobs": [job.id for job in jobs]} if jobs else {}),
        **({"images": sum(len(job.finished.images) for job in jobs if job.finished)} if jobs else {}),
    }
