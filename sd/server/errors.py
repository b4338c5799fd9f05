"""Errors in the form of the protocol that a request speaks, chosen by its path.

A protocol's package has `PREFIX`, a path or several, and `error(request, error) -> Response`. Elsewhere the answer is
{"error": {"status": 404, "message": "..."}}.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..messages import one_line
from .engine import Busy
from .http import ApiError, Gone, as_api_error

log = logging.getLogger("sd.server")
Form = Callable[[Request, ApiError], Response]
GONE = 499  # in the log only: the client closed the connection, so nobody reads the answer


def plain(request: Request, error: ApiError) -> Response:
    """An error of a path that is of no protocol."""
    content = {"error": {"status": error.status, "message": error.message}}
    return JSONResponse(content, error.status, error.headers)


class Errors:
    """Writes errors in the form of the protocol that a request speaks."""

    def __init__(self, protocols: Iterable[ModuleType]) -> None:
        """Those of the packages that have a form of their own."""
        found: list[tuple[str, Form]] = []
        for protocol in protocols:
            prefix = getattr(protocol, "PREFIX", ())
            found += [(each, protocol.error) for each in ((prefix,) if isinstance(prefix, str) else prefix)]
        self._forms = sorted(found, key=lambda pair: -len(pair[0]))  # the longest that fits

    def response(self, request: Request, error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
        """The answer to a request, with further headers."""
        path = request.scope["path"]
        fits = (form for prefix, form in self._forms if path == prefix or path.startswith(prefix.rstrip("/") + "/"))
        response = next(fits, plain)(request, error)
        for name, value in {**error.headers, **(headers or {})}.items():
            response.headers[name] = value
        return response

    def add(self, app: FastAPI) -> None:
        """Have the application write its errors this way."""

        async def known(request: Request, error: Exception) -> Response:
            return self.response(request, as_api_error(error))

        async def of_framework(request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            message = one_line(error.detail, 300) if error.detail else "an error"
            if error.status_code == 400 and isinstance(error.__cause__, RecursionError):
                message = "the request is nested too deeply"
            elif error.status_code == 400 and error.__cause__ is not None:
                message = f"the body cannot be read: {one_line(error.__cause__, 200)}"
            if error.status_code == 404 and error.detail == "Not Found":
                message = f"there is nothing at {one_line(request.scope['path'], 100)}"
            return self.response(request, ApiError(error.status_code, message), error.headers)

        async def of_validation(request: Request, error: Exception) -> Response:
            assert isinstance(error, RequestValidationError)
            return self.response(request, ApiError(422, first_fault(error)))

        async def gone(request: Request, error: Exception) -> Response:
            return Response(status_code=GONE)

        for kind in (ApiError, Busy, ValueError, RecursionError, MemoryError):
            app.add_exception_handler(kind, known)
        app.add_exception_handler(HTTPException, of_framework)
        app.add_exception_handler(RequestValidationError, of_validation)
        app.add_exception_handler(Gone, gone)


def first_fault(error: RequestValidationError) -> str:
    """What is wrong with a request, in one line: the first of the faults that were found.

    >>> first_fault(RequestValidationError([{"loc": ("body", "steps"), "msg": "Input should be a valid integer"}]))
    'steps: Input should be a valid integer'
    """
    faults = error.errors()
    if not faults:
        return "the request is not valid"
    fault = faults[0]
    if fault.get("type") == "json_invalid":
        return one_line(f"the body is not valid JSON: {fault.get('ctx', {}).get('error', 'unreadable')}", 300)
    where = ".".join(str(part) for part in fault.get("loc", ())[1:]) or "the body"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if fault.get("type") == "model_attributes_type":
        return "the body must be a JSON object, sent with Content-Type: application/json"
    said = str(fault.get("msg", "not valid")).removeprefix("Value error, ")
    return one_line(f"{one_line(where, 100)}: {said}", 300) + more
