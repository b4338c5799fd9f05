"""Routes that generate, and those about what is being generated."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from ..http import accept, client_of, ended, results
from .answers import answer, encoded
from .errors import GENERATING, PROBLEMS
from .fields import IMG2IMG, TXT2IMG, Field, body_of, openapi, read
from .planning import check_count, plan
from .session import session_of

router = APIRouter(prefix="/sdapi/v1", tags=["A1111"], responses=PROBLEMS)


@router.post("/txt2img", openapi_extra=openapi(TXT2IMG), responses=GENERATING)
async def txt2img(request: Request) -> Response:
    """Generate images from text."""
    return await _generated(request, "scripts_txt2img", TXT2IMG)


@router.post("/img2img", openapi_extra=openapi(IMG2IMG), responses=GENERATING)
async def img2img(request: Request) -> Response:
    """Generate images from an image, or, with a mask, a part of it."""
    return await _generated(request, "scripts_img2img", IMG2IMG)


async def _generated(request: Request, name: str, fields: dict[str, Field]) -> Response:
    engine, options, tasks = session_of(request)
    given = read(await body_of(request), fields)
    check_count(given, engine.settings.max_images)
    with tasks.added(client_of(request), name) as task:
        planned, jobs = await accept(request, lambda: plan(given, options, engine), lambda planned: planned.works)
        await ended(request, jobs, task.begin)
    if not given["override_settings_restore_afterwards"]:
        options.update(planned.override)
    finished = results(jobs)
    loaded = [each for worker in engine.workers for each in worker.models if each.entry.title == finished[0].model]
    inpainting = any(each.model.is_inpainting for each in loaded)
    body = await asyncio.to_thread(answer, planned, finished, task.stamp, inpainting)
    return Response(body, media_type="application/json")


@router.get("/progress")
async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
    """How far the client's request is, and what the model expects at the moment."""
    _, options, tasks = session_of(request)
    wanted = not skip_current_image and options["live_previews_enable"]
    found = await tasks.progress(client_of(request), wanted)
    if found["current_image"] is not None:
        found["current_image"] = await asyncio.to_thread(encoded, found["current_image"])
    return found


@router.post("/interrupt")
async def interrupt(request: Request) -> dict[str, Any]:
    """Finish the client's requests early: they answer with what there is."""
    session_of(request).tasks.interrupt(client_of(request))
    return {}


@router.post("/skip")
async def skip(request: Request) -> None:
    """Finish the batch in work early, and go on with the next."""
    session_of(request).tasks.skip(client_of(request))
