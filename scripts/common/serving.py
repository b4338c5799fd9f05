"""Running the server: its sockets, what it prints, and how it stops without losing a job.

uvicorn by itself stops in another order: it waits for open requests, and only then tells the application, so requests
that wait for jobs would hold it up for ever. Here a signal stops the queue at once, the jobs in it are finished or
answered with an error within the time of grace, and uvicorn closes each connection after its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sd.server.engine import Engine
from sd.server.health import health
from sd.server.settings import ServerSettings

ANSWER_SECONDS = 10  # in which clients must take the last answers
KEEP_ALIVE = 30  # seconds that a connection may be idle
HEADER_BYTES = 64 << 10  # of all headers of a request
POLL = 0.05


def listen(host: str, port: int) -> list[socket.socket]:
    """The sockets that listen at all addresses of a name, at the same port. ValueError if one cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise ValueError(f"host {host}: not a name or address of this machine") from None
    opened: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                opened.append(stack.enter_context(socket.socket(family, kind, protocol)))
            except OSError:  # no IPv6 here
                continue
            if os.name == "posix":  # elsewhere it would let two servers have the same port
                opened[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                opened[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            chosen = opened[0].getsockname()[1] if len(opened) > 1 else port
            try:
                opened[-1].bind((address[0], chosen, *address[2:]))
                opened[-1].listen(2048)
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL and len(found) > 1:  # ::1 where IPv6 is off
                    opened.pop().close()
                    continue
                raise ValueError(_why(host, port, error)) from None
        if not opened:
            raise ValueError(f"host {host}: not an address of this machine")
        stack.pop_all()
    return opened


def _why(host: str, port: int, error: OSError) -> str:
    """Why a socket cannot listen."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken: another program listens there; choose another with --port"
    if error.errno == errno.EACCES:
        return f"port {port}: permission denied: choose one above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"host {host}: not an address of this machine"
    return f"{host}, port {port}: {error.strerror or error}"


def address_of(opened: socket.socket) -> str:
    """The address of a socket that listens, as a URL."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Connection(H11Protocol):
    """A connection that ends if the headers of a request do not arrive in time, or if no answer is taken.

    uvicorn would wait for ever.
    """

    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _unsent = 0  # bytes that waited to be sent when it was looked at last

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._set_deadline()

    def data_received(self, data: bytes) -> None:
        """The time counts from the first byte of a request."""
        super().data_received(data)
        self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        super().connection_lost(exc)
        for timer in (self._deadline, self._stalled):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """The client is slow: see whether it takes anything."""
        super().pause_writing()
        self._look_later()

    def resume_writing(self) -> None:
        """It has taken most of it."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def _look_later(self) -> None:
        assert isinstance(self.config, Config)
        self._unsent = self.transport.get_write_buffer_size()
        self._stalled = self.loop.call_later(self.config.seconds, self._look)

    def _look(self) -> None:
        if self.transport.get_write_buffer_size() >= self._unsent:
            self.transport.abort()
        else:
            self._look_later()

    def _is_waiting(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _set_deadline(self) -> None:
        if self._is_waiting() and self._deadline is None:
            assert isinstance(self.config, Config)
            self._deadline = self.loop.call_later(self.config.seconds, self._late)
        elif not self._is_waiting() and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if self._is_waiting():
            self.transport.close()


class Config(uvicorn.Config):
    """Settings of uvicorn, and the seconds in which headers must arrive, and some of an answer must be taken."""

    def __init__(self, app: Any, seconds: float) -> None:
        super().__init__(
            app,
            http=Connection,  # it limits the size of headers
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # anybody may write them
            timeout_keep_alive=KEEP_ALIVE,
            h11_max_incomplete_event_size=HEADER_BYTES,
        )
        self.seconds = seconds


class Server(uvicorn.Server):
    """A server that prints when it listens and when its model is loaded, and stops in the right order.

    SIGTERM or SIGINT   no more jobs are accepted; those that are there are finished within the grace
    a second one        the grace is over
    a third one         answers are not waited for
    """

    def __init__(self, app: Any, settings: ServerSettings, say: Callable[[str], object]) -> None:
        super().__init__(Config(app, settings.body_seconds))
        self.engine: Engine = app.state.engine
        self.settings, self.say = settings, say
        self.failure = ""  # why the model cannot be loaded
        self._signals = 0
        self._watch: asyncio.Task[None] | None = None

    def run_on(self, opened: list[socket.socket]) -> None:
        """Serve until a signal comes."""
        self.run(sockets=opened)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of signals."""
        self._signals += 1
        self.should_exit = True
        self.force_exit = self._signals > 2
        self.engine.drain()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; loading goes on."""
        await super().startup(sockets)
        self.say(f"listening on {address_of((sockets or [])[0])}")
        self._watch = asyncio.create_task(self._loading())

    async def _loading(self) -> None:
        begun = time.monotonic()
        while (state := health(self.engine)) == "loading":
            await asyncio.sleep(POLL)
        if state == "ready":
            self.say(f"the model {self.engine.current.name} is loaded ({time.monotonic() - begun:.1f} s)")
        elif state == "failed":
            self.failure = self.engine.workers[0].failure
            self.should_exit = True
            self.engine.drain()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listening sockets, finish or fail all jobs, and wait until their clients have the answers."""
        if self._watch is not None:
            self._watch.cancel()
        closing = asyncio.create_task(super().shutdown(sockets))
        until = time.monotonic() + self.settings.grace
        while self.engine.jobs() and time.monotonic() < until and self._signals < 2:
            await asyncio.sleep(POLL)
        await asyncio.to_thread(self.engine.close, 0)
        await asyncio.wait([closing], timeout=ANSWER_SECONDS)
        if not closing.done():  # clients that do not read
            for connection in list(self.server_state.connections):
                if connection.transport is not None:
                    connection.transport.abort()
            await asyncio.wait([closing], timeout=1)
            self.force_exit = True
        await closing


def say_line(text: str) -> None:
    """Print a line at once: another program may wait for it."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
