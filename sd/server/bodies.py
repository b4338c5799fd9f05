"""The body of a request: read before any route sees it, bounded in size and time.

A route gets it in one piece, so none waits for a slow client, and none has to count.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from starlette.types import Message, Receive, Scope, Send

from .http import ApiError

App = Callable[[Scope, Receive, Send], Awaitable[None]]
AT_ONCE = 8  # times the largest body: the bytes of all bodies in memory
LINGER = 4  # times the largest body: what is read and dropped of one that is refused


class GoneEarly(Exception):
    """The client closed the connection before its body had arrived."""


class Bodies:
    """Reads bodies, and counts the bytes of all that are in memory.

    most      bytes of one body; all together may have `AT_ONCE` times as many
    seconds   in which a body must have arrived
    """

    def __init__(self, most: int, seconds: float) -> None:
        self.most, self.seconds, self.held = most, seconds, 0

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Its bytes count as held until `release`.

        Raises ApiError for one that is too large (413) or too slow (408), or if others fill the memory (503), and
        GoneEarly.
        """
        if _length(scope) > self.most:
            raise ApiError(413, self._too_large())
        until, body = time.monotonic() + self.seconds, bytearray()
        try:
            while True:
                try:
                    message = await asyncio.wait_for(receive(), max(until - time.monotonic(), 0.001))
                except asyncio.TimeoutError:
                    raise ApiError(408, f"the body of the request did not arrive within {self.seconds:g} s") from None
                if message["type"] == "http.disconnect":
                    raise GoneEarly
                part = message.get("body", b"")
                if len(body) + len(part) > self.most:
                    raise ApiError(413, self._too_large())
                if self.held + len(part) > AT_ONCE * self.most:
                    raise ApiError(503, "too many large requests at once: try again later", 5)
                self.held += len(part)
                body += part
                if not message.get("more_body", False):
                    return bytes(body)
        except BaseException:
            self.release(len(body))
            raise

    def release(self, size: int) -> None:
        """A body of this many bytes is not needed any more."""
        self.held -= size

    def _too_large(self) -> str:
        return f"the body of the request is too large: this server takes at most {self.most:,} bytes"

    async def drop(self, receive: Receive) -> None:
        """Read what still comes of a body that was refused, so that the client gets to see the answer; not for long.

        A connection that is closed with data unread is reset, and the client may lose what was sent to it.
        """
        until, left = time.monotonic() + self.seconds, LINGER * self.most
        while left > 0 and (seconds := until - time.monotonic()) > 0:
            try:
                message = await asyncio.wait_for(receive(), min(seconds, 5))
            except asyncio.TimeoutError:
                return
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return
            left -= len(message.get("body", b""))


def _length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0


def replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body has been read: the body in one piece, then what comes after it."""
    first = True

    async def again() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
