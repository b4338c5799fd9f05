"""A server in a process of its own, as tests use it: what it prints and logs, its memory, and requests byte by byte."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

SERVE = Path(__file__).resolve().parents[1] / "scripts" / "serve.py"
TIMEOUT = 60


class Reply(NamedTuple):
    """An answer; status 0 if the connection was closed without one."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Process:
    """A running server."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str]) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, str(SERVE), "--port", "0", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        self.said: list[str] = []
        self.logged: list[str] = []
        self._has_said = threading.Condition()
        self._threads = [
            threading.Thread(target=self._read, args=(self.popen.stdout, self.said)),
            threading.Thread(target=self._read, args=(self.popen.stderr, self.logged)),
        ]
        for thread in self._threads:
            thread.start()
        self.address = re.search(r"http://\S+", self.wait_for("listening on "))[0]
        url = urlsplit(self.address)
        self.host, self.port = url.hostname, url.port

    def _read(self, stream, lines) -> None:
        for line in stream:
            with self._has_said:
                lines.append(line.rstrip("\n"))
                self._has_said.notify_all()

    def wait_for(self, start: str) -> str:
        """The line on the standard output that begins so."""

        def found():
            return next((line for line in self.said if line.startswith(start)), None)

        with self._has_said:
            alive = self._has_said.wait_for(lambda: found() or self.popen.poll() is not None, TIMEOUT)
            assert alive and found(), self.logged
            return found()

    def end(self) -> int:
        """Wait for the end of the process and of its output: the exit status."""
        status = self.popen.wait(TIMEOUT)
        for thread in self._threads:
            thread.join()
        return status

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=TIMEOUT)

    def send(self, data: bytes) -> Reply:
        """Send bytes as they are, and read until the server closes the connection or has answered."""
        with self.connect() as connection:
            with suppress(OSError):  # closed before all was sent
                connection.sendall(data)
            return read(connection)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """A request with a body of JSON or bytes; names of headers have _ for -."""
        return self.send(request(method, path, body, **headers))

    def metric(self, name: str, **headers: str) -> float:
        """The value of a metric."""
        text = self.ask("GET", "/metrics", **headers).body.decode()
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])

    @property
    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.popen.pid}/task"))


def request(method: str, path: str, body: Any = None, **headers: str) -> bytes:
    """The bytes of a request."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    given = {"host": "localhost", "connection": "close", **{k.replace("_", "-").lower(): v for k, v in headers.items()}}
    if body is not None:
        given = {"content-type": "application/json", "content-length": str(len(data)), **given}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in given.items() if value is not None)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + data


def read(connection: socket.socket) -> Reply:
    """The answer on a connection: as long as it says, or until the end."""
    data = b""
    with suppress(ConnectionError):
        while not complete(data) and (part := connection.recv(65536)):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "):
        return Reply(0, {}, data)
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    return Reply(int(lines[0].split()[1]), headers, body)


def complete(data: bytes) -> bool:
    """Whether an answer with a Content-Length is all there."""
    head, separator, body = data.partition(b"\r\n\r\n")
    found = re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)
    return bool(separator) and found is not None and len(body) >= int(found[1])


@contextmanager
def running(*arguments: str, **environment: str) -> Iterator[Process]:
    """A server whose model is loaded."""
    process = Process(list(arguments), environment)
    try:
        process.wait_for("the model ")
        yield process
    finally:
        process.popen.kill()
        process.end()
