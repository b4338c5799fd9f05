"""What there is: models, LoRAs, embeddings, samplers, limits; and the tokens of a prompt."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import torch
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from ... import few_step
from ...checkpoints.loading import LoadOptions, ModelFiles
from ...config import Config
from ...params import SamplingParams
from ...pipeline import StableDiffusion
from ...resources import EMBEDDED_LORA, resource
from ...samplers import SAMPLERS
from ...schedule import SPACINGS
from ...text.prompt_syntax import chunks, texts_of
from ...text.prompt_tags import take_tags
from ..catalogue import Entry, UnknownName
from ..engine import Engine
from ..http import ApiError, engine_of
from ..loaded import Loaded
from ..public import public_text
from .bodies import NameBody, TextBody, Tokens

log = logging.getLogger("sd.server")
router = APIRouter(prefix="/api", tags=["native"])
FEW_STEPS_SPACING = "trailing"  # the timesteps on which the LoRA of the embedded model was trained
MOST_WORDS = 50


@router.get("/models")
async def models(request: Request) -> JSONResponse:
    """Models, LoRAs, embeddings, control networks, VAEs; samplers; limits; the defaults of the current model."""
    return JSONResponse(await asyncio.to_thread(available, engine_of(request)))


@router.post("/models/select")
async def select(request: Request, body: NameBody) -> JSONResponse:
    """Make a model the current one: that of requests which name none. It is loaded with the first of them."""
    engine = engine_of(request)
    await asyncio.to_thread(choose, engine, body.name)
    return JSONResponse(await asyncio.to_thread(available, engine))


@router.post("/refresh")
async def refresh(request: Request) -> JSONResponse:
    """Look into the folders of models, LoRAs and so on again."""
    engine = engine_of(request)
    await asyncio.to_thread(refreshed, engine)
    return JSONResponse(await asyncio.to_thread(available, engine))


@router.post("/tokens", response_model=Tokens)
async def tokens(request: Request, body: TextBody) -> Tokens:
    """Count the tokens of a prompt, and say which part of it does not fit."""
    loaded = loaded_model(engine_of(request))
    return await asyncio.to_thread(count_tokens, loaded.model, body.text, body.web_ui_prompts)


def loaded_model(engine: Engine) -> Loaded:
    """The current model; another one if it is not loaded. Raises ApiError while there is none."""
    found = [loaded for worker in engine.workers for loaded in worker.models]
    if not found:
        if any(worker.failure for worker in engine.workers):
            raise ApiError(503, f"the model {engine.current.name} cannot be loaded: see the log of the server")
        for worker in engine.workers:  # it may have been unloaded
            worker.reload()
        raise ApiError(503, "the model is being loaded: try again in a few seconds", 2)
    return next((loaded for loaded in reversed(found) if loaded.entry == engine.current), found[-1])


def choose(engine: Engine, name: str) -> None:
    """Make a model the current one. Raises ApiError for an unknown name, and ValueError for a file that is no model."""
    try:
        entry = engine.catalogue.find("model", name)
    except UnknownName as error:
        raise ApiError(404, str(error)) from None
    config_of(engine, entry)
    engine.current = entry


def refreshed(engine: Engine) -> None:
    """Look into the folders again. Raises ApiError, without their paths."""
    try:
        engine.catalogue.refresh()
    except (ValueError, OSError) as error:
        log.error("the folders cannot be read: %s", error)
        raise ApiError(500, "the folders cannot be read: see the log of the server") from None


def config_of(engine: Engine, entry: Entry) -> Config:
    """The config of a model, from its file if it is not in memory: no weights are read. Raises ValueError."""
    for loaded in (loaded for worker in engine.workers for loaded in worker.models):
        if loaded.entry == entry:
            return loaded.model.config
    try:
        with ModelFiles(entry.path, LoadOptions()) as files:
            return files.config
    except (ValueError, OSError) as error:
        raise ValueError(public_text(error, [entry])) from None


def available(engine: Engine) -> dict[str, Any]:
    """The answer of GET /api/models."""
    catalogue, settings = engine.catalogue, engine.settings
    lcm, models = few_step.LCM, [loaded for worker in engine.workers for loaded in worker.models]
    words = next((dict(loaded.words) for loaded in models if loaded.entry == engine.current), {})
    config = config_of(engine, engine.current)
    params = SamplingParams().resolved(config)
    return {
        "current": engine.current.name,
        "models": [
            {"name": entry.name, "title": entry.title, "hash": entry.hash, "embedded": entry.embedded}
            for entry in catalogue.entries("model")
        ],
        "loras": [{"name": entry.name} for entry in catalogue.entries("lora")],
        "embeddings": [{"name": entry.name, "words": words.get(entry, [])} for entry in catalogue.entries("embedding")],
        "controls": [{"name": entry.name} for entry in catalogue.entries("control")],
        "vaes": [{"name": entry.name} for entry in catalogue.entries("vae")],
        "samplers": [
            {
                "key": key,
                "label": sampler.label,
                "options": {name: option._asdict() for name, option in sampler.options.items()},
                "usual_steps": sampler.steps,
                "usual_spacing": sampler.spacing,
            }
            for key, sampler in SAMPLERS.items()
        ],
        "spacings": list(SPACINGS),
        "limits": {
            name: getattr(settings, name)
            for name in ("max_steps", "max_pixels", "max_batch", "max_image_pixels", "max_body")
        },
        "defaults": {
            "size": config.size,
            "steps": params.steps,
            "guidance": params.guidance,
            "sampler": params.sampler,
            "spacing": params.spacing,
        },
        "few_steps": {
            "lora": resource(EMBEDDED_LORA).stem,
            "steps": lcm.steps,
            "guidance": lcm.guidance,
            "sampler": lcm.sampler,
            "spacing": FEW_STEPS_SPACING,
        }
        if engine.current.embedded
        else None,
        "family": config.name,
        "is_inpainting": config.is_inpainting,
    }


@torch.no_grad()
def count_tokens(model: StableDiffusion, text: str, web_ui_prompts: bool) -> Tokens:
    """The tokens of a prompt. Raises ValueError for one that the syntax of the web UI does not allow."""
    tokenizer = model.tokenizer
    room = tokenizer.length - 2
    if web_ui_prompts:
        text, _ = take_tags(text)
        found = [chunk.ids for part in texts_of(text) for chunk in chunks(tokenizer, part)]
        ids, cut = [i for chunk in found for i in chunk], ""
    else:
        ids = tokenizer.encode(text)
        found, cut = [ids[:room]], tokenizer.decode(ids[room:])
    read = [i for chunk in found for i in chunk]
    return Tokens(count=len(ids), limit=room, chunks=len(found), cut=cut, unknown=_unknown(model, read)[:MOST_WORDS])


def _unknown(model: StableDiffusion, ids: list[int]) -> list[str]:
    """The words of these tokens whose vectors are zero, as those are that did not occur in training."""
    table = model.text_encoder.token
    device = table.weight.device
    if device.type == "meta":  # with low memory: the weights are not here at the moment
        return []
    try:
        zero = table(torch.tensor(ids, dtype=torch.long, device=device)).abs().sum(dim=-1) == 0
    except RuntimeError:  # the table moves to another device just now
        return []
    words = model.tokenizer.decode([i for i, is_zero in zip(ids, zero.tolist(), strict=True) if is_zero]).split()
    return list(dict.fromkeys(words))
