"""Errors in the form of the web UI: a JSON object, whose "detail" says what is wrong and what to do.

Source of the form: AUTOMATIC1111/stable-diffusion-webui modules/api/api.py (`handle_exception`).
"""

from __future__ import annotations

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from ..http import ApiError

PREFIX = ("/sdapi", "/controlnet", "/internal", "/app_id")
NAMES = {422: "RequestValidationError", 500: "RuntimeError", 503: "RuntimeError", 507: "OutOfMemoryError"}


def error(request: Request, error: ApiError) -> Response:
    """The answer to a request that failed; clients show "detail" or "errors"."""
    message = error.message.encode("utf-8", "replace").decode()
    body = {"error": NAMES.get(error.status, "HTTPException"), "detail": message, "body": "", "errors": message}
    return JSONResponse(body, error.status, error.headers)


def field_error(name: str, message: object) -> ApiError:
    """An error in a field of the request."""
    return ApiError(422, f"{name}: {message}")
