"""Our own interface, /api/...: requests of the library as JSON, and their progress as Server-Sent Events."""

from __future__ import annotations

from fastapi import FastAPI


def add(app: FastAPI) -> None:
    """Add the routes to the application."""
