"""What happens inside the model while it generates, for the page: POST /api/inside.

watcher.py    looks at the run of a job (sd/study/inside.py), and keeps what is to be sent
pictures.py   maps and images as JSON values
routes.py     the route: events of a stream
"""

from __future__ import annotations

from fastapi import FastAPI

from . import routes


def add(app: FastAPI) -> None:
    """Add the route to the application."""
    app.include_router(routes.router)
