"""Errors in OpenAI's form: {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}.

https://developers.openai.com/api/docs/guides/error-codes
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from ...messages import one_line
from ...params import OPTIONS, REQUESTS, SamplingParams
from ..http import ApiError

LONGEST = 1000  # characters of a message
KINDS: tuple[type[Any], ...] = (SamplingParams, *REQUESTS.values())
SETTINGS = {f.name for cls in KINDS for f in fields(cls)} | {*OPTIONS}
BEGINNING = re.compile(r"(?:unknown |a |\d+ )?(\w+)")  # of messages of the library: the setting that they are about
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 503: "service_unavailable"}
FINAL = (409, 507)  # the SDK would send these again, with the same result


class Invalid(ApiError):
    """A mistake in a request.

    param   the parameter that it is in
    code    a word for programs, such as "model_not_found"
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(status, message)
        self.param, self.code = param, code


def as_json(error: ApiError) -> dict[str, Any]:
    """The body of an error."""
    status = status_of(error)
    param, code = (error.param, error.code) if isinstance(error, Invalid) else (None, None)
    if param is None and status == 400 and (first := BEGINNING.match(error.message)) and first[1] in SETTINGS:
        param = first[1]
    return {
        "error": {
            "message": one_line(error.message, LONGEST),
            "type": TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
            "param": None if param is None else one_line(param, 60),
            "code": code or CODES.get(status),
        }
    }


def status_of(error: ApiError) -> int:
    """The HTTP status: where others answer 422, OpenAI answers 400."""
    return 400 if error.status == 422 else error.status


def error(request: Request, error: ApiError) -> Response:
    """The answer to a request that failed."""
    status = status_of(error)
    final = {"x-should-retry": "false"} if status in FINAL else {}
    return JSONResponse(as_json(error), status, {**error.headers, **final})
