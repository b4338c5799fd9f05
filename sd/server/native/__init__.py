"""Our own interface, /api/...: requests of the library as JSON, and their progress as Server-Sent Events.

generate.py   POST /api/generate, and the jobs of a client
models.py     what there is: models, samplers, limits; the tokens of a prompt
recipe.py     the settings in an image file
requests.py   JSON -> a request of the library; bodies.py: what is sent and answered
schema.py     the JSON Schema of requests, generated from params.py
docs.py       /docs: a page for /openapi.json that loads nothing from elsewhere
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from ...messages import one_line
from ..http import ApiError
from . import docs, generate, models, recipe
from .bodies import Problem
from .schema import document

PREFIX = "/api"
LONGEST = 1000  # characters of a message
PROBLEMS: dict[int | str, dict[str, Any]] = {
    422: {"description": "What is wrong with the request, in one line", "model": Problem},
    429: {"description": "The queue is full: try again after Retry-After seconds", "model": Problem},
    503: {"description": "The model is being loaded, or the server is stopping", "model": Problem},
}
router = APIRouter(prefix=PREFIX, tags=["native"])


@router.get("/schema")
async def schema() -> dict[str, Any]:
    """The JSON Schema of a request."""
    return document()


def error(request: Request, error: ApiError) -> Response:
    """An error in the form of this interface: {"status": 422, "message": "..."}."""
    body = {"status": error.status, "message": one_line(error.message, LONGEST)}
    return JSONResponse(body, error.status, error.headers)


def add(app: FastAPI) -> None:
    """Add the routes to the application."""
    for part in (generate.router, models.router, recipe.router, router):
        app.include_router(part, responses=PROBLEMS)
    docs.add(app)
