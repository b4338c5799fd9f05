"""/docs: a page for /openapi.json, of files in this package. FastAPI's own page loads scripts from another host."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Response

FILES = {  # path -> file, media type
    "/docs": ("docs.html", "text/html"),
    "/docs/docs.css": ("docs.css", "text/css"),
    "/docs/docs.js": ("docs.js", "text/javascript"),
}
HEADERS = {"Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'; object-src 'none'"}


def add(app: FastAPI) -> None:
    """Add the page to the application."""
    folder = Path(__file__).resolve().parent / "files"
    for path, (name, media_type) in FILES.items():
        _add(app, path, (folder / name).read_bytes(), f"{media_type}; charset=utf-8")


def _add(app: FastAPI, path: str, data: bytes, media_type: str) -> None:
    @app.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(data, headers={**HEADERS, "Content-Type": media_type})
