"""What happens inside the model, for the page: steps, attention of each word, tokens. /api/inside/..."""

from __future__ import annotations

from fastapi import FastAPI


def add(app: FastAPI) -> None:
    """Add the routes to the application."""
