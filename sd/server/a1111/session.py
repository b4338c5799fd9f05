"""What the routes of the web UI's interface share: the engine, the options, and the requests in work."""

from __future__ import annotations

from typing import NamedTuple

from fastapi import Request

from ..engine import Engine
from .options import Options
from .tasks import Tasks


class Session(NamedTuple):
    """Of one application."""

    engine: Engine
    options: Options
    tasks: Tasks


def session_of(request: Request) -> Session:
    """That of the application that a request is for."""
    session: Session = request.app.state.a1111
    return session
