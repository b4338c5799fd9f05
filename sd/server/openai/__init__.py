"""OpenAI's images interface, /v1/images/..., and /v1/models."""

from __future__ import annotations

from fastapi import FastAPI


def add(app: FastAPI) -> None:
    """Add the routes to the application."""
