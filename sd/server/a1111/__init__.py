"""The HTTP interface of AUTOMATIC1111's web UI, /sdapi/v1/..., as its clients use it."""

from __future__ import annotations

from fastapi import FastAPI


def add(app: FastAPI) -> None:
    """Add the routes to the application."""
