"""What the routes of all protocols share: errors, the client of a request, and waiting for jobs.

A route raises `ApiError`, `Busy` or ValueError; `errors.py` of each protocol writes them in its form.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from fastapi import Request

from ..messages import one_line
from .engine import Busy, Engine
from .jobs import Finished, Job, Work

T = TypeVar("T")
RESTART = 5  # seconds after which to try again when the server is stopping
STATUS = {"invalid": 422, "memory": 507, "internal": 500, "stopping": 503}  # of jobs that failed


class ApiError(Exception):
    """An error to answer with: HTTP status, one line that says what is wrong and what to do, and in how many seconds
    to try again, if that makes sense."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the answer."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


class Gone(Exception):
    """The client closed the connection: nobody reads an answer."""


def as_api_error(error: Exception) -> ApiError:
    """Any error that a route raises, as one to answer with."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        if error.retry_after is None:  # this server stops: another one may take its place
            return ApiError(503, str(error), RESTART)
        return ApiError(429, str(error), error.retry_after)
    if isinstance(error, RecursionError):
        return ApiError(422, "the request is nested too deeply")
    if isinstance(error, MemoryError):
        return ApiError(507, "out of memory: send a smaller request")
    if isinstance(error, ValueError):
        return ApiError(422, one_line(error, 1000))
    return ApiError(500, "an internal error: see the log of the server")


def engine_of(request: Request) -> Engine:
    """The engine of the application that a request is for."""
    engine: Engine = request.app.state.engine
    return engine


def client_of(request: Request) -> str:
    """Whose request it is: what the queue is shared fairly by. With a key, a hash of it and the address; else the
    address."""
    key = getattr(request.state, "key", None)
    return str(key or (request.client.host if request.client else "unknown"))


async def accept(request: Request, read: Callable[[], T], works: Callable[[T], Sequence[Work]]) -> tuple[T, list[Job]]:
    """Read a request, in a thread, and put its work into the queue; its jobs are named in the log.

    read    decodes images, among other things; few requests do that at once, so that those who wait for their turn hold
            no decoded images
    works   the work of what was read

    Returns what was read, and the jobs. Raises what `read` raises, and as `Engine.submit`.
    """
    engine = engine_of(request)
    async with engine.intake:
        found = await asyncio.to_thread(read)
        jobs = await engine.submit(works(found), client_of(request))
    request.state.jobs = [*getattr(request.state, "jobs", ()), *jobs]
    return found, jobs


async def ended(
    request: Request, jobs: Sequence[Job], begun: Callable[[Sequence[Job]], object] = lambda jobs: None
) -> Sequence[Job]:
    """Wait for the end of the jobs of a request; at least one of them is done then.

    begun   called with the jobs first

    If the client closes the connection, the jobs are cancelled and Gone is raised. Raises ApiError for the first job
    that failed.
    """
    engine = engine_of(request)
    try:
        begun(jobs)
        await unless_gone(request, asyncio.gather(*(job.end() for job in jobs)))
    except BaseException:
        engine.cancel(jobs)
        raise
    check_done(jobs)
    return jobs


def check_done(jobs: Sequence[Job]) -> None:
    """Raise ApiError for the first of these jobs that failed or was cancelled."""
    for job in jobs:
        if job.state == "failed":
            raise ApiError(STATUS[job.fault], job.error, RESTART if job.fault == "stopping" else None)
        if job.state == "cancelled" and not any(other.state == "done" for other in jobs):
            raise ApiError(409, "cancelled before it was generated")


def results(jobs: Sequence[Job]) -> list[Finished]:
    """The results of those that are done."""
    return [job.finished for job in jobs if job.finished is not None]


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of what is awaited; Gone is raised as soon as the client closes the connection.

    The body of the request must have been read.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)  # so that none is reported as unread


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
