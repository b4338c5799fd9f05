"""POST /v1/images/generations, edits and variations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from .. import http
from ..engine import Engine
from ..events import EventStream
from ..http import engine_of
from .answers import answer, events
from .bodies import FORM, JSON, Body, read
from .parameters import Asked, edit, generation, variation
from .schema import body_schema, images_schema

router = APIRouter(prefix="/v1/images", tags=["OpenAI"])
DONE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The images; with `stream` the events `*.partial_image` and `*.completed`",
        "content": {JSON: {"schema": images_schema()}, "text/event-stream": {"schema": {"type": "string"}}},
    }
}


def _body(task: str, *types: str) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {type: {"schema": body_schema(task, type)} for type in types}}}


@router.post("/generations", responses=DONE, openapi_extra=_body("generation", JSON))
async def generations(request: Request) -> Response:
    """Generate images from a prompt."""
    return await _answer(request, await read(request, JSON), generation, "image_generation")


@router.post("/edits", responses=DONE, openapi_extra=_body("edit", FORM, JSON))
async def edits(request: Request) -> Response:
    """Paint the transparent part of a mask anew, or the whole of an image."""
    return await _answer(request, await read(request, FORM, JSON), edit, "image_edit")


@router.post("/variations", responses=DONE, openapi_extra=_body("variation", FORM))
async def variations(request: Request) -> Response:
    """Generate images like another one, without a prompt."""
    return await _answer(request, await read(request, FORM), variation, "image_edit")


async def _answer(request: Request, body: Body, parse: Callable[[Body, Engine], Asked], task: str) -> Response:
    engine = engine_of(request)
    asked, jobs = await http.accept(request, lambda: parse(body, engine), lambda asked: asked.works)
    if asked.stream:
        return EventStream(events(jobs, asked, task), lambda: engine.cancel(jobs))
    await http.ended(request, jobs)
    return JSONResponse(await asyncio.to_thread(answer, jobs, asked))
