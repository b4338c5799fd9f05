"""The page, at /: HTML, CSS and JavaScript modules, served from the package as they are."""

from __future__ import annotations

from fastapi import FastAPI


def add(app: FastAPI) -> None:
    """Add the routes to the application."""
