"""/healthz, for whoever starts and stops the server, and /metrics, for whoever watches it."""

from __future__ import annotations

from typing import Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from .engine import Engine
from .metrics import CONTENT_TYPE, Metrics


def health(engine: Engine) -> Literal["ready", "stopping", "failed", "loading"]:
    """How the server is: failed means that the first model cannot be loaded on any device."""
    if engine.is_stopping:
        return "stopping"
    if engine.is_ready:
        return "ready"
    return "failed" if all(worker.failure or not worker.is_alive for worker in engine.workers) else "loading"


def add(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    """Add the two routes."""

    @app.get("/healthz", tags=["operations"], responses={503: {"description": "loading, failed or stopping"}})
    async def healthz() -> JSONResponse:
        """Whether requests can be answered: 200 if they can, else 503, and why."""
        found = health(engine)
        headers = {"Retry-After": "1"} if found == "loading" else {}
        return JSONResponse({"status": found}, 200 if found == "ready" else 503, headers)

    app.add_api_route("/healthz", healthz, methods=["HEAD"], include_in_schema=False)

    @app.get("/metrics", tags=["operations"])
    async def all_metrics() -> Response:
        """Counts and durations, in Prometheus' text format."""
        return Response(metrics.text(), media_type=None, headers={"Content-Type": CONTENT_TYPE})
