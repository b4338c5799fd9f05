"""POST /api/inside: generate one image, and say after each step what happened inside the model."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request

from .. import http
from ..events import EventStream, ServerEvent
from ..http import ApiError, engine_of
from ..jobs import Event, Finished, Work
from ..native import PROBLEMS
from ..native.bodies import GenerateBody
from ..native.generate import EVENTS, answer, job_events
from ..native.requests import work_of
from .watcher import InsideWatcher

router = APIRouter(prefix="/api", tags=["inside"], responses=PROBLEMS)
STREAM: dict[str, Any] = {
    "description": "Events: `queued` {id, position}, `begin` {words, levels, ...}, a `step` for each step {x0, x, "
    "change, maps, special, guidance, ...}, then `done` {as of /api/generate; maps and special of all steps} or "
    "`error` {status, message}. Closing the connection cancels the job.",
    "content": {EVENTS: {"schema": {"type": "string"}}},
}


@router.post("/inside", status_code=200, response_class=EventStream, responses={200: STREAM})
async def inside(request: Request, body: GenerateBody) -> EventStream:
    """Generate the image of a request, which is the one of /api/generate, and look at what happens inside the model.

    Such a job is computed alone, and obeys the same limits as others.
    """
    engine, watcher = engine_of(request), InsideWatcher()
    _, (job,) = await http.accept(
        request,
        lambda: _single(work_of(body, engine.settings)),
        lambda work: [replace(work, previews=0, watcher=watcher)],
    )
    told = 0  # of the events of the watcher

    async def steps(event: Event | None) -> list[ServerEvent]:
        nonlocal told
        new = watcher.events[told:]  # those of several steps, if the job was faster than this loop
        told += len(new)
        return [ServerEvent(name, data) for name, data in new]

    async def end() -> dict[str, Any]:
        assert isinstance(job.finished, Finished)
        result = await asyncio.to_thread(answer, job)
        return {**result, **await asyncio.to_thread(watcher.summary, job.finished.images[0])}

    return EventStream(job_events(engine, job, steps, end), lambda: engine.cancel([job]))


def _single(work: Work) -> Work:
    if work.request.params.n != 1:
        raise ApiError(422, f"one image is looked at, not {work.request.params.n}: set n to 1")
    return work
