"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from ..catalogue import Entry, UnknownName
from ..http import engine_of
from .errors import Invalid

router = APIRouter(prefix="/v1/models", tags=["OpenAI"])


@router.get("")
async def models(request: Request) -> dict[str, Any]:
    """The models that requests may name, the first one loaded first."""
    entries = engine_of(request).catalogue.entries("model")
    return {"object": "list", "data": await asyncio.to_thread(lambda: [described(entry) for entry in entries])}


@router.get("/{id:path}")
async def model(request: Request, id: str) -> dict[str, Any]:
    """One of them, by name, title or hash."""
    try:
        entry = await asyncio.to_thread(engine_of(request).catalogue.find, "model", id)
    except UnknownName as error:
        raise Invalid(str(error), "model", "model_not_found", 404) from None
    return await asyncio.to_thread(described, entry)


def described(entry: Entry) -> dict[str, Any]:
    """A model as this interface describes it."""
    try:
        created = int(entry.path.stat().st_mtime)
    except OSError:  # it was removed meanwhile
        created = 0
    return {"id": entry.name, "object": "model", "created": created, "owned_by": "sd", "title": entry.title}
