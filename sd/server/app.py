"""The application: the routes of all protocols, and what protects them.

app = create_app(ServerSettings())      # an ASGI application, for uvicorn: `scripts/serve.py`

A request passes Observer (logs.py), Security (security.py), and the errors of its protocol (errors.py) on its way to
a route.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from .. import __version__
from . import a1111, health, inside, native, openai, page
from .engine import Engine
from .errors import Errors
from .logs import Observer, job_logger
from .metrics import Metrics
from .security import Security
from .settings import ServerSettings


def create_app(settings: ServerSettings) -> FastAPI:
    """The application for these settings. Its engine starts and stops with it."""
    engine = Engine(settings, job_logger(settings.log_prompts))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.close)

    # FastAPI's own pages of the interfaces load scripts from another host: native/docs.py has one
    app = FastAPI(title="sd", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine, app.state.settings = engine, settings
    for protocol in (a1111, openai, native, inside, page):
        protocol.add(app)
    metrics = Metrics(engine)
    health.add(app, engine, metrics)
    errors = Errors((a1111, openai, native))
    errors.add(app)
    app.add_middleware(Security, settings=settings, errors=errors)
    app.add_middleware(Observer, metrics=metrics)  # the last one is the first to see a request
    return app
