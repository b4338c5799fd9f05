"""OpenAI's images interface, /v1/images/..., and /v1/models.

    images.py      the routes; bodies.py: JSON and forms
    parameters.py  their parameters and our settings -> work for the queue
    answers.py     images as JSON or as a stream of events; errors.py: errors in their form
    models.py      /v1/models
    schema.py      for /openapi.json

https://developers.openai.com/api/reference/resources/images
"""

from __future__ import annotations

from fastapi import FastAPI

from . import images, models
from .errors import error as error

PREFIX = "/v1"


def add(app: FastAPI) -> None:
    """Add the routes to the application."""
    app.include_router(images.router)
    app.include_router(models.router)
