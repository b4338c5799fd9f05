"""Server-Sent Events: the progress of jobs as a stream that ends with the connection.

    event: step
    data: {"step": 1, "steps": 20, "previews": []}

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NamedTuple

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .jobs import ENDS, Event, Job

SILENCE = 15.0  # seconds after which a comment is sent, so that proxies keep the connection open


class ServerEvent(NamedTuple):
    """An event of a stream: its name, and its data as JSON values."""

    name: str
    data: Mapping[str, Any]

    def __bytes__(self) -> bytes:
        """As it is sent. JSON has no line breaks, and escapes whatever is not ASCII."""
        return f"event: {self.name}\ndata: {json.dumps(self.data)}\n\n".encode("ascii")


class EventStream(StreamingResponse):
    """An answer that is a stream of events."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[ServerEvent | None], end: Callable[[], object], status_code: int = 200
    ) -> None:
        """
        events   None stands for a second in which nothing happened
        end      called when the stream is over, or the client has closed the connection

        FastAPI looks for the default of `status_code`.
        """
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(self._lines(events), status_code, headers)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()

    @staticmethod
    async def _lines(events: AsyncIterator[ServerEvent | None]) -> AsyncIterator[bytes]:
        silence = 0.0
        async for event in events:
            silence = 0.0 if event is not None else silence + 1
            if event is not None:
                yield bytes(event)
            elif silence >= SILENCE:
                silence = 0.0
                yield b": waiting\n\n"


async def follow(job: Job, every: float = 1.0) -> AsyncIterator[Event | None]:
    """The events of a job until it has ended; None after each `every` seconds in which there was none."""
    events = job.events()

    async def following() -> Event:
        return await anext(events)

    pending = asyncio.ensure_future(following())
    try:
        while True:
            done, _ = await asyncio.wait((pending,), timeout=every)
            if not done:
                yield None
                continue
            event = pending.result()
            yield event
            if event.state in ENDS:
                return
            pending = asyncio.ensure_future(following())
    finally:
        pending.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await pending
        with contextlib.suppress(RuntimeError):
            await events.aclose()  # type: ignore[attr-defined]
