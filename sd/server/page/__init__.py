"""The page, at /: HTML, CSS and JavaScript modules, served from the package as they are.

A request only chooses among the files that were found at the start, so none opens a path. The files are small and stay
in memory. Nothing is compiled, and the page loads nothing from other hosts.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from fastapi import FastAPI, Request, Response

HERE = Path(__file__).resolve().parent
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# only what this server sends itself; images are also data: URLs (previews) and blobs (the gallery)
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


class File(NamedTuple):
    """A file of the page, with what its answer says of it."""

    content: bytes
    type: str
    tag: str  # changes with the content: a browser asks with it whether what it has is still right


def files(folder: Path = HERE) -> dict[str, File]:
    """The files of the page by their path below the folder, with "/" between folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in TYPES and path.is_file():
            content = path.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[path.relative_to(folder).as_posix()] = File(content, TYPES[path.suffix], tag)
    return found


def answer(file: File | None, request: Request) -> Response:
    """A file, or 304 if the browser has it already, or 404."""
    if file is None:
        return Response("There is no such file. The page is at /\n", 404, media_type="text/plain")
    headers = {
        "ETag": file.tag,
        "Cache-Control": "no-cache",  # keep it, but ask each time
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    if file.tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.type)


def add(app: FastAPI) -> None:
    """Add the routes to the application."""
    found = files()

    def index(request: Request) -> Response:
        return answer(found["index.html"], request)

    def file(path: str, request: Request) -> Response:
        return answer(found.get(path), request)

    app.add_api_route("/", index, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/page/{path:path}", file, methods=["GET", "HEAD"], include_in_schema=False)
