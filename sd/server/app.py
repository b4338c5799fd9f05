"""The application: the routes of all protocols, and what protects them.

app = create_app(ServerSettings())      # an ASGI application, for uvicorn: `scripts/serve.py`
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from .. import __version__
from . import a1111, inside, native, openai, page
from .engine import Engine
from .settings import ServerSettings


def create_app(settings: ServerSettings) -> FastAPI:
    """The application for these settings. Its engine starts and stops with it."""
    engine = Engine(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.close()

    # FastAPI's own pages of the interfaces load scripts from another host: native/docs.py has one
    app = FastAPI(title="sd", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine, app.state.settings = engine, settings
    for protocol in (a1111, openai, native, inside, page):
        protocol.add(app)
    return app
