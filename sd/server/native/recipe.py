"""How an image was made, read from its file: POST /api/recipe."""

from __future__ import annotations

import asyncio
from dataclasses import fields
from typing import Any

from fastapi import APIRouter, Request

from ... import recipes
from ...params import OPTIONS, REQUESTS, SamplingParams
from ...recipes.containers import image_texts
from ...recipes.recipe import Recipe, clean, known
from ..catalogue import Catalogue, Kind, UnknownName
from ..http import ApiError, engine_of
from .bodies import Recipe as RecipeBody

MOST_TEXT = 100_000  # characters of a file's text that are shown
router = APIRouter(prefix="/api", tags=["native"])
FILE = {
    "requestBody": {
        "description": "The image file: PNG, JPEG or WebP",
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@router.post("/recipe", response_model=RecipeBody, openapi_extra=FILE)
async def recipe(request: Request) -> RecipeBody:
    """The settings in an image file, as a request for POST /api/generate."""
    data = await request.body()
    if not data:
        raise ApiError(422, "the body is empty: send the image file as it is")
    return await asyncio.to_thread(read, data, engine_of(request).catalogue)


def read(data: bytes, catalogue: Catalogue) -> RecipeBody:
    """The recipe in the contents of an image file. Raises ValueError, one line, if it has none."""
    found = recipes.read_request_bytes(data)
    return RecipeBody(
        request=as_json(found),
        loras=[
            {"name": name, "weight": lora.weight, "known": is_known}
            for lora in found.loras
            for name, is_known in [_named(catalogue, "lora", lora.name)]
        ],
        model=_named(catalogue, "model", found.model.name)[0],
        model_known=_named(catalogue, "model", found.model.name)[1],
        program=found.program,
        notes=list(found.notes),
        text=_text(data),
    )


def as_json(recipe: Recipe) -> dict[str, Any]:
    """The request of a recipe as JSON values: its prompts, and the settings that are not left at their defaults."""
    request, params = recipe.request, recipe.request.params
    (prompt,) = request.prompt
    found: dict[str, Any] = {"kind": recipe.kind, "prompt": prompt, "negative": request.negative}
    apart = {"prompt", "negative", "params", "controls"}
    for f in fields(request):
        if f.name not in apart and (f.name in recipe.given or getattr(request, f.name) != f.default):
            found[f.name] = getattr(request, f.name)
    found["params"] = {
        f.name: getattr(params, f.name)
        for f in fields(SamplingParams)
        if f.name != "options" and (f.name in recipe.given or getattr(params, f.name) != f.default)
    }
    if params.options:
        found["params"]["options"] = {name: params.options[name] for name in OPTIONS if name in params.options}
    return found | known(REQUESTS[recipe.kind], recipe.task)


def _named(catalogue: Catalogue, kind: Kind, name: str) -> tuple[str, bool]:
    """The name in the catalogue, and whether it is there."""
    try:
        return catalogue.find(kind, name).name, True
    except UnknownName:
        return name, False


def _text(data: bytes) -> str:
    """The text in a file that has the settings: "parameters", or else the first one; "" if it is in the pixels."""
    texts = image_texts(data)
    return clean(texts.get("parameters") or next(iter(texts.values()), ""))[:MOST_TEXT]
