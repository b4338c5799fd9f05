"""Errors in the form of the web UI: a JSON object, whose "detail" says what is wrong and what to do.

Source of the form: AUTOMATIC1111/stable-diffusion-webui modules/api/api.py (`handle_exception`).
"""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from ..http import ApiError

PREFIX = ("/sdapi", "/controlnet", "/internal", "/app_id")
NAMES = {422: "RequestValidationError", 500: "RuntimeError", 503: "RuntimeError", 507: "OutOfMemoryError"}


class Problem(BaseModel):
    """What is wrong with a request, in one line."""

    error: str
    detail: str
    body: str
    errors: str


# of routes that read a body, for the OpenAPI document
PROBLEMS: dict[int | str, dict[str, Any]] = {
    404: {"description": "It names what is not there", "model": Problem},
    422: {"description": "What is wrong with the request", "model": Problem},
}
# of those that generate
GENERATING: dict[int | str, dict[str, Any]] = {
    **PROBLEMS,
    409: {"description": "Interrupted before it began", "model": Problem},
    429: {"description": "The queue is full: try again after Retry-After seconds", "model": Problem},
    503: {"description": "The server stops", "model": Problem},
    507: {"description": "Out of memory", "model": Problem},
}


def error(request: Request, error: ApiError) -> Response:
    """The answer to a request that failed; clients show "detail" or "errors"."""
    message = error.message.encode("utf-8", "replace").decode()
    body = {"error": NAMES.get(error.status, "HTTPException"), "detail": message, "body": "", "errors": message}
    return JSONResponse(body, error.status, error.headers)


def field_error(name: str, message: object) -> ApiError:
    """An error in a field of the request."""
    return ApiError(422, f"{name}: {message}")
