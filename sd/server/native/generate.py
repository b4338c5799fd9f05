"""Generating: POST /api/generate, as one answer or as Server-Sent Events, and the jobs of a client."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from PIL import Image

from ...imaging.files import png_bytes
from .. import http
from ..engine import Engine
from ..events import EventStream, ServerEvent, follow
from ..http import ApiError, client_of, engine_of
from ..jobs import Event, Finished, Job
from .bodies import GenerateBody, Generated, JobState
from .requests import work_of

log = logging.getLogger("sd.server")
router = APIRouter(prefix="/api", tags=["native"])
EVENTS = "text/event-stream"
STREAM = {
    "description": "The result; with `Accept: text/event-stream` the events `queued` {id, position}, `step` {step, "
    "steps, previews}, then `done` {the result} or `error` {status, message}. Closing the connection cancels the job.",
    "model": Generated,
    "content": {EVENTS: {"schema": {"type": "string"}}},
}
QUALITY = 80  # of previews, which are JPEG


@router.post("/generate", responses={200: STREAM})
async def generate(request: Request, body: GenerateBody) -> Response:
    """Generate the images of a request."""
    engine = engine_of(request)
    _, jobs = await http.accept(request, lambda: work_of(body, engine.settings), lambda work: [work])
    (job,) = jobs
    if EVENTS not in request.headers.get("accept", ""):
        await http.ended(request, jobs)
        return JSONResponse(await asyncio.to_thread(answer, job))

    async def steps(event: Event | None) -> list[ServerEvent]:
        if event is None or event.state != "running" or not event.steps:
            return []
        previews = await asyncio.to_thread(data_urls, event.previews) if event.previews else []
        return [ServerEvent("step", {"step": event.step, "steps": event.steps, "previews": previews})]

    return EventStream(
        job_events(engine, job, steps, lambda: asyncio.to_thread(answer, job)), lambda: engine.cancel([job])
    )


async def job_events(
    engine: Engine,
    job: Job,
    steps: Callable[[Event | None], Awaitable[list[ServerEvent]]],
    end: Callable[[], Awaitable[dict[str, Any]]],
) -> AsyncIterator[ServerEvent | None]:
    """What the client of a job is told: its place in the queue, its steps, and its end or an error.

    steps   what to tell when something happened to the job, or now and then (None)
    end     the data of the event `done`
    """
    place = position(engine, job)
    yield ServerEvent("queued", {"id": job.id, "position": place or 0})
    try:
        async for event in follow(job):
            if event is None or event.state == "waiting":
                now = position(engine, job)
                changed, place = now is not None and now != place, now
                yield ServerEvent("queued", {"id": job.id, "position": now}) if changed else None
            for each in await steps(event):
                yield each
        http.check_done([job])
        yield ServerEvent("done", await end())
    except ApiError as error:
        yield ServerEvent("error", {"status": error.status, "message": error.message})
    except Exception as error:
        log.error("job %s failed", job.id, exc_info=error)
        yield ServerEvent("error", {"status": 500, "message": http.as_api_error(error).message})


def position(engine: Engine, job: Job) -> int | None:
    """The number of jobs before it in the queue; None once it runs."""
    waiting = [other for other in engine.jobs() if other.state == "waiting"]
    return waiting.index(job) if job in waiting else None


def answer(job: Job) -> dict[str, Any]:
    """The result of a job that is done. It encodes images: not to be called in the event loop."""
    finished = job.finished
    assert isinstance(finished, Finished)
    images = [png_bytes(image, text) for image, text in zip(finished.images, finished.texts, strict=True)]
    return {
        "id": job.id,
        "images": [base64.b64encode(data).decode("ascii") for data in images],
        "seeds": finished.seeds,
        "variation_seeds": finished.variation_seeds,
        "texts": finished.texts,
        "notes": finished.notes,
        "model": finished.model,
        "seconds": finished.seconds,
        "interrupted": finished.interrupted,
    }


def data_urls(images: Sequence[Image.Image]) -> list[str]:
    """Images as data: URLs of small JPEG files."""
    found = []
    for image in images:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=QUALITY)
        found.append(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}")
    return found


@router.get("/jobs", response_model=list[JobState])
async def jobs(request: Request) -> list[JobState]:
    """Those of your jobs that wait or run."""
    engine, client = engine_of(request), client_of(request)
    return [_state(engine, job) for job in engine.jobs() if job.client == client]


@router.post("/jobs/{id}/interrupt", response_model=JobState)
async def interrupt(request: Request, id: str) -> JobState:
    """Finish a job of yours early, with the images that the model expects now. One that waits is dropped."""
    engine, job = engine_of(request), _own(request, id)
    engine.interrupt([job])
    return _state(engine, job)


@router.delete("/jobs/{id}", response_model=JobState)
async def drop(request: Request, id: str) -> JobState:
    """Drop a job of yours."""
    engine, job = engine_of(request), _own(request, id)
    engine.cancel([job])
    return _state(engine, job)


def _own(request: Request, id: str) -> Job:
    client = client_of(request)
    for job in engine_of(request).jobs():
        if job.id == id and job.client == client:
            return job
    raise ApiError(404, "there is no such job of yours: it may have ended")


def _state(engine: Engine, job: Job) -> JobState:
    return JobState(id=job.id, state=job.state, step=job.step, steps=job.steps, position=position(engine, job))
