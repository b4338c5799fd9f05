"""POST /api/inside: generate one image, and say after each step what happened inside the model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request

from .. import http
from ..engine import Engine
from ..events import EventStream, ServerEvent, follow
from ..http import ApiError, engine_of
from ..jobs import Finished, Job, Work
from ..native import PROBLEMS
from ..native.bodies import GenerateBody
from ..native.generate import EVENTS, answer, position
from ..native.requests import work_of
from .watcher import InsideWatcher

log = logging.getLogger("sd.server")
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
    return EventStream(_events(engine, job, watcher), lambda: engine.cancel([job]))


def _single(work: Work) -> Work:
    if work.request.params.n != 1:
        raise ApiError(422, f"one image is looked at, not {work.request.params.n}: set n to 1")
    return work


async def _events(engine: Engine, job: Job, watcher: InsideWatcher) -> AsyncIterator[ServerEvent | None]:
    """What the client of a job is told."""
    place = position(engine, job)
    yield ServerEvent("queued", {"id": job.id, "position": place or 0})
    sent = 0
    try:
        async for event in follow(job):
            if event is None or event.state == "waiting":
                now = position(engine, job)
                changed, place = now is not None and now != place, now
                yield ServerEvent("queued", {"id": job.id, "position": now}) if changed else None
            # those of several steps, if the job was faster than this loop
            new = watcher.events[sent:]
            sent += len(new)
            for name, data in new:
                yield ServerEvent(name, data)
        http.check_done([job])
        assert isinstance(job.finished, Finished)
        result = await asyncio.to_thread(answer, job)
        summary = await asyncio.to_thread(watcher.summary, job.finished.images[0])
        yield ServerEvent("done", {**result, **summary})
    except ApiError as error:
        yield ServerEvent("error", {"status": error.status, "message": error.message})
    except Exception as error:
        log.error("job %s failed", job.id, exc_info=error)
        yield ServerEvent("error", {"status": 500, "message": http.as_api_error(error).message})
