"""What stands between the network and the routes: pure ASGI, outside of the framework.

In this order, each with one clear error in the form of the protocol:

    method     one of the usual ones                                                 405
    Host       a name of this server, against DNS rebinding (hosts.py)               421
    Origin     no other web page, unless it is in `origins`: those get CORS answers  403
    key        if there is one (keys.py); not for files of pages and /healthz        401
    body       bounded in size and time (bodies.py)                                  413, 408
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from ..messages import one_line
from .bodies import App, Bodies, GoneEarly, replayed
from .errors import GONE, Errors
from .hosts import Hosts, same_origin
from .http import ApiError, as_api_error
from .keys import Key
from .settings import ServerSettings

log = logging.getLogger("sd.server")

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
POLICY = "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with "no-referrer", the browser says that forms of the page are of no origin
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
PUBLIC, PUBLIC_FOLDERS = ("/", "/healthz", "/docs"), ("/page/", "/docs/")  # files that ask for the key themselves
TOKENS = re.compile(r"[A-Za-z0-9-]+(?:\s*,\s*[A-Za-z0-9-]+)*", re.ASCII)  # names of headers
PREFLIGHT_SECONDS = 600
MOST_VALUES = 200_000  # in a body of JSON


class Security:
    """The middleware. What is wrong inside of it is logged, and answered with status 500."""

    def __init__(self, app: App, settings: ServerSettings, errors: Errors) -> None:
        self.app, self.errors = app, errors
        self.hosts = Hosts([settings.host, *settings.hosts])
        self.origins = {origin.rstrip("/").lower() for origin in settings.origins}
        self.key = Key(settings.api_key) if settings.api_key else None
        self.bodies = Bodies(settings.max_body, settings.body_seconds)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # WebSockets: there are none here
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin", "")
        allowed = {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": "Retry-After"}
        shared = allowed if origin.lower() in self.origins else {}
        started = False

        async def secured(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                found = MutableHeaders(scope=message)
                found.setdefault("Content-Security-Policy", POLICY)  # a page may have a stricter one
                found.update({**HEADERS, **shared})
                if self.origins:
                    found.add_vary_header("Origin")
                if "etag" not in found:
                    found.setdefault("Cache-Control", "no-store")
            try:
                await send(message)
            except Exception as error:  # the client broke the protocol meanwhile, and was told so by the HTTP server
                log.info("an answer could not be sent: %s", type(error).__name__)

        try:
            preflight = self._checked(scope, headers)
            if preflight is not None:
                await preflight(scope, receive, secured)
                return
        except Refused as error:
            await self._refuse(scope, receive, secured, error)
            return
        await self._with_body(scope, receive, secured, lambda: started)

    async def _with_body(self, scope: Scope, receive: Receive, send: Send, started: Callable[[], bool]) -> None:
        """Read the body, and pass the request on."""
        try:
            body = await self.bodies.read(scope, receive)
        except GoneEarly:
            await Response(status_code=GONE)(scope, receive, send)
            return
        except ApiError as error:
            await self._refuse(scope, receive, send, Refused(error))
            return
        if has_too_many_values(scope, body):
            self.bodies.release(len(body))
            refused = ApiError(422, f"the body has too many values: at most {MOST_VALUES:,}")
            await self.errors.response(Request(scope), refused)(scope, receive, send)
            return
        try:
            await self.app(scope, replayed(body, receive), send)
        except Exception as error:
            log.error("an internal error", exc_info=error)
            if started():
                raise  # the connection is closed: the client sees that the answer is not whole
            await self.errors.response(Request(scope), as_api_error(error))(scope, receive, send)
        finally:
            self.bodies.release(len(body))

    def _checked(self, scope: Scope, headers: Mapping[str, str]) -> Response | None:
        """Raises Refused; returns the answer to the question of a browser whether a page may send a request (CORS)."""
        method, path = scope["method"], scope["path"]
        if method not in METHODS:
            raise Refused(ApiError(405, "this method is not used here"), {"Allow": ", ".join(METHODS)})
        host = headers.get("host", "")
        if not self.hosts.knows(host):
            name = one_line(host, 100)
            raise Refused(
                ApiError(421, f"this server does not answer to the name {name!r}; to allow it: --hosts {name}")
                if name
                else ApiError(421, "the request has no Host header")
            )
        is_public = method in ("GET", "HEAD") and (path in PUBLIC or path.startswith(PUBLIC_FOLDERS))
        shared = self._origin_checked(headers, host, is_public)
        if shared and method == "OPTIONS" and "access-control-request-method" in headers:
            return _preflight(headers)
        if self.key is not None and not is_public:
            if not self.key.opens(headers):
                # a script of a page asks for the key itself: the browser's own dialog would be in its way
                by_script = headers.get("sec-fetch-mode", "navigate") != "navigate"
                challenge = "Bearer" if by_script else 'Basic realm="sd", charset="UTF-8"'
                given = "the API key is wrong" if _has_key(headers) else "an API key is needed"
                raise Refused(
                    ApiError(401, f"{given}: send it as Authorization: Bearer KEY, or as the password of HTTP Basic"),
                    {"WWW-Authenticate": challenge},
                )
            address = scope.get("client")
            scope.setdefault("state", {})["key"] = self.key.client(address[0] if address else "")
        return None

    def _origin_checked(self, headers: Mapping[str, str], host: str, is_public: bool) -> bool:
        """Whether the request comes from another page that may use the server; Refused if it may not."""
        origin = headers.get("origin")
        if origin is not None and origin.lower() in self.origins:
            return True
        if origin is not None and not same_origin(origin, host):
            raise Refused(
                ApiError(
                    403,
                    f"web pages of {one_line(origin, 100)} may not use this server"
                    + (f"; to allow them, start it with --origins {one_line(origin, 100)}" if "://" in origin else ""),
                )
            )
        site = headers.get("sec-fetch-site", "none").lower()
        is_link = is_public and headers.get("sec-fetch-mode", "").lower() == "navigate"
        if origin is None and site not in ("none", "same-origin") and not is_link:
            raise Refused(ApiError(403, "other web pages may not use this server"))
        return False

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, refused: Refused) -> None:
        """Answer with an error, and close the connection if a body was to follow, after some of it was read."""
        has_body = any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])
        headers = {**refused.headers, **({"Connection": "close"} if has_body else {})}
        response = self.errors.response(Request(scope), refused.error, headers)
        if not has_body:
            await response(scope, receive, send)
            return
        end: Message = {"type": "http.response.body", "body": b"", "more_body": False}

        async def but_for_the_end(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "more_body": True}
            await send(message)

        await response(scope, receive, but_for_the_end)
        await self.bodies.drop(receive)
        await send(end)


def has_too_many_values(scope: Scope, body: bytes) -> bool:
    """Whether a body of JSON would take long to read. Images in base64 have none of the signs that are counted."""
    kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    if kind.startswith((b"multipart/", b"image/", b"application/octet-stream")) or scope["path"] == "/api/recipe":
        return False
    return sum(body.count(sign) for sign in (b",", b"[", b"{")) > MOST_VALUES


class Refused(Exception):
    """A request that no route gets to see."""

    def __init__(self, error: ApiError, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(error.message)
        self.error, self.headers = error, headers or {}


def _has_key(headers: Mapping[str, str]) -> bool:
    return "authorization" in headers or "x-api-key" in headers


def _preflight(headers: Mapping[str, str]) -> Response:
    """The answer to a page in `origins`: any method and header."""
    wanted = headers.get("access-control-request-headers", "")
    answer = {
        "Access-Control-Allow-Methods": ", ".join(METHODS),
        "Access-Control-Allow-Headers": wanted if TOKENS.fullmatch(wanted) else "Authorization, Content-Type",
        "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
    }
    if headers.get("access-control-request-private-network") == "true":
        answer["Access-Control-Allow-Private-Network"] = "true"
    return Response(status_code=204, headers=answer)
