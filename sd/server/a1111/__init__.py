"""The HTTP interface of AUTOMATIC1111's web UI, /sdapi/v1/..., as its clients use it.

fields.py      the fields of requests and their defaults; reading a body
planning.py    from these fields to requests of the library
images.py      initial images and masks; controlnet.py: units of the ControlNet extension
options.py     the web UI's options that have an effect here
answers.py     images, and the text "info" about them
tasks.py       what is being generated: progress, interrupt, skip
generating.py  the routes txt2img, img2img, progress, interrupt, skip
lists.py       those that list what there is, and options, memory, refresh
tools.py       png-info, enlarging, and those of the ControlNet extension
errors.py      errors in the web UI's form
"""

from __future__ import annotations

from fastapi import FastAPI

from . import generating, lists, tools
from .errors import PREFIX, error
from .options import Options
from .session import Session
from .tasks import Tasks

__all__ = ["PREFIX", "add", "error"]


def add(app: FastAPI) -> None:
    """Add the routes to the application."""
    engine = app.state.engine
    app.state.a1111 = Session(engine, Options(engine), Tasks(engine))
    for part in (generating, lists, tools):
        app.include_router(part.router)
